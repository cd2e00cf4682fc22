"""The documents: their Python examples run as they stand, and their links lead somewhere."""

import json
import re
import textwrap
from pathlib import Path

import pytest

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


def test_no_example_is_left_out():
    for document in documents():
        text = (ROOT / document).read_text(encoding="utf-8")
        assert len(list(blocks(text))) == text.count("```python"), f"{document}: a Python block that is not closed"
        assert document in RUN or "```python" not in text, f"{document}: has examples that no test runs"
