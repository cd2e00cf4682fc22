"""What is timed over a pool of pages, as in `problems.py` over one buffer a sequence: pages of 16 rows, in any order.

All are compared with the same operator over one buffer, which is what pages cost. Scores and sparse attention are those
of a chunk: the last queries of a prompt whose other tokens are in the pages already.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor

import zipvl_kernels as zk
from zipvl_adapters.cli import problems
from zipvl_adapters.cli.exact import SAMPLED_ROWS, assert_within, attended, rounding_of, scores
from zipvl_adapters.cli.problems import CUDNN, KEEP_RATIO, RECIPE, Fn, Geometry, Problem, cudnn
from zipvl_adapters.cli.timing import sets_of

PAGE, CHUNK = 16, 2048
ONE_BUFFER = "one buffer"


def compact_paged_problem(geometry: Geometry, N: int) -> Problem:
    """Moving the kept rows to the front of a sequence's pages. Run again it moves as many, as `compact_kv_` does."""
    Hkv, D, p = geometry.Hkv, geometry.D, ceil(KEEP_RATIO * N)
    sets = sets_of(4 * N * D * Hkv)
    inputs: list[tuple[Any, ...]] = [(*_pools(1, geometry, N), *problems.random_set(N, p)) for _ in range(sets)]
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
    inputs: list[tuple[Any, ...]] = [(problems.draw(B, Hq, 1, D), *_pools(B, geometry, N)) for _ in range(sets)]
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
            exact, plain = (attended(q[b], k[b], v[b], last, t) for t in (torch.float64, problems.DTYPE))
            rounding = rounding_of(q, k) * float(v.abs().max())
            assert_within("out", out[b], exact, plain, rounding, problems.DTYPE)

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


def paged_score_problem(geometry: Geometry, N: int) -> Problem:
    """The scores of `N` tokens by the probes of a chunk. Over one buffer "auto" may take another kernel than here."""
    Hq, Hkv, D, M = geometry.Hq, geometry.Hkv, geometry.D, min(CHUNK, N)
    sets = sets_of(2 * D * (M * Hq + N * Hkv))
    inputs: list[tuple[Any, ...]] = [(problems.draw(1, Hq, M, D), *_pools(1, geometry, N)) for _ in range(sets)]
    buffers = [_gathered(k, table)[:, :, :N] for _, k, _, table in inputs]
    used = torch.tensor([N], dtype=torch.int32, device=problems.DEVICE)
    rows = zk.probe_rows(M, device=problems.DEVICE)

    def call(fn: Fn) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            q, k, _, table = inputs[i]
            return fn(q, k, rows, seqused_k=used, block_table=table)

        return run

    def check(fn: Fn) -> None:
        q = torch.nn.functional.pad(inputs[0][0], (0, 0, N - M, 0))  # as the queries of the whole prompt
        exact, plain = (scores(q, buffers[0], rows + N - M, t) for t in (torch.float64, problems.DTYPE))
        for name, got, e, p in zip(("accumulated", "normalized"), call(fn)(0), exact, plain, strict=True):
            assert not got[..., N:].any(), f"{name}: expected 0 in columns that are not used"
            rounding = rounding_of(q, buffers[0]) * float(e.max())
            assert_within(name, got[..., :N], e, p, rounding, torch.float32)

    return Problem(
        "score_tokens",
        geometry,
        {"B": 1, "Hq": Hq, "Hkv": Hkv, "M": M, "N": N, "D": D, "P": len(rows), "block_size": PAGE},
        sets,
        call,
        check,
        baselines={ONE_BUFFER: lambda i: zk.score_tokens(inputs[i][0], buffers[i], rows)},
        num_bytes=2 * Hkv * N * D + 2 * Hq * len(rows) * D + 8 * N,
        flops=2 * 2 * Hq * len(rows) * N * D,
    )


def paged_sparse_problem(geometry: Geometry, N: int, compacted: bool) -> Problem:
    """A chunk's attention among the kept of `N` tokens; every chunk keeps some. Keys are compacted or read in place."""
    Hq, Hkv, D, M, p = geometry.Hq, geometry.Hkv, geometry.D, min(CHUNK, N), ceil(KEEP_RATIO * N)
    sets = sets_of(2 * D * (2 * M * Hq + 2 * N * Hkv))
    inputs: list[tuple[Any, ...]] = [
        (problems.draw(1, Hq, M, D), *_pools(1, geometry, N), *problems.random_set(N, p)) for _ in range(sets)
    ]
    used = torch.tensor([N], dtype=torch.int32, device=problems.DEVICE)
    _, *pools, first_table, members, _ = inputs[0]
    asked = int((members >= N - M).sum())  # of the chunk's rows
    kept = members[0, 0, :p].long()
    k_kept, v_kept = (_gathered(x, first_table)[0, :, kept] for x in pools)  # before they move
    if compacted:
        for _, k, v, table, indices, counts in inputs:
            zk.compact_paged_kv_(k, v, indices, counts, table, used)
    buffers: list[Any] = [[_gathered(x, table)[:, :, :N] for x in (k, v)] for _, k, v, table, *_ in inputs]

    def call(fn: Fn) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            q, k, v, table, indices, counts = inputs[i]
            return fn(q, k, v, indices, counts, kv_compacted=compacted, seqused_k=used, block_table=table)

        return run

    def check(fn: Fn) -> None:
        q, k, v = inputs[0][0], k_kept, v_kept
        out = call(fn)(0)
        at = torch.arange(p - asked, p, device=problems.DEVICE)  # which members stand in the chunk
        at = at[torch.randperm(asked, device=problems.DEVICE)[:SAMPLED_ROWS]]
        at[0], at[-1] = p - asked, p - 1
        rows = kept[at] - (N - M)
        exact, plain = (attended(q[0, :, rows], k, v, at, t) for t in (torch.float64, problems.DTYPE))
        rounding = rounding_of(q, k[None]) * float(v.abs().max())
        assert_within("out", out[0, :, rows], exact, plain, rounding, problems.DTYPE)
        dropped = torch.ones(M, dtype=torch.bool, device=problems.DEVICE)
        dropped[kept[p - asked :] - (N - M)] = False
        assert bool((out[0, :, dropped] == 0).all()), "out: expected exactly 0 in rows that are not kept"

    shape = {"B": 1, "Hq": Hq, "Hkv": Hkv, "M": M, "N": N, "D": D, "kept": p, "block_size": PAGE}
    return Problem(
        "sparse_attention",
        geometry,
        shape | {"kv_compacted": compacted},
        sets,
        call,
        check,
        baselines={
            ONE_BUFFER: lambda i: zk.sparse_attention(
                inputs[i][0], *buffers[i], *inputs[i][4:], kv_compacted=compacted
            ),
        },
        flops=problems.attention_flops(Hq, p, D) - problems.attention_flops(Hq, p - asked, D),
    )


PAGED_PROBLEMS: dict[str, Callable[[Geometry, int], list[Problem]]] = {
    "compact_paged_kv_": lambda geometry, N: [compact_paged_problem(geometry, N)],
    "score_tokens": lambda geometry, N: [paged_score_problem(geometry, N)],
    "sparse_attention": lambda geometry, N: [paged_sparse_problem(geometry, N, x) for x in (False, True)],
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
