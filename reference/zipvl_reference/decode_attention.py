"""Attention of a few new tokens over a cache whose used length differs per sequence (ZipVL: the decoding phase)."""

import torch
from torch import Tensor

from zipvl_reference.pages import in_rows
from zipvl_reference.sparse_attention import fp32_copy


def decode_attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    seqused_k: Tensor,  # int32 [B] or [B, Hkv]
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,  # int32 [B, max_blocks]; k, v are then pools of pages
    layout: str = "NHD",  # [num_blocks, block_size, Hkv, D], or "HND": [num_blocks, Hkv, block_size, D]
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention with the last query row at the last used row, as `q`; log-sum-exp of the scores, `[B, Hq, M]`.

    A row that sees nothing is 0, and its log-sum-exp -inf.
    """
    if block_table is not None:
        k, v = (in_rows(pool, block_table, layout) for pool in (k, v))
    (B, Hq, M, D), (Hkv, N) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, Hq, M, D, dtype=q.dtype, device=q.device)
    lse = torch.full((B, Hq, M), -torch.inf, dtype=torch.float32, device=q.device)
    column = torch.arange(N, device=q.device)
    row = torch.arange(M, device=q.device)[:, None]
    if N and M:
        for b in range(B):  # one sequence at a time: the same bits alone or in a batch
            used = seqused_k.view(B, -1)[b].view(-1, 1, 1, 1).clamp(max=N)  # [1 or Hkv, 1, 1, 1]
            at = used - M + row  # the column that each query row stands at, [., 1, M, 1]
            scores = fp32_copy(q[b]).view(Hkv, -1, M, D) @ fp32_copy(k[b]).mT[:, None] * scale
            scores = scores.masked_fill(column > at, -torch.inf)
            V = fp32_copy(torch.where((column < used)[:, 0].mT, v[b], 0))  # 0 * NaN of an unused row is NaN
            attended = torch.where(at >= 0, torch.softmax(scores, -1) @ V[:, None], 0)
            out[b] = attended.view(Hq, M, D).to(q.dtype)
            lse[b] = torch.logsumexp(scores, -1).view(Hq, M)
    return (out, lse) if return_lse else out
