"""`sparse_attention` in Triton: one launch whose programs are query tiles, heaviest first, then blocks of zero rows.

A query tile covers `BLOCK_M` consecutive members of the set, so that causality is a comparison of their numbers and
only tiles on the diagonal need a mask. Queries are gathered by row and outputs scattered; rows outside the set are
zeroed by programs of their own, which find them by binary search and serve several heads at once. Keys and values are
the set's rows in order, or are gathered; with a block table each row is looked up, and the arithmetic is the same.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense, interpreting, of_each, sequence, shared_kilobytes
from zipvl_kernels._triton.pages import in_pool, stages

MAX_HEAD_DIM = 256
ZERO_ROWS, ZERO_HEADS = 64, 8  # rows outside the set are cleared in blocks of so many, for so many heads


def tiles(dtype: torch.dtype, D: int, kilobytes: int) -> tuple[int, int, int, int]:
    """`(block_m, block_n, num_warps, num_stages)`: queries and keys of a tile, warps, and tiles in flight.

    `kilobytes` of shared memory that a block may have: 227 on sm_90 and sm_100, 163 on sm_80, 99 on sm_86 and sm_120,
    64 on gfx942.
    """
    if dtype == torch.float32:  # no tensor cores at full precision
        return (32, 32, 4, 2) if D <= 64 else (32, 16, 4, 2) if D <= 128 else (16, 16, 4, 2)
    if kilobytes < 96:
        return (128, 64, 4, 1) if D <= 64 else (64, 64, 4, 1) if D <= 128 else (64, 32, 4, 1)
    if kilobytes < 160:
        return (128, 64, 8, 2) if D <= 128 else (64, 32, 8, 2)
    return (128, 128, 8, 3) if D <= 64 else (128, 64, 8, 3) if D <= 128 else (64, 64, 8, 2)


def sparse_attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    indices: Tensor,  # int32 [B, G, C]
    counts: Tensor,  # int32 [B, G]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    kv_compacted: bool = False,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,  # int32 [B], with a block table
    block_table: Tensor | None = None,  # int32 [B, max_blocks]
    layout: str = "NHD",
) -> Tensor:
    """Softmax attention of the query rows in the set over the set's columns at or before them, as `q`; 0 elsewhere.

    With `cu_seqlens` of packed `q [T, Hq, D]`, `k, v [T, Hkv, D]` and `indices [G, T]`.
    """
    config = tiles(q.dtype, q.shape[-1], shared_kilobytes(q.device))
    if block_table is not None and layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    where = cu_seqlens, max_seqlen, seqused_k, block_table
    return launch(q, k, v, indices, counts, scale, q_start, kv_compacted, *config, *where)


def launch(
    q: Tensor,
    k: Tensor,  # with a block table [num_blocks, Hkv, block_size, D]
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    kv_compacted: bool,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The operator with tiles of a given size."""
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got shape {list(q.shape)}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    T = q.shape[0]
    if cu_seqlens is None:
        out_strides = out.stride()[:3]
    else:
        out_strides = (0, out.stride(1), out.stride(0))
        q, k, v = of_each(q, cu_seqlens), of_each(k, cu_seqlens), of_each(v, cu_seqlens)
        indices = indices.expand(q.shape[0], -1, -1)
    B, Hq, M, D = q.shape
    Hkv, N = k.shape[1:3]
    G, C = indices.shape[1:]
    page = 0
    if block_table is not None:
        N, page = N * block_table.shape[1], N
        num_stages = stages(num_stages, 1 if kv_compacted else 2)
    if max_seqlen is not None:
        M = N = C = min(max_seqlen, T)
    if B == 0 or M == 0:
        return out
    most = min(C, N) if kv_compacted or page else C  # of a set
    attend = common.pieces(most, block_m) * B * Hq
    zero = common.pieces(M, ZERO_ROWS) * B * G * common.pieces(Hq // G, ZERO_HEADS)
    common.launch(
        _kernel,
        (attend + zero,),
        (q, k, v, out, indices, counts, dense(q_start), dense(cu_seqlens), dense(seqused_k), block_table),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out_strides,
            *indices.stride(),
            *counts.stride(),
            *((0, 0, 0, 0) if block_table is None else (*block_table.stride(), k.shape[0], N)),
            (D**-0.5 if scale is None else scale) * math.log2(math.e),
            attend,
            T,
            M,
            most,
            C - M,
            most.bit_length(),
            B,
            Hq,
            Hkv,
            G,
        ),
        D=D,
        BLOCK_D=max(16, common.power_of_2(D)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ZERO_ROWS=ZERO_ROWS,
        ZERO_HEADS=ZERO_HEADS,
        COMPACTED=kv_compacted,
        PAGE=page,
        UPCAST=interpreting(),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


@triton.jit
def _start(q_start, seqused_k, b, M, default_start):  # type: ignore[no-untyped-def]
    """The column of query row 0."""
    start = default_start
    if q_start is not None:
        start = tl.load(q_start + b)
    elif seqused_k is not None:
        start = tl.load(seqused_k + b) - M
    return start


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    q,  # [B, Hq, M, D]
    k,  # [B, Hkv, N, D], or [num_blocks, Hkv, PAGE, D]
    v,
    out,  # [B, Hq, M, D], dense
    indices,  # [B, G, C]
    counts,  # [B, G]
    q_start,  # [B] or None
    cu_seqlens,  # [B + 1] or None: q, k, v, out and indices are of all sequences
    seqused_k,  # [B], or None where there are no pages
    block_table,  # [B, N / PAGE] or None
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    out_b,
    out_h,
    out_m,
    indices_b,
    indices_g,
    indices_n,
    counts_b,
    counts_g,
    table_b,
    table_n,
    num_blocks,
    N,  # rows of a table
    scale,  # in powers of two
    attend,  # how many programs attend; the rest clear rows
    T,  # rows of all packed sequences
    M,
    most,  # a set's members at most
    default_start,
    steps,  # of a binary search among `most`
    B,
    Hq,
    Hkv,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ZERO_ROWS: tl.constexpr,
    ZERO_HEADS: tl.constexpr,
    COMPACTED: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; 0: there are no pages
    UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)  # [D]
    if pid >= attend:
        # Clear the rows of a block that are not in the set, for ZERO_HEADS heads that share it.
        pid -= attend
        heads = Hq // G
        shares = tl.cdiv(heads, ZERO_HEADS)
        share = pid % shares
        g = pid // shares % G
        blocks = tl.cdiv(M, ZERO_ROWS)
        b = (pid // shares // G // blocks).to(tl.int64)
        row = pid // shares // G % blocks * ZERO_ROWS + tl.arange(0, ZERO_ROWS)  # [R]
        start = _start(q_start, seqused_k, b, M, default_start)
        columns = indices + b * indices_b + g.to(tl.int64) * indices_g
        out += b * out_b
        if cu_seqlens is not None:
            begin, M = sequence(cu_seqlens, b, T, M)
            if tl.max(row, 0) - ZERO_ROWS >= M - 1:
                return
            most = M
            columns += begin * indices_n
            out += begin * out_m
        count = tl.minimum(tl.load(counts + b * counts_b + g * counts_g), most)
        low = tl.zeros([ZERO_ROWS], tl.int32)  # [R], how many members stand before the row
        high = low + count
        for _ in range(steps):
            middle = (low + high) // 2
            open = low < high
            before = tl.load(columns + middle.to(tl.int64) * indices_n, mask=open, other=0) < row + start
            low = tl.where(open & before, middle + 1, low)
            high = tl.where(open & (before == 0), middle, high)
        column = tl.load(columns + low.to(tl.int64) * indices_n, mask=low < count, other=-1)
        in_set = (low < count) & (column == row + start)  # [R]
        clear = (row < M) & (in_set == 0)
        first = (g * heads + share * ZERO_HEADS).to(tl.int64)
        nothing = tl.zeros([ZERO_ROWS, BLOCK_D], out.dtype.element_ty)
        for h in range(first, tl.minimum(first + ZERO_HEADS, (g + 1) * heads)):
            place = out + h * out_h + row.to(tl.int64)[:, None] * out_m + d  # [R, D]
            tl.store(place, nothing, mask=clear[:, None] & (d < D))
        return

    h = pid % Hq
    b = (pid // Hq % B).to(tl.int64)
    level = pid // Hq // B
    kv = h // (Hq // Hkv)
    g = kv % G
    columns = indices + b * indices_b + g.to(tl.int64) * indices_g
    q += b * q_b + h.to(tl.int64) * q_h
    k += kv.to(tl.int64) * k_h
    v += kv.to(tl.int64) * v_h
    if PAGE == 0:
        k += b * k_b
        v += b * v_b
    out += b * out_b + h.to(tl.int64) * out_h
    if cu_seqlens is not None:
        begin, M = sequence(cu_seqlens, b, T, M)
        most = M
        columns += begin * indices_n
        q += begin * q_m
        k += begin * k_n
        v += begin * v_n
        out += begin * out_m
    count = tl.minimum(tl.load(counts + b * counts_b + g * counts_g), most)
    tile = tl.cdiv(count, BLOCK_M) - 1 - level  # the last tile sees the most keys and goes first
    if tile < 0:
        return
    start = _start(q_start, seqused_k, b, M, default_start)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M], number in the set
    row = tl.load(columns + i.to(tl.int64) * indices_n, mask=i < count, other=-1) - start
    here = (i < count) & (row >= 0) & (row < M)
    if tl.max(here.to(tl.int32), 0) == 0:  # none of the tile's queries is in this chunk
        return

    Q = tl.load(q + row.to(tl.int64)[:, None] * q_m + d, mask=here[:, None] & (d < D), other=0)  # [M, D]
    if scale < 0:  # a positive scale lets the maximum be taken before scaling
        Q = (-Q.to(tl.float32)).to(Q.dtype)
    scale = tl.abs(scale)
    if UPCAST:
        Q = Q.to(tl.float32)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)  # [M], of the scores so far
    total = tl.zeros([BLOCK_M], tl.float32)  # [M], of the weights so far
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D], sum of the values so far

    seen_by_all = tile * BLOCK_M // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):  # first the tiles below the diagonal, then those on it
        begin = seen_by_all if masked else 0
        end = tl.minimum((tile + 1) * BLOCK_M, count) if masked else seen_by_all
        for first in range(begin, end, BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)  # [N]
            at = j.to(tl.int64)
            if not COMPACTED:
                if masked:
                    at = tl.load(columns + at * indices_n, mask=j < count, other=0).to(tl.int64)
                else:
                    at = tl.load(columns + at * indices_n).to(tl.int64)
                if cu_seqlens is not None:  # sets of other bounds may name rows that this sequence has not
                    at = tl.minimum(tl.maximum(at, 0), M - 1)
            if PAGE == 0:
                k_at = k + at[None, :] * k_n + d[:, None]  # [D, N]
                v_at = v + at[:, None] * v_n + d  # [N, D]
            else:
                column = tl.minimum(tl.maximum(at, 0), N - 1).to(tl.int32)
                page, at = in_pool(block_table + b * table_b, column, j < count, table_n, num_blocks, PAGE)
                k_at = k + (page * k_b + at * k_n)[None, :] + d[:, None]
                v_at = v + (page * v_b + at * v_n)[:, None] + d
            if masked:
                K = tl.load(k_at, mask=(j < count) & (d < D)[:, None], other=0)
                V = tl.load(v_at, mask=(j < count)[:, None] & (d < D), other=0)
            elif BLOCK_D == D:
                K = tl.load(k_at)
                V = tl.load(v_at)
            else:
                K = tl.load(k_at, mask=(d < D)[:, None], other=0)
                V = tl.load(v_at, mask=d < D, other=0)
            if UPCAST:
                K, V = K.to(tl.float32), V.to(tl.float32)
            scores = tl.dot(Q, K, input_precision="ieee")  # [M, N]
            if masked:
                scores = tl.where((j[None, :] <= i[:, None]) & (j < count), scores * scale, -float("inf"))
                above = tl.maximum(largest, tl.max(scores, 1))
                weights = tl.exp2(scores - above[:, None])
            else:
                above = tl.maximum(largest, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - above[:, None])
            shrink = tl.exp2(largest - above)
            total = total * shrink + tl.sum(weights, 1)
            weighted = weighted * shrink[:, None]
            weighted = tl.dot(weights.to(V.dtype), V, weighted, input_precision="ieee")
            largest = above

    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    place = out + row.to(tl.int64)[:, None] * out_m + d
    tl.store(place, result, mask=here[:, None] & (d < D))
