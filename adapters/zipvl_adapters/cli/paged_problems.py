"""What is timed over a pool of pages, as in `problems.py` over one buffer a sequence: pages of 16 rows, in any order.

Both are compared with the same operator over one buffer, which is what pages cost.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor

import zipvl_kernels as zk
from zipvl_adapters.cli import problems
from zipvl_adapters.cli.problems import CUDNN, KEEP_RATIO, RECIPE, Fn, Geometry, Problem, cudnn
from zipvl_adapters.cli.timing import sets_of

PAGE = 16
ONE_BUFFER = "one buffer"


def compact_paged_problem(geometry: Geometry, N: int) -> Problem:
    """Moving the kept rows to the front of a sequence's pages. Run again it moves as many, as `compact_kv_` does."""
    Hkv, D, p = geometry.Hkv, geometry.D, ceil(KEEP_RATIO * N)
    sets = sets_of(4 * N * D * Hkv)
    inputs: list[tuple[Any, ...]] = [(*_pools(1, geometry, N), *problems._random_set(N, p)) for _ in range(sets)]
    used = torch.tensor([N], dtype=torch.int32, device=problems.DEVICE)
    kept = [indices[0, 0, :p].long() for *_, indices, _ in inputs]
    # Row numbers in the whole pool, and a buffer of each sequence's own.
    rows = [
        table[0, at // PAGE].long() * PAGE + at % PAGE for (_, _, table, _, _), at in zip(inputs, kept, strict=True)
    ]
    buffers: list[Any] = [[_gathered(x, table)[:, :, :N] for x in (k, v)] for k, v, table, _, _ in inputs]

    def call(fn: Fn) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            k, v, table, indices, counts = inputs[i]
            return fn(k, v, indices, counts, table, used)

        return run

    def check(fn: Fn) -> None:
        k, v, table, indices, counts = inputs[0]
        moved = k.clone(), v.clone()
        seqused, freed = fn(*moved, indices, counts, table, used)
        pages = ceil(N / PAGE) - ceil(p / PAGE)
        assert (seqused.tolist(), freed.tolist()) == ([p], [pages]), (
            f"seqused, freed: expected {[p]} and {[pages]}, got {seqused.tolist()} and {freed.tolist()}"
        )
        for name, now, old in (("k_cache", moved[0], k), ("v_cache", moved[1], v)):
            wanted = _gathered(old, table)[:, :, kept[0]]
            assert torch.equal(_gathered(now, table)[:, :, :p], wanted), (
                f"{name}: expected the rows of the set in order"
            )

    return Problem(
        "compact_paged_kv_",
        geometry,
        {"B": 1, "Hkv": Hkv, "N": N, "D": D, "kept": p, "block_size": PAGE},
        sets,
        call,
        check,
        baselines={
            RECIPE: lambda i: [x.flatten(0, 1).index_select(0, rows[i]) for x in inputs[i][:2]],
            ONE_BUFFER: lambda i: zk.compact_kv_(*buffers[i], *inputs[i][3:]),
        },
        num_bytes=2 * 2 * 2 * Hkv * p * D + 4 * p,
    )


def paged_decode_problem(geometry: Geometry, N: int, B: int = 1) -> Problem:
    """One new row over pages with `N` used rows a sequence; dense is cuDNN's over one buffer."""
    Hq, Hkv, D = geometry.Hq, geometry.Hkv, geometry.D
    sets = sets_of(4 * B * N * D * Hkv)
    inputs: list[tuple[Any, ...]] = [(problems._draw(B, Hq, 1, D), *_pools(B, geometry, N)) for _ in range(sets)]
    buffers: list[Any] = [[_gathered(x, table)[:, :, :N] for x in (k, v)] for _, k, v, table in inputs]
    used = torch.full((B,), N, dtype=torch.int32, device=problems.DEVICE)

    def call(fn: Fn) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            q, k, v, table = inputs[i]
            return fn(q, k, v, used, block_table=table)

        return run

    def check(fn: Fn) -> None:
        (q, *_), (k, v), last = inputs[0], buffers[0], torch.tensor([N - 1], device=problems.DEVICE)
        out = call(fn)(0)
        for b in range(B):
            exact, plain = (problems._attended(q[b], k[b], v[b], last, t) for t in (torch.float64, problems.DTYPE))
            rounding = problems._rounding(q, k) * float(v.abs().max())
            problems._assert_within("out", out[b], exact, plain, rounding, problems.DTYPE)

    return Problem(
        "decode_attention",
        geometry,
        {"B": B, "Hq": Hq, "Hkv": Hkv, "M": 1, "N": N, "D": D, "block_size": PAGE},
        sets,
        call,
        check,
        CUDNN,
        {
            CUDNN: lambda i: cudnn(inputs[i][0], *buffers[i], causal=False),
            ONE_BUFFER: lambda i: zk.decode_attention(inputs[i][0], buffers[i][0], buffers[i][1], used),
        },
        num_bytes=4 * B * Hkv * N * D + 4 * B * Hq * D,
    )


PAGED_PROBLEMS: dict[str, Callable[[Geometry, int], list[Problem]]] = {
    "compact_paged_kv_": lambda geometry, N: [compact_paged_problem(geometry, N)],
    "decode_attention": lambda geometry, N: [paged_decode_problem(geometry, N, B) for B in (1, 8)],
}


def _pools(B: int, geometry: Geometry, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[num_blocks, PAGE, Hkv, D]`, and the block table."""
    blocks = ceil(N / PAGE)
    k, v = (
        torch.randn(B * blocks, PAGE, geometry.Hkv, geometry.D, dtype=problems.DTYPE, device=problems.DEVICE)
        for _ in range(2)
    )
    return k, v, torch.randperm(B * blocks, device=problems.DEVICE).int().view(B, blocks)


def _gathered(pool: Tensor, table: Tensor) -> Tensor:
    """The pages of each sequence in a row, `[B, Hkv, rows, D]`: a view of memory `[B, rows, Hkv, D]`."""
    return pool[table.long()].flatten(1, 2).transpose(1, 2)
