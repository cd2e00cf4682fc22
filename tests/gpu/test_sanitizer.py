"""compute-sanitizer over the kernels: stray accesses of all of them, races in shared memory of those that have any."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import OPERATORS, REAL

SCRIPT = Path(__file__).parent / "sanitized.py"
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run(*command):
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUPY_ACCELERATORS": ""}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=400)


@pytest.mark.skipif(not REAL or TOOL is None, reason="needs a GPU and compute-sanitizer")
@pytest.mark.parametrize(
    ("tool", "operators"),
    [
        ("memcheck", OPERATORS[1:3]),
        ("memcheck", (*OPERATORS[3:6], "compact_paged_kv_")),
        ("memcheck", ("packed",)),
        ("racecheck", ("select_tokens", "compact_kv_", "compact_paged_kv_")),
    ],
    ids=["memcheck-scores", "memcheck-attention", "memcheck-packed", "racecheck"],
)
def test_nothing_found(tool, operators):
    plain = run(sys.executable, SCRIPT, *operators)  # compiles what the sanitizer would slow down
    assert plain.returncode == 0, plain.stdout + plain.stderr
    done = run(TOOL, "--tool", tool, "--error-exitcode", 99, sys.executable, SCRIPT, *operators)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert done.returncode == 0, said[-4000:]
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said, said[-4000:]


@pytest.mark.skipif(REAL, reason="a rehearsal for machines without a GPU")
def test_the_script_runs():
    done = run(sys.executable, SCRIPT, *OPERATORS[1:6], "compact_paged_kv_", "packed")
    assert done.returncode == 0, done.stdout + done.stderr
