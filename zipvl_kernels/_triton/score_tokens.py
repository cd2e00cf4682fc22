"""`score_tokens` in Triton, two launches: row statistics of the probes' scores, then column sums of their softmax.

Both multiply the probes with the keys; the scores themselves are never stored. Which programs share a sequence depends
on its sizes alone, and what they leave is added in a fixed order: the same bits alone or in a batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipvl_kernels._tickets import tickets
from zipvl_kernels._triton.common import dense, interpreting

MAX_HEAD_DIM = 256
PROGRAMS = 264  # two for each multiprocessor of an H200: work is split until there are about so many


def tiles(dtype: torch.dtype, D: int) -> tuple[int, int, int, tuple[int, int]]:
    """`(block_p, block_n, num_warps, num_stages)`: probes and columns of a tile, warps, tiles in flight per launch."""
    if dtype == torch.float32:  # no tensor cores at full precision
        return (32, 32, 4, (2, 1)) if D <= 128 else (32, 16, 4, (2, 1))
    return (128, 128, 8, (3, 2)) if D <= 128 else (64, 64, 4, (2, 1))


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
) -> tuple[Tensor, Tensor]:
    """Column sums of the probes' causal softmax, and their mean over the heads and probes that see it, `[B, G, N]`."""
    config = tiles(q.dtype, q.shape[3])
    return launch(q, k, probe_rows, scale, q_start, leftpad_k, seqused_k, pool, *config)


def launch(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    block_p: int,
    block_n: int,
    num_warps: int,
    num_stages: tuple[int, int],
    programs: int = PROGRAMS,
) -> tuple[Tensor, Tensor]:
    """The operator with tiles of a given size."""
    (B, Hq, M, D), Hkv, N, P = q.shape, k.shape[1], k.shape[2], probe_rows.shape[-1]
    if D > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got shape {list(q.shape)}")
    G = 1 if pool == "layer" else Hkv
    accumulated = torch.empty((B, G, N), dtype=torch.float32, device=q.device)
    normalized = torch.empty_like(accumulated)
    if B == 0 or N == 0:
        return accumulated, normalized
    if M == 0 or P == 0:
        return accumulated.zero_(), normalized.zero_()

    columns, parts = triton.cdiv(N, block_n), triton.cdiv(P, block_p)
    splits = min(triton.cdiv(programs, Hq * parts), triton.cdiv(columns, 4), 16)  # of the columns
    per_split = triton.cdiv(columns, splits) * block_n
    heads = Hq // G
    shares = min(heads, triton.cdiv(programs, columns * G))  # of the heads
    per_share = triton.cdiv(heads, shares)
    shares = triton.cdiv(heads, per_share)
    statistics = torch.empty((B, Hq, 2, splits, P), dtype=torch.float32, device=q.device)
    partial = torch.empty((B, G, shares, N), dtype=torch.float32, device=q.device) if shares > 1 else accumulated
    counters = tickets(q.device, B * G * columns) if shares > 1 else None
    rows_b = probe_rows.stride(0) if probe_rows.dim() == 2 else 0
    common = (
        q,
        k,
        probe_rows,
        dense(q_start),
        dense(leftpad_k),
        dense(seqused_k),
        statistics,
        *q.stride()[:3],
        *k.stride()[:3],
        rows_b,
        probe_rows.stride(-1),
        (D**-0.5 if scale is None else scale) * math.log2(math.e),
        N - M,
        M,
        N,
        P,
        Hq,
        Hkv,
        splits,
    )
    options = {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "UPCAST": interpreting(),
        "num_warps": num_warps,
    }
    _row_statistics[(splits * parts, Hq, B)](*common, per_split, parts, num_stages=num_stages[0], **options)
    _column_sums[(columns, shares * G, B)](
        *common,
        accumulated,
        normalized,
        partial,
        counters,
        G,
        shares,
        per_share,
        SPLITS=triton.next_power_of_2(splits),
        SHARES=triton.next_power_of_2(shares),
        num_stages=num_stages[1],
        **options,
    )
    return accumulated, normalized


@triton.jit
def _bounds(q_start, leftpad_k, seqused_k, b, default_start, N):  # type: ignore[no-untyped-def]
    """Column of query row 0, first valid column, and end of the valid columns."""
    start = default_start
    if q_start is not None:
        start = tl.load(q_start + b)
    first = 0
    if leftpad_k is not None:
        first = tl.maximum(tl.load(leftpad_k + b), 0)
    end = N
    if seqused_k is not None:
        end = tl.minimum(tl.load(seqused_k + b), N)
    return start, first, end


@triton.jit
def _probes(rows, p, P, M, start, first, end):  # type: ignore[no-untyped-def]
    """Row of each probe, and the last column that it sees, -1 for a probe that does not count."""
    row = tl.load(rows, mask=p < P, other=-1)  # [P]
    at = row + start
    counts = (row >= 0) & (row < M) & (at >= first) & (at < end)
    return row, tl.where(counts, at, -1)


@triton.jit  # type: ignore[untyped-decorator]
def _row_statistics(  # type: ignore[no-untyped-def]
    q,  # [B, Hq, M, D]
    k,  # [B, Hkv, N, D]
    probe_rows,  # [P] or [B, P]
    q_start,  # [B] or None
    leftpad_k,  # [B] or None
    seqused_k,  # [B] or None
    statistics,  # [B, Hq, 2, splits, P]: maxima, and sums of powers below them
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    rows_b,
    rows_p,
    scale,  # in powers of two
    default_start,
    M,
    N,
    P,
    Hq,
    Hkv,
    splits,
    per_split,  # columns
    parts,  # of the probes
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(0) // parts
    p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [D]
    start, first, end = _bounds(q_start, leftpad_k, seqused_k, b, default_start, N)
    row, at = _probes(probe_rows + b * rows_b + p * rows_p, p, P, M, start, first, end)

    place = q + b * q_b + h.to(tl.int64) * q_h + row.to(tl.int64)[:, None] * q_m + d
    Q = tl.load(place, mask=(at >= 0)[:, None] & (d < D), other=0)  # [P, D]
    if UPCAST:
        Q = Q.to(tl.float32)
    k += b * k_b + (h // (Hq // Hkv)).to(tl.int64) * k_h
    largest = tl.full([BLOCK_P], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    begin = tl.maximum(split * per_split, first // BLOCK_N * BLOCK_N)
    stop = tl.minimum((split + 1) * per_split, tl.max(at, 0) + 1)
    for j0 in range(begin, stop, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)  # [N]
        valid = (j >= first) & (j < end)
        K = tl.load(k + j.to(tl.int64)[None, :] * k_n + d[:, None], mask=valid & (d < D)[:, None], other=0)  # [D, N]
        if UPCAST:
            K = K.to(tl.float32)
        scores = tl.dot(Q, K, input_precision="ieee") * scale  # [P, N]
        scores = tl.where(valid & (j <= at[:, None]), scores, -float("inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(above == -float("inf"), 0, above)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        largest = above
    out = statistics + ((b * Hq + h) * 2 * splits + split) * P + p
    tl.store(out, largest, mask=p < P)
    tl.store(out + splits * P, total, mask=p < P)


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    q,
    k,
    probe_rows,
    q_start,
    leftpad_k,
    seqused_k,
    statistics,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    rows_b,
    rows_p,
    scale,
    default_start,
    M,
    N,
    P,
    Hq,
    Hkv,
    splits,
    accumulated,  # [B, G, N]
    normalized,  # [B, G, N]
    partial,  # [B, G, shares, N]
    counters,  # [B, G, columns], None with one share
    G,
    shares,
    per_share,  # heads
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
):
    tile = tl.program_id(0)
    share = tl.program_id(1) % shares
    g = tl.program_id(1) // shares
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [D]
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    start, first, end = _bounds(q_start, leftpad_k, seqused_k, b, default_start, N)
    valid = (j >= first) & (j < end)
    s = tl.arange(0, SPLITS)
    heads = Hq // G
    sums = tl.zeros([BLOCK_N], tl.float32)
    k += b * k_b + j.to(tl.int64)[None, :] * k_n + d[:, None]
    q += b * q_b + d

    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)  # [P]
        row, at = _probes(probe_rows + b * rows_b + p * rows_p, p, P, M, start, first, end)
        if tl.max(at, 0) >= tile * BLOCK_N:  # else none of them sees the tile
            place = q + row.to(tl.int64)[:, None] * q_m
            counts = (at >= 0)[:, None] & (d < D)
            sees = valid & (j <= at[:, None])  # [P, N]
            there = (s < splits)[:, None] & (p < P)
            for i in range(tl.minimum(per_share, heads - share * per_share)):
                h = g * heads + share * per_share + i
                K = tl.load(k + (h // (Hq // Hkv)).to(tl.int64) * k_h, mask=valid & (d < D)[:, None], other=0)  # [D, N]
                Q = tl.load(place + h.to(tl.int64) * q_h, mask=counts, other=0)  # [P, D]
                if UPCAST:
                    K, Q = K.to(tl.float32), Q.to(tl.float32)
                # What the splits found, put together.
                found = statistics + ((b * Hq + h) * 2 * splits + s[:, None]) * P + p  # [S, P]
                largest = tl.load(found, mask=there, other=-float("inf"))
                total = tl.load(found + splits * P, mask=there, other=0)
                above = tl.max(largest, 0)
                base = tl.where(above == -float("inf"), 0, above)
                total = tl.sum(total * tl.exp2(largest - base), 0)  # [P]
                offset = base + tl.log2(tl.where(total > 0, total, 1))
                scores = tl.dot(Q, K, input_precision="ieee") * scale - offset[:, None]  # [P, N]
                sums += tl.sum(tl.exp2(tl.where(sees, scores, -float("inf"))), 0)

    if SHARES > 1:
        mine = (b * G + g) * shares
        tl.store(partial + (mine + share) * N + j, sums, mask=j < N)
        tl.debug_barrier()  # all threads have stored before the ticket says so
        counter = counters + (b * G + g) * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") != shares - 1:
            return
        tl.atomic_xchg(counter, 0)
        of = tl.arange(0, SHARES)
        held = partial + (mine + of[:, None]) * N + j  # [shares, N]
        parts = tl.load(held, mask=(of < shares)[:, None] & (j < N), other=0, cache_modifier=".cg")
        sums = tl.sum(parts, 0)
    seen = tl.zeros([BLOCK_N], tl.int32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        _, at = _probes(probe_rows + b * rows_b + p * rows_p, p, P, M, start, first, end)
        seen += tl.sum((j <= at[:, None]).to(tl.int32), 0)
    seen = tl.where(valid, seen, 0)
    out = (b * G + g) * N + j
    tl.store(accumulated + out, sums, mask=j < N)
    tl.store(normalized + out, tl.where(seen > 0, sums / (heads * tl.maximum(seen, 1)), 0), mask=j < N)
