"""The documents: their Python examples run as they stand, and their links lead somewhere."""

import inspect
import json
import math
import re
import textwrap
from pathlib import Path

import pytest

import zipvl_kernels as zk

ROOT = Path(__file__).resolve().parents[1]
RUN = ("README.md", "docs/operators.md", "docs/integration.md")
COMPILE_ONLY = "<!-- compile only -->"
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source checkout")


def documents():
    """Markdown files of the project, relative to its root."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(text):
    """Code of every Python block, whether it is only to be compiled, and the line that it starts on."""
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        yield textwrap.dedent(match[2]), before.rstrip().endswith(COMPILE_ONLY), before.count("\n") + 2


def anchors(text):
    """The names that GitHub gives to the headings of a document."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", RUN)
def test_examples_run(document):
    names = {"__name__": "example"}
    ran = 0
    for code, compile_only, line in blocks((ROOT / document).read_text(encoding="utf-8")):
        compiled = compile("\n" * (line - 1) + code, document, "exec")
        if not compile_only:
            exec(compiled, names)
            ran += 1
    assert ran, f"{document}: expected an example that runs"


@pytest.mark.parametrize("document", documents())
def test_links_resolve(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken, f"{document}: links that lead nowhere: {broken}"


def test_the_serving_table_is_the_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"serve-demo:begin -->\n.*\n.*\n((?:\|.*\n)+)<!-- serve-demo:end", readme)[1].splitlines()
    record = json.loads((ROOT / "bench" / "results" / "demo" / "serving.json").read_text(encoding="utf-8"))
    assert rows == [
        f"| {run['mode']} | {run['most_at_once']} | {run['steps']} | {100 * run['kept']:.1f}"
        f" | {run['right']} of {run['requests']} |"
        for run in record["runs"]
    ]


def test_the_speed_table_is_the_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "bench" / "results" / "h200" / "bench.json").read_text(encoding="utf-8"))
    kept = record["settings"]["keep_ratio"]
    found = {}
    for row in record["rows"]:
        if row["operator"] == "zipvl_prefill_" and row["shape"]["kept"] == math.ceil(kept * row["shape"]["N"]):
            found.setdefault((row["heads"], row["shape"]["N"]), {})[row["provider"]] = row
    assert len(found) == 10
    for (heads, N), rows in found.items():
        dense, ours, triton, recipe, flash = (
            rows[name] for name in ("cuDNN dense", "zipvl", "zipvl, triton", "recipe in torch", "flash-attn-4")
        )
        times = f"| {heads} | {N:,} | {dense['p50_ms']:.3f} | {ours['p50_ms']:.3f} | {ours['x_dense']:.2f} |"
        line = next((line for line in text.splitlines() if line.startswith(times)), "")
        others = f"| {flash['p50_ms'] / ours['p50_ms']:.2f} | {triton['x_dense']:.2f} | {recipe['x_dense']:.2f} |"
        assert line.endswith(others), times


def recorded_rows(name, **wanted):
    rows = json.loads((ROOT / "bench" / "results" / "h200" / name).read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_tables_of_whole_models_are_the_records():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    prefills = {}
    for row in recorded_rows("model_prefill.json", batch="1"):
        prefills.setdefault((row["model"], row["length"]), {})[row["attention"]] = row
    assert len(prefills) == 5
    for (_, N), row in prefills.items():
        flash, dense, ours = (row[name] for name in ("flash", "cuDNN", "zipvl"))
        seconds = " | ".join(f"{x['seconds_p50']:.3f}" for x in (flash, dense, ours))
        peaks = " | ".join(f"{x['peak_bytes'] / 2**30:.1f}" for x in (dense, ours))
        end = f"| {N:,} | {seconds} | {ours['x_flash']:.2f} | {ours['x_cuDNN']:.2f} | {peaks} |"
        assert sum(line.endswith(end) for line in lines) == 1, end
    steps = [row for row in recorded_rows("compiled_decode.json", fused=True) if "failed" not in row]
    assert len(steps) == 16
    for row in steps:
        x_bytes = f" {row['x_bytes']:.2f} |" if row["cache"] == "zipvl" else ""
        cells = f"| {row['step_ms']['p50']:.2f} |{x_bytes} {row['tokens_per_second']:,.0f} |"
        assert sum(f"| {row['batch']}" in line and cells in line for line in lines) == 1, cells


def test_no_example_is_left_out():
    for document in documents():
        text = (ROOT / document).read_text(encoding="utf-8")
        assert len(list(blocks(text))) == text.count("```python"), f"{document}: a Python block that is not closed"
        assert document in RUN or "```python" not in text, f"{document}: has examples that no test runs"


def test_signatures_are_those_of_the_operators():
    """Every operator's, with all arguments, in their order, and their defaults."""
    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    written = {name: " ".join(arguments.split()) for name, arguments in re.findall(r"`zk\.(\w+)\(([^`]*)\)\s*->", text)}
    operators = [name for name in zk.__all__ if name != "backends"]
    assert written == {name: arguments_of(getattr(zk, name)) for name in operators}


def arguments_of(fn):
    found = []
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        found.append(name + default)
    return ", ".join(found)
