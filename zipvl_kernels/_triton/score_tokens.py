"""`score_tokens` in Triton: two launches over K, and no P x N matrix.

The first computes the log-sum-exp of each probe's scores over a split of the columns. The second knows all of them,
hence weights at once: it walks a span of columns for a few heads, keys as rows of the product so that a column's sum
stays within a row of threads. The last program of a span to finish adds what the others found, in fixed order. In fp32
the largest score and the sum of weights relative to it stay apart: rounding of their logarithm, which grows with the
scores, would be the largest error there.
With a block table each row of K is looked up in its page, and the arithmetic is the same.
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
MAX_SPLITS = 32  # of the columns, in the first launch
MAX_PARTS = 10  # of a group's heads, in the second launch: each takes 4 bytes a column
TOGETHER = tl.constexpr(8)  # splits whose sums are read at a time
SHORT, FEW = 8192, 264  # so many programs at most for a sequence of so many columns


def tiles(dtype: torch.dtype, D: int) -> tuple[int, int, int, int]:
    """`(block_p, block_n, num_warps, num_stages)`: probes and columns of a tile, warps, and tiles in flight."""
    if dtype == torch.float32:  # no tensor cores at full precision
        return (32, 32, 4, 2) if D <= 64 else (32, 16, 4, 2)
    return (128, 64, 4, 3) if D <= 128 else (64, 64, 4, 2)


def programs(N: int) -> tuple[int, int]:
    """About how many programs for one sequence in each launch: two a multiprocessor, or some rounds of that."""
    return (FEW, FEW) if N <= SHORT else (1056, 528)


def score_tokens(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    probe_rows: Tensor,  # int32 [P] or [B, P]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    pool: str = "layer",
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,  # int32 [B, max_blocks]
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """Column sums of the probes' causal softmax, and their mean over the heads and probes that see it, `[B, G, N]`.

    With `cu_seqlens` of packed `q [T, Hq, D]` and `k [T, Hkv, D]`, `[G, T]`.
    """
    if block_table is not None and layout == "NHD":
        k = k.transpose(1, 2)
    N = k.shape[-2] if max_seqlen is None else min(max_seqlen, k.shape[0])
    if block_table is not None:
        N *= block_table.shape[1]
    config = (*tiles(q.dtype, q.shape[-1]), *programs(N))
    where = cu_seqlens, max_seqlen, block_table
    return launch(q, k, probe_rows, scale, q_start, leftpad_k, seqused_k, pool, *config, *where)


def launch(
    q: Tensor,
    k: Tensor,  # with a block table [num_blocks, Hkv, block_size, D]
    probe_rows: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    block_p: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    row_programs: int,
    column_programs: int,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator with tiles of a given size, and about so many programs a sequence in each launch."""
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got shape {list(q.shape)}")
    if cu_seqlens is not None:
        q, k = of_each(q, cu_seqlens), of_each(k, cu_seqlens)
    B, Hq, M, D = q.shape
    Hkv, T = k.shape[1:3]
    page, P = 0, probe_rows.shape[-1]
    if block_table is not None:
        T, page = T * block_table.shape[1], T
        num_stages = stages(num_stages, 1) if shared_kilobytes(q.device) > 64 else 1
    N = T
    if max_seqlen is not None:
        M = N = min(max_seqlen, T)
    G = 1 if pool == "layer" else Hkv
    scores = (B, G, T) if cu_seqlens is None else (G, T)
    accumulated = torch.empty(scores, dtype=torch.float32, device=q.device)
    normalized = torch.empty_like(accumulated)
    if B == 0 or M == 0 or N == 0 or P == 0:
        return accumulated.zero_(), normalized.zero_()
    # How the work is cut depends on the shape of one sequence alone, so that its bits do not depend on the batch. That
    # of packed sequences is known on the device; here are the most pieces that one may have.
    heads = Hq // G
    part = next(n for n in range(common.pieces(heads, MAX_PARTS), heads + 1) if heads % n == 0)  # heads of a program
    parts = heads // part
    blocks, used_blocks = common.pieces(P, block_p), common.pieces(min(P, M), block_p)
    row_shares = [max(1, min(MAX_SPLITS, row_programs // (Hq * n))) for n in range(1, used_blocks + 1)]
    column_shares = max(1, column_programs // (G * parts))
    if cu_seqlens is None:
        split, span = _share(N, row_shares[-1], block_n), _share(N, column_shares, block_n)
        splits, spans = common.pieces(N, split), common.pieces(N, span)
    else:
        split, span = row_programs, column_programs
        longest = [*range(block_p, used_blocks * block_p, block_p), N]  # with so many blocks of probes
        splits = max(min(n, common.pieces(rows, block_n)) for n, rows in zip(row_shares, longest, strict=True))
        spans = min(column_shares, common.pieces(N, block_n))

    partial = accumulated if parts == 1 else torch.empty((*scores, parts), dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    found = torch.empty((1 + exact, B, Hq, splits, P), dtype=torch.float32, device=q.device)
    half = B * Hq * splits * P  # of `found`, where it has two
    arrived = torch.empty((B, G, spans), dtype=torch.int32, device=q.device)
    rows_b = 0 if probe_rows.dim() == 1 else probe_rows.stride(0)
    tensors = (
        q,
        k,
        probe_rows,
        dense(q_start),
        dense(leftpad_k),
        dense(seqused_k),
        dense(cu_seqlens),
        block_table,
        found,
        arrived,
    )
    numbers = (
        *q.stride()[:3],
        *k.stride()[:3],
        rows_b,
        probe_rows.stride(-1),
        *((0, 0, 0) if block_table is None else (*block_table.stride(), k.shape[0])),
        (D**-0.5 if scale is None else scale) * math.log2(math.e) or 1e-30,  # times -inf, 0 would be NaN
        T,
        M,
        N,
        P,
        Hq,
        Hq // Hkv,
    )
    shape = {
        "D": D,
        "BLOCK_D": max(16, common.power_of_2(D)),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "PAGE": page,
        "MAX_SPLITS": MAX_SPLITS,
        "SHORT": SHORT,
        "FEW": FEW,
        "EXACT": exact,
        "UPCAST": interpreting(),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    grid = B * Hq * blocks * splits
    counters = common.power_of_2(common.pieces(arrived.numel(), grid))
    common.launch(
        _row_sums,
        (grid,),
        tensors,
        (*numbers, split, splits, arrived.numel(), half),
        COUNTERS=counters,
        **shape,
    )
    common.launch(
        _column_sums,
        (B * G * parts * spans,),
        (*tensors, partial, accumulated, normalized),
        (*numbers, splits, span, spans, 0 if cu_seqlens is not None else G * N, half, G, part, parts),
        **shape,
    )
    return accumulated, normalized


def _share(N: int, shares: int, block_n: int) -> int:
    """Columns of each of about so many shares: whole tiles."""
    return -(-N // (shares * block_n)) * block_n


@triton.jit  # type: ignore[untyped-decorator]
def _pieces(N, programs, units, most, BLOCK_N: tl.constexpr, SHORT: tl.constexpr, FEW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of each piece of a packed sequence, as the host cuts one alone: `units` work on a piece, of `most`."""
    programs = tl.where(N <= SHORT, tl.minimum(programs, FEW), programs)
    shares = tl.maximum(tl.minimum(programs // units, most), 1)
    return tl.cdiv(N, shares * BLOCK_N) * BLOCK_N


@triton.jit  # type: ignore[untyped-decorator]
def _probes(  # type: ignore[no-untyped-def]
    rows, q_start, leftpad_k, seqused_k, b, number, rows_b, rows_p, M, N, P, PAGE: tl.constexpr
):
    """For probes of the given numbers: their rows, the last column that each sees (-1: none), and the first valid."""
    first = 0
    if leftpad_k is not None:
        first = tl.maximum(tl.load(leftpad_k + b), 0)
    end = N
    if seqused_k is not None:
        end = tl.minimum(tl.load(seqused_k + b), N)
    start = N - M
    if PAGE > 0:  # the last query row stands at the last used row
        start = end - M
    if q_start is not None:
        start = tl.load(q_start + b)
    row = tl.load(rows + b * rows_b + number.to(tl.int64) * rows_p, mask=number < P, other=-1)
    at = row + start
    at = tl.where((row >= 0) & (row < M) & (at >= first) & (at < end), at, -1)
    return row, at, first


@triton.jit  # type: ignore[untyped-decorator]
def _queries(  # type: ignore[no-untyped-def]
    q, row, at, q_m, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """The probes' queries [P, D], 0 for a probe that sees nothing; negative for a negative scale."""
    d = tl.arange(0, BLOCK_D)
    Q = tl.load(q + row.to(tl.int64)[:, None] * q_m + d, mask=(at >= 0)[:, None] & (d < D), other=0)
    if scale < 0:  # a positive scale lets the maximum be taken before scaling
        Q = (-Q.to(tl.float32)).to(Q.dtype)
    if UPCAST:
        Q = Q.to(tl.float32)
    return Q


@triton.jit  # type: ignore[untyped-decorator]
def _row_sums(  # type: ignore[no-untyped-def]
    q,  # [B, Hq, M, D]
    k,  # [B, Hkv, N, D], or [num_blocks, Hkv, PAGE, D]
    rows,  # [P] or [B, P]
    q_start,  # [B] or None
    leftpad_k,  # [B] or None
    seqused_k,  # [B] or None
    cu_seqlens,  # [B + 1] or None: q, k and scores are of all sequences
    block_table,  # [B, N / PAGE] or None
    found,  # [B, Hq, splits, P], written: log2 of the sum of exp2 of a probe's scores over a split; EXACT: [2, ...]
    arrived,  # [B, G, spans], cleared for the next launch
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    rows_b,
    rows_p,
    table_b,
    table_n,
    num_blocks,
    scale,  # in powers of two
    T,  # columns of k and of scores
    M,
    N,
    P,
    Hq,
    shared,  # query heads of a KV head
    split,  # columns; of packed sequences, programs of one
    splits,  # at most
    all_arrived,  # elements of `arrived`
    all_found,  # elements of a half of `found`
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; 0: there are no pages
    COUNTERS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SHORT: tl.constexpr,
    FEW: tl.constexpr,
    EXACT: tl.constexpr,  # largest and sum in place of their logarithm
    UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    counter = pid * COUNTERS + tl.arange(0, COUNTERS)
    tl.store(arrived + counter, tl.zeros([COUNTERS], tl.int32), mask=counter < all_arrived)

    # Query heads that read the same keys side by side, so that the keys come from L2 for all but one.
    blocks = tl.cdiv(P, BLOCK_P)
    block = pid % blocks
    part = pid // blocks % shared
    s = pid // blocks // shared % splits
    kv = pid // blocks // shared // splits % (Hq // shared)
    b = (pid // blocks // splits // Hq).to(tl.int64)
    h = kv * shared + part
    q += b * q_b + h.to(tl.int64) * q_h
    k += kv.to(tl.int64) * k_h
    if PAGE == 0:
        k += b * k_b
    if cu_seqlens is not None:
        start, N = sequence(cu_seqlens, b, T, N)
        M = N
        q += start * q_m
        k += start * k_n
        units = Hq * tl.cdiv(tl.minimum(P, tl.maximum(N, 1)), BLOCK_P)
        split = _pieces(N, split, units, MAX_SPLITS, BLOCK_N, SHORT, FEW)

    p = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    row, at, first = _probes(rows, q_start, leftpad_k, seqused_k, b, p, rows_b, rows_p, M, N, P, PAGE)
    Q = _queries(q, row, at, q_m, scale, D, BLOCK_D, UPCAST)  # [P, D]
    scale = tl.abs(scale)
    d = tl.arange(0, BLOCK_D)  # [D]
    largest = tl.full([BLOCK_P], -3.0e38, tl.float32)  # [P], of the scores so far; finite where none is seen
    total = tl.zeros([BLOCK_P], tl.float32)  # [P], of the weights so far
    begin = tl.maximum(s * split, first)
    end = tl.minimum((s + 1) * split, tl.max(at, 0) + 1)
    for j in range(begin, end, BLOCK_N):
        column = j + tl.arange(0, BLOCK_N)  # [N]
        inside = (column < end) & (d < D)[:, None]
        if PAGE == 0:
            K = tl.load(k + column.to(tl.int64)[None, :] * k_n + d[:, None], mask=inside, other=0)  # [D, N]
        else:
            page, at_row = in_pool(block_table + b * table_b, column, column < end, table_n, num_blocks, PAGE)
            K = tl.load(k + (page * k_b + at_row * k_n)[None, :] + d[:, None], mask=inside, other=0)
        if UPCAST:
            K = K.to(tl.float32)
        scores = tl.dot(Q, K, input_precision="ieee")  # [P, N]
        scores = tl.where((column[None, :] <= at[:, None]) & (column < end), scores, -float("inf"))
        above = tl.maximum(largest, tl.max(scores, 1) * scale)
        total = total * tl.exp2(largest - above) + tl.sum(tl.exp2(scores * scale - above[:, None]), 1)
        largest = above
    result = found + ((b * Hq + h) * splits + s) * P + p
    if EXACT:
        tl.store(result, largest, mask=p < P)
        tl.store(result + all_found, total, mask=p < P)
    else:
        tl.store(result, tl.where(total == 0, -float("inf"), largest + tl.log2(total)), mask=p < P)  # NaN stays NaN


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    q,  # [B, Hq, M, D]
    k,  # [B, Hkv, N, D], or [num_blocks, Hkv, PAGE, D]
    rows,  # [P] or [B, P]
    q_start,  # [B] or None
    leftpad_k,  # [B] or None
    seqused_k,  # [B] or None
    cu_seqlens,  # [B + 1] or None: q, k and scores are of all sequences
    block_table,  # [B, N / PAGE] or None
    found,  # [B, Hq, splits, P] or [2, B, Hq, splits, P]
    arrived,  # [B, G, spans], programs of a span that are done
    partial,  # [B, G, parts, N]
    accumulated,  # [B, G, N]
    normalized,  # [B, G, N]
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    rows_b,
    rows_p,
    table_b,
    table_n,
    num_blocks,
    scale,  # in powers of two
    T,  # columns of k and of scores
    M,
    N,
    P,
    Hq,
    shared,  # query heads of a KV head
    splits,  # at most
    span,  # columns; of packed sequences, programs of one
    spans,  # at most
    scores_b,
    all_found,
    G,
    part,  # heads of a program
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SHORT: tl.constexpr,
    FEW: tl.constexpr,
    EXACT: tl.constexpr,  # largest and sum in place of their logarithm
    UPCAST: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: what the first launch read last is still in L2
    place = pid % spans
    head = pid // spans % (G * parts) * part
    g = pid // spans // parts % G
    b = (pid // spans // parts // G).to(tl.int64)
    q += b * q_b
    if PAGE == 0:
        k += b * k_b
    partial += b * scores_b * parts
    accumulated += b * scores_b
    normalized += b * scores_b
    if cu_seqlens is not None:
        start, N = sequence(cu_seqlens, b, T, N)
        M = N
        q += start * q_m
        k += start * k_n
        partial += start
        accumulated += start
        normalized += start
        span = _pieces(N, span, G * parts, span, BLOCK_N, SHORT, FEW)
        if place * span >= N:
            return

    blocks = tl.cdiv(P, BLOCK_P)
    last = tl.full([BLOCK_P], -1, tl.int32)
    first = 0
    for block in range(blocks):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        _, at, first = _probes(rows, q_start, leftpad_k, seqused_k, b, p, rows_b, rows_p, M, N, P, PAGE)
        last = tl.maximum(last, at)
    begin = tl.maximum(place * span, first)
    end = tl.minimum((place + 1) * span, tl.max(last, 0) + 1)  # no probe sees a column from here on

    d = tl.arange(0, BLOCK_D)  # [D]
    n = tl.arange(0, BLOCK_N)  # [N]
    mine = partial + (head // part).to(tl.int64) * T
    for item in range(part * blocks):
        h = (head + item // blocks).to(tl.int64)
        p = item % blocks * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
        row, at, _ = _probes(rows, q_start, leftpad_k, seqused_k, b, p, rows_b, rows_p, M, N, P, PAGE)
        Q = tl.trans(_queries(q + h * q_h, row, at, q_m, scale, D, BLOCK_D, UPCAST))  # [D, P]
        # One split after the other: how a sum over a tile is associated depends on the size of the tile, and bits must
        # not depend on how many splits there may be. Some at a time, so that their loads are in flight together.
        of_head = found + (b * Hq + h) * splits * P
        largest = tl.full([BLOCK_P], -3.0e38, tl.float32)  # [P]
        for some in range(0, splits, TOGETHER):
            for s in tl.static_range(TOGETHER):
                at_split = (some + s) * P + p  # [P]
                there = (p < P) & (at_split < splits * P)
                largest = tl.maximum(largest, tl.load(of_head + at_split, mask=there, other=-float("inf")))
        total = tl.zeros([BLOCK_P], tl.float32)  # [P]
        for some in range(0, splits, TOGETHER):
            for s in tl.static_range(TOGETHER):
                at_split = (some + s) * P + p
                there = (p < P) & (at_split < splits * P)
                share = tl.exp2(tl.load(of_head + at_split, mask=there, other=-float("inf")) - largest)
                if EXACT:
                    share *= tl.load(of_head + all_found + at_split, mask=there, other=0)
                total += share
        # A probe that sees no column has a total of 0, and its weights are replaced by 0.
        if not EXACT:
            largest += tl.where(total == 0, float("inf"), tl.log2(total))
        k_h_at = k + h // shared * k_h
        for j in range(begin, end, BLOCK_N):
            column = j + n  # [N]
            inside = (column < end)[:, None] & (d < D)
            if PAGE == 0:
                K = tl.load(k_h_at + column.to(tl.int64)[:, None] * k_n + d, mask=inside, other=0)  # [N, D]
            else:
                page, at_row = in_pool(block_table + b * table_b, column, column < end, table_n, num_blocks, PAGE)
                K = tl.load(k_h_at + (page * k_b + at_row * k_n)[:, None] + d, mask=inside, other=0)
            if UPCAST:
                K = K.to(tl.float32)
            scores = tl.dot(K, Q, input_precision="ieee")  # [N, P]
            weights = tl.exp2(scores * tl.abs(scale) - largest)
            if EXACT:
                weights /= total
            weights = tl.where(column[:, None] <= at, weights, 0)
            before = tl.load(mine + column, mask=(column < end) & (item > 0), other=0)
            tl.store(mine + column, before + tl.sum(weights, 1), mask=column < end)
        tl.debug_barrier()  # the next head reads what other threads wrote

    # The last program to arrive adds the parts.
    tl.debug_barrier()
    if tl.atomic_add(arrived + (b * G + g) * spans + place, 1, sem="acq_rel") == parts - 1:
        for j in range(place * span, tl.minimum((place + 1) * span, N), BLOCK_N):
            column = j + n
            inside = (column >= begin) & (column < end)
            total = tl.zeros([BLOCK_N], tl.float32)
            for i in range(parts):
                one = partial + (g * parts + i).to(tl.int64) * T + column
                total += tl.load(one, mask=inside, other=0, cache_modifier=".cg")
            seen = tl.zeros([BLOCK_N], tl.int32)  # [N], how many probes see a column
            for block in range(blocks):
                p = block * BLOCK_P + tl.arange(0, BLOCK_P)
                _, at, _ = _probes(rows, q_start, leftpad_k, seqused_k, b, p, rows_b, rows_p, M, N, P, PAGE)
                seen += tl.sum((column[:, None] <= at).to(tl.int32), 1)
            mean = total / (tl.maximum(seen, 1) * (part * parts)).to(tl.float32)
            result = g.to(tl.int64) * T + column
            tl.store(accumulated + result, total, mask=column < N)
            tl.store(normalized + result, mean, mask=column < N)
