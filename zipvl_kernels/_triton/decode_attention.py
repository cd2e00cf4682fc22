"""`decode_attention` in Triton, two launches: every split of a cache on its own, then the splits put together.

A split has the same rows whatever the batch holds, hence the same bits for a sequence alone or in a batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import interpreting, shared_kilobytes
from zipvl_kernels._triton.pages import in_pool

MAX_HEAD_DIM = 256
SPLIT = 512  # rows of the cache


def tiles(dtype: torch.dtype, D: int) -> tuple[int, int, int]:
    """`(block_n, num_warps, num_stages)`: rows of the cache at a time, warps, and tiles in flight."""
    if dtype == torch.float32:
        return (32, 4, 2)
    return (64, 4, 3) if D <= 128 else (32, 4, 3)


def decode_attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    seqused_k: Tensor,  # int32 [B] or [B, Hkv]
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,  # int32 [B, max_blocks]
    layout: str = "NHD",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, the last query row at the last used row, as `q`; log-sum-exp of the scores, `[B, Hq, M]`."""
    if block_table is not None and layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    config = tiles(q.dtype, q.shape[3])
    out, lse = launch(q, k, v, seqused_k, scale, return_lse, SPLIT, *config, block_table)
    return out if lse is None else (out, lse)


def launch(
    q: Tensor,
    k: Tensor,  # with a block table [num_blocks, Hkv, block_size, D]
    v: Tensor,
    seqused_k: Tensor,
    scale: float | None,
    return_lse: bool,
    split: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The operator with splits and tiles of a given size."""
    (B, Hq, M, D), Hkv, N, page = q.shape, k.shape[1], k.shape[2], 0
    if block_table is not None:
        N, page = N * block_table.shape[1], N
        # Page numbers come ahead of the rows: with two more stages, as many tiles are in flight as without pages.
        num_stages = num_stages + 2 if shared_kilobytes(q.device) > 64 else 1
    if D > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got shape {list(q.shape)}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, Hq, M, dtype=torch.float32, device=q.device) if return_lse else None
    if B == 0 or M == 0:
        return out, lse
    rows = Hq // Hkv * M  # that read one KV head
    block_m = min(max(16, common.power_of_2(rows)), 64)
    splits, parts = max(1, common.pieces(N, split)), common.pieces(rows, block_m)
    block_d = max(16, common.power_of_2(D))
    partial = torch.empty(B, Hkv, splits, rows, D, dtype=torch.float32, device=q.device)
    found = torch.empty(B, Hkv, 2, splits, rows, dtype=torch.float32, device=q.device)
    per_head = seqused_k.stride(1) if seqused_k.dim() == 2 else 0
    common.launch(
        _split,
        (splits * parts, Hkv, B),
        (q, k, v, seqused_k, block_table, partial, found),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            seqused_k.stride(0),
            per_head,
            *((0, 0) if block_table is None else block_table.stride()),
            (D**-0.5 if scale is None else scale) * math.log2(math.e),
            M,
            N,
            rows,
            splits,
            parts,
            k.shape[0],
        ),
        D=D,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=split,
        PAGE=page,
        UPCAST=interpreting(),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    common.launch(
        _merge,
        (rows, Hkv, B),
        (partial, found, seqused_k, out, lse),
        (seqused_k.stride(0), per_head, M, N, rows, splits),
        D=D,
        BLOCK_D=block_d,
        BLOCK_S=32,
        SPLIT=split,
        num_warps=4,
    )
    return out, lse


@triton.jit  # type: ignore[untyped-decorator]
def _split(  # type: ignore[no-untyped-def]
    q,  # [B, Hq, M, D]
    k,  # [B, Hkv, N, D], or [num_blocks, Hkv, PAGE, D]
    v,
    seqused_k,  # [B] or [B, Hkv]
    block_table,  # [B, N / PAGE] or None
    partial,  # [B, Hkv, splits, rows, D]: weighted values
    found,  # [B, Hkv, 2, splits, rows]: largest scores, and sums of weights
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    used_b,
    used_h,
    table_b,
    table_n,
    scale,  # in powers of two
    M,
    N,
    rows,
    splits,
    parts,  # of the rows
    num_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; 0: there are no pages
    UPCAST: tl.constexpr,
):
    split = tl.program_id(0) // parts
    h = tl.program_id(1)  # of the keys
    b = tl.program_id(2).to(tl.int64)
    used = tl.minimum(tl.load(seqused_k + b * used_b + h * used_h), N)
    if split * SPLIT >= used:
        return
    r = tl.program_id(0) % parts * BLOCK_M + tl.arange(0, BLOCK_M)  # [M], (query head of the group, query row)
    d = tl.arange(0, BLOCK_D)  # [D]
    here = r < rows
    head = h.to(tl.int64) * (rows // M) + r // M
    Q = tl.load(q + b * q_b + head[:, None] * q_h + (r % M)[:, None] * q_m + d, mask=here[:, None] & (d < D), other=0)
    if UPCAST:
        Q = Q.to(tl.float32)
    at = used - M + r % M  # the row of the cache that each query row stands at
    k += h.to(tl.int64) * k_h
    v += h.to(tl.int64) * v_h
    if PAGE == 0:
        k += b * k_b
        v += b * v_b
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D]
    for begin in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, used), BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)  # [N]
        if PAGE == 0:
            wide = j.to(tl.int64)
            k_at = wide * k_n
            v_at = wide * v_n
        else:
            page, wide = in_pool(block_table + b * table_b, j, j < used, table_n, num_blocks, PAGE)
            k_at = page * k_b + wide * k_n
            v_at = page * v_b + wide * v_n
        K = tl.load(k + k_at[None, :] + d[:, None], mask=(j < used) & (d < D)[:, None], other=0)  # [D, N]
        V = tl.load(v + v_at[:, None] + d, mask=(j < used)[:, None] & (d < D), other=0)  # [N, D]
        if UPCAST:
            K, V = K.to(tl.float32), V.to(tl.float32)
        scores = tl.dot(Q, K, input_precision="ieee") * scale  # [M, N]
        scores = tl.where(j <= at[:, None], scores, -float("inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(above == -float("inf"), 0, above)
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(V.dtype), V, weighted * shrink[:, None], input_precision="ieee")
        largest = above
    slot = (b * tl.num_programs(1) + h) * splits + split
    tl.store(partial + (slot * rows + r)[:, None] * D + d, weighted, mask=here[:, None] & (d < D))
    out = found + (slot + (b * tl.num_programs(1) + h) * splits) * rows + r
    tl.store(out, largest, mask=here)
    tl.store(out + splits * rows, total, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial,  # [B, Hkv, splits, rows, D]
    found,  # [B, Hkv, 2, splits, rows]
    seqused_k,
    out,  # [B, Hkv, rows, D], dense
    lse,  # [B, Hkv, rows] or None
    used_b,
    used_h,
    M,
    N,
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    r = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    used = tl.maximum(tl.minimum(tl.load(seqused_k + b * used_b + h * used_h), N), 0)
    d = tl.arange(0, BLOCK_D)  # [D]
    slot = b * tl.num_programs(1) + h
    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)  # [D]
    for begin in range(0, tl.cdiv(used, SPLIT), BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)  # [S]
        there = s < tl.cdiv(used, SPLIT)
        at = found + (slot * 2 * splits + s) * rows + r
        tops = tl.load(at, mask=there, other=-float("inf"))
        sums = tl.load(at + splits * rows, mask=there, other=0)
        place = partial + ((slot * splits + s) * rows + r)[:, None] * D + d
        values = tl.load(place, mask=there[:, None] & (d < D), other=0)  # [S, D]
        above = tl.maximum(largest, tl.max(tops, 0))
        base = tl.where(above == -float("inf"), 0, above)
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(tops - base)
        total = total * shrink + tl.sum(sums * weights, 0)
        weighted = weighted * shrink + tl.sum(values * weights[:, None], 0)
        largest = above
    divisor = tl.where(total > 0, total, 1)
    place = slot * rows + r
    tl.store(out + place * D + d, (weighted / divisor).to(out.dtype.element_ty), mask=d < D)
    if lse is not None:
        natural = tl.where(total > 0, (largest + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
        tl.store(lse + place + tl.arange(0, 1), natural)
