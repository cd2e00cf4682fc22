"""Every Triton kernel compiled without a GPU: it fits the shared memory of its target, and takes no more than recorded.

By default all shapes of the tables for sm_90, and the most common one for the others; with ZIPVL_COMPILE_ALL=1, which
is `make compile-check` and takes minutes, all of them for all.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")
BOUNDS = Path(__file__).with_name("compile_bounds.json")
LIMITS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # kilobytes of shared memory a block
EVERYTHING = os.environ.get("ZIPVL_COMPILE_ALL") == "1"


@functools.cache
def kernels(target):
    """What the kernels take on `target`, and the version of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *(["--all"] if EVERYTHING else []), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{target}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", LIMITS)
def test_compiles_within_the_target(target):
    found = kernels(target)["kernels"]
    assert found
    too_large = {name: x["shared"] for name, x in found.items() if x["shared"] > LIMITS[target] << 10}
    assert not too_large, f"more shared memory than {LIMITS[target]} kB"


@pytest.mark.parametrize("target", LIMITS)
def test_takes_no_more_than_recorded(target):
    """More registers, or spilled ones, are slower: look at why, and record them if that is how it has to be."""
    bounds, now = json.loads(BOUNDS.read_text(encoding="utf-8")), kernels(target)
    if bounds["triton"] != now["triton"]:
        pytest.skip(f"recorded with Triton {bounds['triton']}, and this is {now['triton']}")
    again = f"python tests/{SCRIPT.name} --record {target}"
    unknown = set(now["kernels"]) - set(bounds["kernels"])
    assert EVERYTHING or not unknown, f"not recorded yet ({again}): {sorted(unknown)}"
    more = {
        name: f"{what} {x[what]}, recorded {bounds['kernels'][name][what]}"
        for name, x in now["kernels"].items()
        for what in x
        if name in bounds["kernels"] and x[what] > bounds["kernels"][name][what]
    }
    assert not more, f"more than recorded ({again}): {more}"
