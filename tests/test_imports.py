"""What importing costs: torch alone, and nothing of the optional packages."""

import subprocess
import sys

import pytest

import zipvl_kernels as zk

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(code, blocked=("triton", "cupy", "transformers", "hypothesis", "numpy")):
    """Standard output of `code` in a fresh process in which importing any of `blocked` fails."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=set(blocked)) + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_needs_torch_alone():
    code = """
import torch, zipvl_kernels as zk
q, k, v = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
out, indices, counts = zk.zipvl_prefill_(q, k, v, keep_ratio=0.5)
print(int(counts), sorted(zk.backends()))
"""
    assert run(code) == "20 ['cuda', 'reference', 'triton']"


def test_reference_needs_nothing_of_ours():
    code = """
import zipvl_reference
print([name for name in sys.modules if name.startswith(("zipvl_kernels", "zipvl_adapters"))])
"""
    assert run(code) == "[]"


def test_loads_none_of_the_optional_packages():
    code = """
import torch
before = set(sys.modules)
import zipvl_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "cupy", "transformers", "hypothesis", "PIL", "rich", "typer", "matplotlib"}))
"""
    assert run(code, blocked=()) == "[]"


def test_property_checks_say_what_they_need():
    code = """
try:
    import zipvl_reference.testing
except ImportError as error:
    print(error)
"""
    assert run(code) == "zipvl_reference.testing needs hypothesis: pip install 'zipvl-kernels[test]'"


def test_exports():
    assert set(zk.__all__) <= set(dir(zk))
    assert zk.__version__


def test_backends_say_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which makes Triton available without a GPU
    found = zk.backends()
    assert found["reference"] == "available"
    for name in ("triton", "cuda"):
        if found[name] == "available":
            pytest.skip(f"the {name} backend is available here")
        assert found[name].startswith("not available: ")
