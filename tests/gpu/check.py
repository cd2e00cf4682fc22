"""All GPU checks, several processes at a time, since most of their time is compiling: `make gpu-check`.

Writes bench/results/GPU/check.json and ends with one line that says how it went. Arguments are pytest's; `--rehearse`
runs the miniature on a machine without a GPU and writes nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from xml.etree import ElementTree

import torch
from zipvl_adapters.cli.env import commit, environment, versions

import zipvl_kernels as zk

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPERATORS = ("score_tokens", "select_tokens", "compact_kv_", "sparse_attention", "decode_attention", "zipvl_prefill_")
COUNTS = ("tests", "failures", "errors", "skipped")
TYPES = ("bfloat16", "float16", "float32")
DTYPES = ("bfloat16", "float16 and not bfloat16", "float32")  # as parts of tests' names
# What runs in a process of its own: a file, and the part of it. What takes long comes first.
SHARDS = [
    *(
        ("test_packed.py", f"contract_of_other and {operator} and {dims}")
        for operator in ("sparse_attention", "score_tokens")
        for dims in ("256", "80")
    ),
    *(
        ("test_packed.py", f"contract and not other and {operator} and {dtype} and {backend}")
        for operator in ("sparse_attention", "zipvl_prefill_", "score_tokens")
        for dtype in DTYPES
        for backend in ("not auto", "auto")
    ),
    *(("test_pages.py", f"sparse and not scores and {dtype}") for dtype in DTYPES),
    *(("test_pages.py", f"scores and not sparse and {dtype}") for dtype in DTYPES),
    *(
        ("test_pages.py", f"scores and sparse and {dtype} and {N} and {backend}")
        for dtype in DTYPES
        for N in ("not 2880", "2880")
        for backend in ("cuda", "not cuda")
    ),
    ("test_pages.py", f"scores and sparse and not {' and not '.join(TYPES)}"),
    ("test_packed.py", "contract and (compact_kv_ or select_tokens)"),
    ("test_packed.py", "not contract"),
    ("test_large.py", ""),
    ("test_static_cache.py", ""),
    ("test_engine.py", ""),
    ("test_layers.py", "not pages"),
    ("test_layers.py", "pages"),
    ("test_pages.py", "compaction"),
    ("test_pages.py", "not compaction and not scores and not sparse"),
    ("test_sanitizer.py", "racecheck or script"),
    ("test_sanitizer.py", "memcheck and scores"),
    ("test_sanitizer.py", "memcheck and attention"),
    ("test_sanitizer.py", "memcheck and packed"),
    *(
        ("test_contract.py", f"{operator} and {dtype}")
        for operator in reversed(OPERATORS)
        for dtype in DTYPES
        if operator != "select_tokens"
    ),
    *(("test_contract.py", f"{operator} and other") for operator in OPERATORS if operator != "select_tokens"),
    ("test_contract.py", "no_dtype"),
    *((file, operator) for file in ("test_bits.py", "test_torch.py") for operator in OPERATORS),
    ("test_torch.py", "not auto and not triton and not cuda"),
]


def everything():
    """File and name of every test that there is."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", str(HERE)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return {(Path(file).name, test) for file, found, test in (line.partition("::") for line in lines) if found}


def run(shard, extra):
    """Counts of one process, why tests were skipped, and all that ran; prints how it went."""
    file, part = shard
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [*(["-k", part] if part else []), *extra, str(HERE / file)]
        begin = perf_counter()
        # Every process would take all cores for torch's own work.
        environ = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
        seconds = perf_counter() - begin
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
        found = {name: int(suite.get(name, 0)) for name in COUNTS} if suite is not None else {}
        skips = sorted({skip.get("message", "") for skip in suite.iter("skipped")}) if suite is not None else []
        names = {(file, case.get("name")) for case in suite.iter("testcase")} if suite is not None else set()
    wrong = done.returncode not in (0, 5) or suite is None  # 5: none of the tests chosen
    if wrong and not found.get("failures", 0) + found.get("errors", 0):
        found["errors"] = found.get("errors", 0) + 1
    output = f"\n{(done.stdout + done.stderr)[-6000:]}\n" if wrong else ""  # at once: what runs on may be stopped
    print(f"{'WRONG' if wrong else 'ok':5} {seconds:6.1f} s  {file} {part}{output}", flush=True)
    return found, skips, names


def main(arguments):
    rehearse = "--rehearse" in arguments
    extra = [x for x in arguments if x != "--rehearse"]
    if not torch.cuda.is_available() and not rehearse:
        print("gpu-check: nothing was checked, torch sees no GPU ('zipvl env' shows what it sees)")
        return 2
    begin = perf_counter()
    with ThreadPoolExecutor(max(1, min(20, (os.cpu_count() or 1) * 3 // 4))) as pool:
        wanted = pool.submit(everything)
        done = list(pool.map(lambda shard: run(shard, extra), SHARDS))
    seconds = perf_counter() - begin
    total = {name: sum(found.get(name, 0) for found, *_ in done) for name in COUNTS}
    # What no part takes would be missed in silence. Arguments may leave out tests on purpose.
    missed = sorted(wanted.result().difference(*(names for *_, names in done))) if not extra else []
    for file, test in missed:
        print(f"WRONG  {file} {test}: has not run", flush=True)
    failed = total["failures"] + total["errors"] + len(missed)
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU, in miniature"
    if not rehearse:
        folder = ROOT / "bench" / "results" / where.removeprefix("NVIDIA ").split()[0].lower()
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "make gpu-check",
            "examples": int(os.environ.get("ZIPVL_GPU_EXAMPLES", "12")),
            "device": where,
            "gpu": environment()["gpu"],
            "versions": versions() | {"backends": zk.backends()},
            "commit": commit(),
            "passed": passed,
            "failed": failed,
            "skipped": total["skipped"],
            "why_skipped": sorted({why for _, skips, _ in done for why in skips}),
            "seconds": round(seconds, 1),
            "parts": {f"{file} {part}".strip(): found for (file, part), (found, *_) in zip(SHARDS, done, strict=True)},
        }
        (folder / "check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    verdict = "FAILED" if failed or not passed else "passed"
    print(
        f"gpu-check {verdict} on {where}: {passed} passed, {failed} failed, {total['skipped']} skipped, {seconds:.0f} s"
    )
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
