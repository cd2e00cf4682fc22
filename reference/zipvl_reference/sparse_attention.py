"""Attention among the kept tokens alone (ZipVL: O[T] = Attention(Q[T], K[T], V[T]), causal; other rows are 0)."""

import torch
from torch import Tensor

from zipvl_reference.packed import Packed
from zipvl_reference.pages import in_rows

ROWS = 1024  # query rows at a time, so that memory grows with N and not with its square


def sparse_attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    indices: Tensor,  # int32 [B, G, N]
    counts: Tensor,  # int32 [B, G]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    kv_compacted: bool = False,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,  # int32 [B], with a block table
    block_table: Tensor | None = None,  # int32 [B, max_blocks]; k, v are then pools of pages
    layout: str = "NHD",  # [num_blocks, block_size, Hkv, D], or "HND": [num_blocks, Hkv, block_size, D]
) -> Tensor:
    """Softmax attention of the query rows in the set over the set's columns at or before them, as `q`; 0 elsewhere.

    With `cu_seqlens` of packed `q [T, Hq, D]`, `k, v [T, Hkv, D]` and `indices [G, T]`.
    """
    if cu_seqlens is not None:
        packed = Packed(cu_seqlens, max_seqlen, q.shape[0])
        q, k, v, indices = packed.heads(q), packed.heads(k), packed.heads(v), packed.groups(indices)
        counts = counts.minimum(packed.lengths[:, None])
        out = sparse_attention(q, k, v, indices, counts, scale=scale, kv_compacted=kv_compacted)
        return packed.packed_heads(out)
    if block_table is not None and seqused_k is not None:
        k, v = (in_rows(pool, block_table, layout) for pool in (k, v))
        q_start = seqused_k - q.shape[2] if q_start is None else q_start
    (B, Hq, M, D), (Hkv, N), C = q.shape, k.shape[1:3], indices.shape[-1]
    G, r = indices.shape[1], Hq // Hkv
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, Hq, M, D, dtype=q.dtype, device=q.device)
    if M == 0 or N == 0 or C == 0:
        return out
    beyond = torch.iinfo(torch.int32).max
    position = torch.arange(C, device=q.device)

    for b in range(B):  # one sequence and KV head at a time: the same bits alone or in a batch
        start = C - M if q_start is None else q_start[b]
        at = torch.arange(M, dtype=torch.int32, device=q.device) + start  # the column that each query row stands at
        for h in range(Hkv):
            heads, g = slice(h * r, (h + 1) * r), h % G
            T = torch.where(position < counts[b, g], indices[b, g], beyond)  # ascending to its end
            seen = torch.searchsorted(T, at.int(), right=True)  # how many of the set each row sees
            in_set = (T[(seen - 1).clamp(min=0)] == at) & (at < beyond)
            K, V = k[b, h], v[b, h]
            if not kv_compacted:
                K, V = K.index_select(0, T.clamp(0, N - 1)), V.index_select(0, T.clamp(0, N - 1))
            held = torch.arange(K.shape[0], device=q.device)
            K, V = fp32_copy(K), fp32_copy(torch.where((held < counts[b, g])[:, None], V, 0))  # 0 * NaN would be NaN
            for begin in range(0, M, ROWS):
                rows = slice(begin, begin + ROWS)
                scores = fp32_copy(q[b, heads, rows]) @ K.mT * scale
                scores = scores.masked_fill(held >= seen[rows, None], -torch.inf)
                attended = torch.softmax(scores, -1) @ V
                out[b, heads, rows] = torch.where(in_set[rows, None], attended, 0).to(q.dtype)
    return out


def fp32_copy(x: Tensor) -> Tensor:
    """Contiguous, in fresh memory: a matrix product may round differently at other strides and addresses."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
