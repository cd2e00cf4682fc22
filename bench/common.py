"""What the benchmarks share: the problems that `zipvl bench` times too, and a timer that waits for the GPU.

Every problem is checked on its very inputs before anything is timed; input sets are used in turn, so that none is still
in L2 when its turn comes. Without a GPU the problems are small, and the times say little.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zipvl_adapters.cli import paged_problems, problems
from zipvl_adapters.cli.problems import Geometry, Problem
from zipvl_adapters.cli.timing import Call

import zipvl_kernels as zk

Table = dict[str, Callable[[Geometry, int], list[Problem]]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRIES = problems.GEOMETRIES if DEVICE == "cuda" else (Geometry("small", 8, 2, (768, 2880), 64),)
if DEVICE == "cpu":
    problems.DEVICE, problems.DTYPE = "cpu", torch.float32
    problems.sets_of = paged_problems.sets_of = lambda num_bytes: 2


def shapes(operator: str) -> Any:
    """The decorated benchmark runs on the operator's problems."""
    cases = [
        pytest.param(geometry, N, place, id=f"{geometry.name}-{geometry.Hq}q{geometry.Hkv}kv-{N}" + "-batch" * place)
        for geometry in GEOMETRIES
        for N in geometry.lengths
        for place in range(2 if operator == "decode_attention" else 1)
    ]
    return pytest.mark.parametrize(("geometry", "N", "place"), cases)


def ours(
    benchmark: Any, operator: str, geometry: Geometry, N: int, place: int, table: Table = problems.PROBLEMS
) -> None:
    """Check, then time, what "auto" takes."""
    problem, fn = table[operator](geometry, N)[place], getattr(zk, operator)
    problem.check(fn)
    timed(benchmark, problem, problem.call(fn))


def baseline(
    benchmark: Any, name: str, operator: str, geometry: Geometry, N: int, place: int, table: Table = problems.PROBLEMS
) -> None:
    """Time what the operator is compared with."""
    if name == problems.CUDNN and DEVICE == "cpu":
        pytest.skip("cuDNN needs a GPU")
    problem = table[operator](geometry, N)[place]
    timed(benchmark, problem, problem.baselines[name])


def timed(benchmark: Any, problem: Problem, call: Call) -> None:
    """Rounds on one input set after the other; on a GPU each waits for the device."""
    turn = iter(range(1 << 30))

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        if problem.restore:
            problem.restore()
        return (next(turn) % problem.sets,), {}

    def finished(i: int) -> None:
        call(i)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, setup=prepare, rounds=12, warmup_rounds=2)
