"""`compact_kv_` in Triton: every program moves a tile of rows, in place and all of them at once.

A row only ever moves towards the front. A program reads its tile, says so, and before it writes it waits for the tiles
that have to read what it overwrites: those stand before it, and have started, since tiles are drawn by ticket in order.
"""

import triton
import triton.language as tl
from torch import Tensor
from zipvl_reference.compact_kv import Layers, layers

from zipvl_kernels._tickets import tickets
from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense

ROWS = 64  # of a tile


def compact_kv_(
    k: Layers,  # [B, Hkv, N, D]; packed: [T, Hkv, D]
    v: Layers,  # the same
    indices: Layers,  # int32 [B, G, N]; packed: [G, T]
    counts: Layers,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]: packed
    max_seqlen: int | None = None,
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`; of every layer, one after the other."""
    for keys, values, sets, sizes in layers(k, v, indices, counts):
        _launch(keys, values, sets, sizes, dst_start, cu_seqlens, max_seqlen)


def _launch(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    dst_start: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """One layer."""
    B, G = counts.shape
    if cu_seqlens is None:
        _, Hkv, N, D = k.shape
        strides = *k.stride()[:3], *v.stride()[:3], *indices.stride()
    else:  # as a batch, all of whose sequences begin with row 0: `cu_seqlens` has what comes before
        N, Hkv, D = k.shape
        strides = 0, k.stride(1), k.stride(0), 0, v.stride(1), v.stride(0), 0, *indices.stride()
    longest = N if max_seqlen is None else min(max_seqlen, N)
    if B * longest == 0:
        return
    tiles = common.pieces(longest, ROWS)
    programs = tiles * B * Hkv
    common.launch(
        _kernel,
        (programs,),
        (k, v, indices, counts, dense(dst_start), dense(cu_seqlens), tickets(k.device, programs + 2)),
        (*strides, *counts.stride(), N, longest, longest.bit_length(), Hkv, G, tiles, programs),
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
    k,  # [B, Hkv, N, D]; packed: [N, Hkv, D]
    v,  # the same
    indices,  # [B, G, N]; packed: [G, N]
    counts,  # [B, G]
    dst_start,  # [B] or None
    cu_seqlens,  # [B + 1]: packed, the first row of each sequence and the end; or None
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
    longest,
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
    first = b * 0
    length = longest
    if cu_seqlens is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), N).to(tl.int64)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), 0), N)
        length = tl.minimum(end - first.to(tl.int32), longest)
    columns = indices + b * indices_b + g * indices_g + first * indices_n
    count = tl.minimum(tl.load(counts + b * counts_b + g * counts_g), length)
    if tile * ROWS < count:
        begin = tile * ROWS
        if dst_start is not None:
            begin += tl.load(dst_start + b)
        i = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)  # [D]
        here = tile * ROWS + i < count
        source = tl.load(columns + (tile * ROWS + i).to(tl.int64) * indices_n, mask=here, other=0)  # [R]
        moves = here & (source > begin + i) & (source < length) & (begin + i >= 0)
        mask = moves[:, None] & (d < D)
        keys = k + b * k_b + h * k_h + first * k_n + d
        values = v + b * v_b + h * v_h + first * v_n + d
        row = source.to(tl.int64)[:, None]
        K = tl.load(keys + row * k_n, mask=mask)  # [R, D]
        V = tl.load(values + row * v_n, mask=mask)
        wait_for_readers(columns, indices_n, count, begin, steps, counters + 2, tile, chain, chains, ROWS)
        row = (begin + i).to(tl.int64)[:, None]
        tl.store(keys + row * k_n, K, mask=mask)
        tl.store(values + row * v_n, V, mask=mask)
    finish(counters, programs)
