"""`probe_rows` in Triton, one launch: every program draws its rows, and counts how many drawn rows are below each."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zipvl_reference.probe_rows import ROUNDS, halves, seed_key, sizes

from zipvl_kernels._triton import common

BLOCK = 64


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`."""
    recent, random = sizes(num_rows, num_recent, num_random)
    rows = torch.empty(recent + random, dtype=torch.int32, device=device)
    if rows.numel():
        rest = num_rows - recent
        grid = (common.pieces(random, BLOCK) + common.pieces(recent, BLOCK),)
        common.launch(
            _kernel, grid, (rows,), (*halves(rest), rest, random, recent, seed_key(seed)), ROUNDS=ROUNDS, BLOCK=BLOCK
        )
    return rows


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """As in the reference: a bijection of 32-bit numbers."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _sum_modulo(x, y, m):  # type: ignore[no-untyped-def]
    """`(x + y) % m` for `x < m`, where the sum may not fit 32 bits."""
    x = x + y % m
    return tl.where(x < m, x, x - m)


@triton.jit  # type: ignore[untyped-decorator]
def _through(x, a, b, key, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One pass of the network, in uint32, whose division takes a fraction of int64's time."""
    left, right = x // b, x % b
    for i in tl.static_range(0, ROUNDS, 2):
        left = _sum_modulo(left, _mix(right ^ _mix(key + i)), a)
        right = _sum_modulo(right, _mix(left ^ _mix(key + i + 1)), b)
    return left * b + right


@triton.jit  # type: ignore[untyped-decorator]
def _permuted(x, a, b, walks, n, key, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As in the reference: a permutation of `[0, n)`. Few values need a second pass, hardly any a third."""
    x = _through(x, a, b, key, ROUNDS)
    walk = 0
    while (walk < walks) & (tl.max((x >= n).to(tl.int32), 0) > 0):
        x = tl.where(x < n, x, _through(x, a, b, key, ROUNDS))
        walk += 1
    return x


@triton.jit(do_not_specialize=["a", "b", "walks", "n", "random", "recent", "key"])  # type: ignore[untyped-decorator]
def _kernel(rows, a, b, walks, n, random, recent, key, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    drawing = tl.cdiv(random, BLOCK)
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if block >= drawing:
        i += (block - drawing) * BLOCK
        tl.store(rows + random + i, n + i, mask=i < recent)
        return
    i += block * BLOCK
    a32, b32, n32, key32 = a.to(tl.uint32), b.to(tl.uint32), n.to(tl.uint32), key.to(tl.uint32)
    mine = _permuted(i.to(tl.uint32), a32, b32, walks, n32, key32, ROUNDS)
    below = tl.zeros([BLOCK], tl.int32)
    for other in range(drawing):
        j = other * BLOCK + tl.arange(0, BLOCK)
        x = mine
        if other != block:
            x = _permuted(j.to(tl.uint32), a32, b32, walks, n32, key32, ROUNDS)
        below += tl.sum(((x[None, :] < mine[:, None]) & (j < random)).to(tl.int32), 1)
    tl.store(rows + below, mine.to(tl.int32), mask=i < random)
