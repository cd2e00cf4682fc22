"""`compact_kv_` in Triton: every program moves a tile of rows, in place and all of them at once.

A row only ever moves towards the front. A program reads its tile, says so, and before it writes it waits for the tiles
that have to read what it overwrites: those stand before it, and have started, since tiles are drawn by ticket in order.
"""

import triton
import triton.language as tl
from torch import Tensor

from zipvl_kernels._tickets import tickets
from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense

ROWS = 64  # of a tile


def compact_kv_(
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    indices: Tensor,  # int32 [B, G, N]
    counts: Tensor,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`."""
    (B, Hkv, N, D), G = k.shape, indices.shape[1]
    if B * N == 0:
        return
    tiles = common.pieces(N, ROWS)
    programs = tiles * B * Hkv
    common.launch(
        _kernel,
        (programs,),
        (k, v, indices, counts, dense(dst_start), tickets(k.device, programs + 2)),
        (
            *k.stride()[:3],
            *v.stride()[:3],
            *indices.stride(),
            *counts.stride(),
            N,
            N.bit_length(),
            Hkv,
            G,
            tiles,
            programs,
        ),
        D=D,
        BLOCK_D=common.power_of_2(D),
        ROWS=ROWS,
        num_warps=4,
    )


@triton.jit
def _below(columns, stride, count, column, steps):  # type: ignore[no-untyped-def]
    """How many of the ascending columns are below `column`."""
    low = count * 0
    high = count
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        before = tl.load(columns + middle.to(tl.int64) * stride, mask=open, other=0) < column
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & (before == 0), middle, high)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_readers(columns, stride, count, begin, steps, read, tile, chain, chains, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Say that this tile has been read; wait for those that read rows `[begin, begin + ROWS)`, which it overwrites."""
    tl.debug_barrier()  # all threads have read before the flag says so
    tl.atomic_xchg(read + tile * chains + chain, 1, sem="release")
    low = _below(columns, stride, count, begin, steps)
    high = _below(columns, stride, count, begin + ROWS, steps)
    for other in range(low // ROWS, tl.minimum((high + ROWS - 1) // ROWS, tile)):
        flag = read + other * chains + chain
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
    tl.debug_barrier()


@triton.jit
def finish(counters, programs):  # type: ignore[no-untyped-def]
    """The last program puts the counters back."""
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == programs - 1:
        for first in range(0, programs + 2, 1024):
            at = first + tl.arange(0, 1024)
            tl.store(counters + at, tl.zeros([1024], tl.int32), mask=at < programs + 2)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    k,  # [B, Hkv, N, D]
    v,  # [B, Hkv, N, D]
    indices,  # [B, G, N]
    counts,  # [B, G]
    dst_start,  # [B] or None
    counters,  # the next ticket, how many are done, and which tiles have been read [tiles, B * Hkv]
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    indices_b,
    indices_g,
    indices_n,
    counts_b,
    counts_g,
    N,
    steps,  # of a binary search
    Hkv,
    G,
    tiles,
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    ticket = tl.atomic_add(counters, 1)
    chains = programs // tiles
    tile = ticket // chains
    chain = ticket % chains
    b = (chain // Hkv).to(tl.int64)
    h = (chain % Hkv).to(tl.int64)
    g = h % G
    columns = indices + b * indices_b + g * indices_g
    count = tl.minimum(tl.load(counts + b * counts_b + g * counts_g), N)
    if tile * ROWS < count:
        begin = tile * ROWS
        if dst_start is not None:
            begin += tl.load(dst_start + b)
        i = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)  # [D]
        here = tile * ROWS + i < count
        source = tl.load(columns + (tile * ROWS + i).to(tl.int64) * indices_n, mask=here, other=0)  # [R]
        moves = here & (source != begin + i)
        mask = moves[:, None] & (d < D)
        keys = k + b * k_b + h * k_h + d
        values = v + b * v_b + h * v_h + d
        row = source.to(tl.int64)[:, None]
        K = tl.load(keys + row * k_n, mask=mask)  # [R, D]
        V = tl.load(values + row * v_n, mask=mask)
        wait_for_readers(columns, indices_n, count, begin, steps, counters + 2, tile, chain, chains, ROWS)
        row = (begin + i).to(tl.int64)[:, None]
        tl.store(keys + row * k_n, K, mask=mask)
        tl.store(values + row * v_n, V, mask=mask)
    finish(counters, programs)
