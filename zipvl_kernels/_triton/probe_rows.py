"""`probe_rows` in Triton, one launch: every program draws its rows, and counts how many drawn rows are below each."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zipvl_reference.probe_rows import ROUNDS, halves, seed_key, sizes

from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense, sequence

BLOCK = 64
MOST_ROWS = 2**31 - 1


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`.

    With `cu_seqlens`, those of each sequence of at most `num_rows` rows, then -1, `[B, P]`.
    """
    recent, random = sizes(num_rows, num_recent, num_random)
    P, blocks = recent + random, common.pieces(random, BLOCK) + common.pieces(recent, BLOCK)
    shape, grid = ((P,), (blocks,)) if cu_seqlens is None else ((len(cu_seqlens) - 1, P), (blocks, len(cu_seqlens) - 1))
    rows = torch.empty(shape, dtype=torch.int32, device=device)
    if rows.numel():
        rest = num_rows - recent
        numbers = (*halves(rest), rest, random, recent, seed_key(seed))
        common.launch(
            _kernel, grid, (rows, dense(cu_seqlens)), numbers, MOST_ROWS=MOST_ROWS, ROUNDS=ROUNDS, BLOCK=BLOCK
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


@triton.jit
def _halves(n):  # type: ignore[no-untyped-def]
    """As in the reference, for `n` of at least 1."""
    root = tl.sqrt((n - 1).to(tl.float32)).to(tl.int64)  # at most one off
    root -= (root * root > n - 1).to(tl.int64)
    root += ((root + 1) * (root + 1) <= n - 1).to(tl.int64)
    b = root + 1
    a = (n + b - 1) // b
    return a, b, tl.minimum(a * b - n, 16)


@triton.jit(do_not_specialize=["a", "b", "walks", "n", "random", "recent", "key"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    rows,  # [P], or [B, P]
    cu_seqlens,  # [B + 1] or None
    a,
    b,
    walks,
    n,
    random,
    recent,
    key,
    MOST_ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    drawing = tl.cdiv(random, BLOCK)
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if cu_seqlens is not None:  # fewer rows, of which the last come first
        P = random + recent
        rows += tl.program_id(1).to(tl.int64) * P
        _, length = sequence(cu_seqlens, tl.program_id(1), MOST_ROWS, n + recent)
        recent = tl.minimum(length, recent)
        n = length - recent
        random = tl.minimum(n, random)
        tl.store(rows + block * BLOCK + i, -1, mask=(block * BLOCK + i >= random + recent) & (block * BLOCK + i < P))
        if (block < drawing) & (block * BLOCK >= random):
            return
        a, b, walks = _halves(tl.maximum(n, 1).to(tl.int64))
    if block >= drawing:
        i += (block - drawing) * BLOCK
        tl.store(rows + random + i, n + i, mask=i < recent)
        return
    i += block * BLOCK
    a32, b32, n32, key32 = a.to(tl.uint32), b.to(tl.uint32), n.to(tl.uint32), key.to(tl.uint32)
    mine = _permuted(i.to(tl.uint32), a32, b32, walks, n32, key32, ROUNDS)
    below = tl.zeros([BLOCK], tl.int32)
    for other in range(tl.cdiv(random, BLOCK)):
        j = other * BLOCK + tl.arange(0, BLOCK)
        x = mine
        if other != block:
            x = _permuted(j.to(tl.uint32), a32, b32, walks, n32, key32, ROUNDS)
        below += tl.sum(((x[None, :] < mine[:, None]) & (j < random)).to(tl.int32), 1)
    tl.store(rows + below, mine.to(tl.int32), mask=i < random)
