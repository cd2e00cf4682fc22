"""`zipvl_prefill_`: score, select, compact and attend as one call."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator

STEPS = ("probe_rows", "score_tokens", "select_tokens", "compact_kv_", "sparse_attention")  # each by its best backend


def zipvl_prefill_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 0.975,
    keep_ratio: float | None = None,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    keep_first: int = 0,
    keep_recent: int = 1,
    scale: float | None = None,
    q_start: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    pool: str = "layer",
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ZipVL's prefill of one layer (arXiv 2410.08584): `probe_rows`, `score_tokens`, `select_tokens`, `compact_kv_` and
    `sparse_attention` on what is left. `k` and `v` end up compacted: rows `[0, counts)` hold the kept ones in order.

    Args:
        q: `[B, Hq, M, D]`, fp16, bf16 or fp32; packed `[T, Hq, D]`.
        k, v: `[B, Hkv, N, D]`, as `q`; packed `[T, Hkv, D]`. Written in place: two buffers with memory of their own.
        tau: share of the attention mass to keep, in (0, 1].
        keep_ratio: share of the tokens to keep, in (0, 1]; when given, it takes the place of `tau`.
        num_recent, num_random, seed: as for `probe_rows`.
        keep_first, keep_recent: so many columns are kept whatever their scores.
        scale: of the scores, default `D ** -0.5`.
        q_start: int32 `[B]`, the column of query row 0; default `N - M`.
        leftpad_k, seqused_k: int32 `[B]`, valid columns are `[leftpad_k, seqused_k)`; default `[0, N)`.
        pool: "layer" keeps one set of tokens (`G = 1`), "kv_head" one for each KV head (`G = Hkv`).
        backend: "auto", "reference", "triton" or "cuda".
        cu_seqlens, max_seqlen: int32 `[B + 1]` and a whole number, for packed sequences: each has the result that it
            has alone, and its kept rows at the front of its own. The padding arguments and `q_start` are then None.

    Returns:
        `out`, shape and dtype of `q`, 0 in rows that were not kept; `indices`, int32 `[B, G, N]`, packed `[G, T]`, the
        kept columns, ascending, then -1; `counts`, int32 `[B, G]`.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available for one of the steps.
    """
    _validate.heads(q=q, k=k, v=v, packed=cu_seqlens is not None)
    places = {"q_start": q_start, "leftpad_k": leftpad_k, "seqused_k": seqused_k}
    max_seqlen = _validate_where.sequences(cu_seqlens, max_seqlen, q.shape[0], q.device, **places)
    _validate.own_memory(k, v)
    _validate.ratio("tau", tau) if keep_ratio is None else _validate.ratio("keep_ratio", keep_ratio)
    _validate.probes(num_recent, num_random)
    _validate.whole_number("seed", seed)
    keep_first, keep_recent = _validate.forced(keep_first, keep_recent)
    _validate.scale(scale)
    _validate.per_sequence(q, **places)
    _validate.pool(pool)
    result: tuple[Tensor, Tensor, Tensor] = _zipvl_prefill_(
        q,
        k,
        v,
        tau,
        keep_ratio,
        num_recent,
        num_random,
        seed,
        keep_first,
        keep_recent,
        scale,
        q_start,
        leftpad_k,
        seqused_k,
        pool,
        backend,
        cu_seqlens,
        max_seqlen,
    )
    return result


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: float,
    keep_ratio: float | None,
    num_recent: int,
    num_random: int,
    seed: int,
    keep_first: int,
    keep_recent: int,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    G = 1 if pool == "layer" else k.shape[1]
    if cu_seqlens is None:
        B, _, N, _ = k.shape
        indices = q.new_empty((B, G, N), dtype=torch.int32)
    else:
        B = cu_seqlens.shape[0] - 1
        indices = q.new_empty((G, k.shape[0]), dtype=torch.int32)
    return q.new_empty(q.shape), indices, q.new_empty((B, G), dtype=torch.int32)


@cache
def _steps(backend: str, device_type: str) -> tuple[Callable[..., Any], ...]:
    """The functions behind STEPS."""
    return tuple(resolve(step, backend, device_type) for step in STEPS)


@cache
def _fused(backend: str, device: torch.device) -> Callable[..., tuple[Tensor, Tensor, Tensor] | str] | None:
    """All steps as one plan, where there are CUDA kernels of them; it returns why where those do not take a call."""
    if backend not in ("auto", "cuda"):
        return None
    try:
        _steps("cuda", device.type)
    except (RuntimeError, ValueError):
        return None
    fused: Callable[..., tuple[Tensor, Tensor, Tensor] | str]
    fused = import_module("zipvl_kernels._cuda.zipvl_prefill").zipvl_prefill_
    return fused


@operator(
    "zipvl_prefill_(Tensor q, Tensor(a!) k, Tensor(b!) v, float tau, float? keep_ratio, int num_recent, "
    "int num_random, int seed, int keep_first, int keep_recent, float? scale, Tensor? q_start, Tensor? leftpad_k, "
    "Tensor? seqused_k, str pool, str backend, Tensor? cu_seqlens=None, "
    "SymInt? max_seqlen=None) -> (Tensor, Tensor, Tensor)",
    _fake,
)
def _zipvl_prefill_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: float,
    keep_ratio: float | None,
    num_recent: int,
    num_random: int,
    seed: int,
    keep_first: int,
    keep_recent: int,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None and _checking.enabled():
        _checking.sequences(cu_seqlens, max_seqlen, q.shape[0])
    fused = _fused(backend, q.device)
    if fused:
        options = num_recent, num_random, seed, keep_first, keep_recent, scale, q_start, leftpad_k, seqused_k, pool
        found = fused(q, k, v, tau, keep_ratio, *options, cu_seqlens, max_seqlen)
        if not isinstance(found, str):
            return found
        if found and backend == "cuda":
            raise ValueError(f"backend='cuda': {found}")
    probe_rows, score_tokens, select_tokens, compact_kv_, sparse_attention = _steps(backend, q.device.type)
    where = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    rows = probe_rows(
        q.shape[2] if max_seqlen is None else max_seqlen,
        num_recent=num_recent,
        num_random=num_random,
        seed=seed,
        device=q.device,
        cu_seqlens=cu_seqlens,
    )
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
