"""The whole of ZipVL's prefill for one layer: score, select, compact, attend."""

from torch import Tensor

from zipvl_reference.compact_kv import compact_kv_
from zipvl_reference.probe_rows import probe_rows
from zipvl_reference.score_tokens import score_tokens
from zipvl_reference.select_tokens import select_tokens
from zipvl_reference.sparse_attention import sparse_attention


def zipvl_prefill_(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    *,
    tau: float = 0.975,
    keep_ratio: float | None = None,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    keep_first: int = 0,
    keep_recent: int = 1,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    pool: str = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, indices, counts)`; `k` and `v` end up compacted. `keep_ratio`, when given, takes the place of `tau`."""
    rows = probe_rows(q.shape[2], num_recent=num_recent, num_random=num_random, seed=seed, device=q.device)
    accumulated, normalized = score_tokens(
        q, k, rows, scale=scale, q_start=q_start, leftpad_k=leftpad_k, seqused_k=seqused_k, pool=pool
    )
    indices, counts = select_tokens(
        accumulated,
        normalized,
        tau=tau if keep_ratio is None else None,
        keep_ratio=keep_ratio,
        keep_first=keep_first,
        keep_recent=keep_recent,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
    )
    compact_kv_(k, v, indices, counts)
    out = sparse_attention(q, k, v, indices, counts, scale=scale, q_start=q_start, kv_compacted=True)
    return out, indices, counts
