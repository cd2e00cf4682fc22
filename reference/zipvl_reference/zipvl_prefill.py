"""The whole of ZipVL's prefill for one layer: score, select, compact, attend."""

from typing import Any

from torch import Tensor

from zipvl_reference.compact_kv import compact_kv_
from zipvl_reference.probe_rows import probe_rows
from zipvl_reference.score_tokens import score_tokens
from zipvl_reference.select_tokens import select_tokens
from zipvl_reference.sparse_attention import sparse_attention


def zipvl_prefill_(
    q: Tensor,  # [B, Hq, M, D], or [T, Hq, D] with cu_seqlens
    k: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
    v: Tensor,  # as k
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
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, indices, counts)`; `k` and `v` end up compacted. `keep_ratio`, when given, takes the place of `tau`."""
    if cu_seqlens is None:
        num_rows = q.shape[2]
    else:
        assert max_seqlen is not None
        num_rows = max_seqlen = min(max_seqlen, q.shape[0])
    probes: dict[str, Any] = {"num_recent": num_recent, "num_random": num_random, "seed": seed}
    where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    rows = probe_rows(num_rows, **probes, device=q.device, cu_seqlens=cu_seqlens)
    accumulated, normalized = score_tokens(
        q, k, rows, scale=scale, q_start=q_start, leftpad_k=leftpad_k, seqused_k=seqused_k, pool=pool, **where
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
        **where,
    )
    compact_kv_(k, v, indices, counts, **where)
    out = sparse_attention(q, k, v, indices, counts, scale=scale, q_start=q_start, kv_compacted=True, **where)
    return out, indices, counts
