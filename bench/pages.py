"""Operators over pages of 16 rows against one buffer, by replayed CUDA graphs: `python bench/pages.py`. Needs a GPU.

The problems of `bench/bench_*.py` over pages, each checked on its inputs before it is timed, in turn with the same
operator over one buffer. There "auto" may take another kernel than over pages, so this is what pages cost a user.
Writes bench/results/GPU/pages.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from zipvl_adapters.cli.env import commit, versions
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGE, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import GEOMETRIES
from zipvl_adapters.cli.speeds import Row, measure
from zipvl_adapters.cli.timing import ceilings

import zipvl_kernels as zk

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=PAGED_PROBLEMS, action="append", help="repeat for more (all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2880, 32768, 131072])
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/pages.json")
    args = parser.parse_args()
    name, found = torch.cuda.get_device_name(), ceilings()
    rows: list[Row] = []
    wrong: list[str] = []
    for operator in args.op or PAGED_PROBLEMS:
        for geometry in GEOMETRIES:
            for N in sorted(set(args.lengths) & set(geometry.lengths)):
                for problem in PAGED_PROBLEMS[operator](geometry, N):
                    measured, failed = measure(problem, {"pages": getattr(zk, operator)}, found)
                    rows += measured
                    wrong += failed
                    ms = {row["provider"]: row["p50_ms"] for row in measured}
                    if {"pages", ONE_BUFFER} <= set(ms):
                        where = f"{operator:18} {geometry.heads:>6} {N:7} x {problem.shape['B']}"
                        times = f"pages {ms['pages']:8.4f} ms  {ONE_BUFFER} {ms[ONE_BUFFER]:8.4f} ms"
                        print(f"{where}  {times}  {ms['pages'] / ms[ONE_BUFFER]:.2f} x", flush=True)
                    del problem
                torch.cuda.empty_cache()
    record = {
        "command": "python bench/pages.py",
        "block_size": PAGE,
        "device": name,
        "ceilings": found,
        "versions": versions(),
        "commit": commit(),
        "rows": rows,
        "failed": wrong,
    }
    folder = ROOT / "bench" / "results" / name.removeprefix("NVIDIA ").split()[0].lower()
    out = args.out or folder / "pages.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(*wrong, f"file: {out}", sep="\n")


if __name__ == "__main__":
    main()
