"""`zipvl_prefill_` in CUDA C: the launches of its steps, prepared once for all calls that are alike.

Kernels, parameters and order are those of the steps called one after the other, hence the same bits. The host is done
in half the time: a call looks up one plan, and what steps hand on lies in memory of `out`, which is written last.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from zipvl_kernels._cuda import common, compact_kv, probe_rows, score_tokens, select_tokens, sparse_attention
from zipvl_kernels._cuda.tensor_map import encoded
from zipvl_kernels._tickets import tickets

ALIGNED, MOST_PLANS = 128, 256  # bytes; kept for later calls


class Plan(NamedTuple):
    """All of the launches but addresses and the seed's key."""

    draw: common.Launch
    row_sums: common.Launch
    column_sums: common.Launch
    select: common.Launch
    compact: common.Launch
    attend: common.Launch
    counters: int
    sets: tuple[int, int, int]  # B, G, N
    # In bytes: where rows, log-sum-exps, sums of parts, counters, accumulated and normalised scores start, and the end.
    offsets: tuple[int, ...]
    in_out: bool  # they fit there


_plans: dict[tuple[object, ...], Plan | str] = {}


def zipvl_prefill_(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    tau: float,
    keep_ratio: float | None,
    num_recent: int,
    num_random: int,
    seed: int,
    keep_first: int,
    keep_recent: int,
    scale: float | None,
    q_start: Tensor | None,  # int32 [B]
    leftpad_k: Tensor | None,  # int32 [B]
    seqused_k: Tensor | None,  # int32 [B]
    pool: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | str:
    """`out`, indices and counts; or, with nothing done, what keeps kernels from the arguments, "" if they are empty."""
    if cu_seqlens is not None:
        return "cu_seqlens: expected None, got packed sequences"
    device = q.device
    if device.index != common.current_device():
        with torch.cuda.device(device):
            given = num_recent, num_random, seed, keep_first, keep_recent, scale, q_start, leftpad_k, seqused_k, pool
            return zipvl_prefill_(q, k, v, tau, keep_ratio, *given)
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    dtype, k_shape, k_stride, v_stride = q.dtype, k.shape, k.stride(), v.stride()
    layout = device, dtype, q_at % 16, k_at % 16, v_at % 16, q.shape, k_shape, q.stride(), k_stride, v_stride
    options = tau, keep_ratio, num_recent, num_random, keep_first, keep_recent, scale, q_start is None, pool
    plan = _plans.get((layout, options))
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[layout, options] = prepared(q, k, v, *options)
    if isinstance(plan, str):
        return plan

    draw, row_sums, column_sums, select, compact, attend, counters, (B, G, N), offsets, in_out = plan
    rows, lse, partial, arrived, accumulated, normalized, end = offsets
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    indices = torch.empty(B, G, N, dtype=torch.int32, device=device)
    counts = indices.new_empty(B, G)
    scratch = out if in_out else torch.empty(end, dtype=torch.uint8, device=device)
    held = [None if x is None else x.contiguous() for x in (q_start, leftpad_k, seqused_k)]
    start, *padding = [0 if x is None else x.data_ptr() for x in held]
    at, kept = scratch.data_ptr(), (indices.data_ptr(), counts.data_ptr())
    scores = at + accumulated, at + normalized
    zeroed = tickets(device, counters).data_ptr()  # which each kernel leaves zero for the next one
    half, stream = dtype == torch.float16, common.current_stream(device)
    k_map, v_map = encoded(k_at, half, k_shape, k_stride), encoded(v_at, half, k_shape, v_stride)
    scoring = k_map, q_at, at + rows, start, *padding, at + lse, at + partial, at + arrived, *scores
    with draw.lock:
        draw.fill(at + rows, probe_rows.seed_key(seed))
        row_sums.fill(*scoring)
        column_sums.fill(*scoring)
        select.fill(*scores, *padding, *kept)
        compact.fill(k_at, v_at, *kept, 0, zeroed)
        attend.fill(k_map, v_map, q_at, out.data_ptr(), *kept, start, zeroed)
        for step in (draw, row_sums, column_sums, select, compact, attend):
            step.stream.value = stream
        status = draw.begin() or row_sums.start() or column_sums.start()
        status = status or select.start() or compact.start() or attend.start()
    common.check(status)
    return out, indices, counts


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: float,
    keep_ratio: float | None,
    num_recent: int,
    num_random: int,
    keep_first: int,
    keep_recent: int,
    scale: float | None,
    default_start: bool,
    pool: str,
) -> Plan | str:
    """The plan of calls like this one, or what `zipvl_prefill_` returns in its place."""
    if not q.numel() or not k.numel():
        return ""
    (B, Hkv, N, _), M, device, half = k.shape, q.shape[2], q.device, q.dtype == torch.float16
    G, P = 1 if pool == "layer" else Hkv, min(M, num_recent + num_random)
    # Of these, only the shapes are of interest.
    rows, scores, counts = (torch.empty(1, device=device).expand(shape) for shape in ((P,), (B, G, N), (B, G)))
    why = (
        score_tokens.lacks(q, k, rows, scale=scale)
        or select_tokens.lacks(scores, scores)
        or sparse_attention.lacks(q, k, v, scores, counts, scale=scale, kv_compacted=True)
    )
    if why:
        return why
    strides, count_strides, sets = (G * N, N, 1), (G, 1), torch.Size((B, G, N))
    score, sizes = score_tokens.prepared(device, half, q.shape, k.shape, rows.shape, q.stride(), (1,), G, scale)
    select = select_tokens.prepared(device, sets, strides, strides, tau, keep_ratio, keep_first, keep_recent)
    strided = k.shape, k.stride(), v.stride(), G, strides, count_strides
    compact, counters = compact_kv.prepared(device, k.element_size(), 0, *strided)
    queries = q.shape, k.shape, sets, q.stride(), strides, count_strides
    parts = (-(-4 * n // ALIGNED) * ALIGNED for n in (P, *sizes, B * G * N, B * G * N))
    offsets = tuple(accumulate(parts, initial=0))
    return Plan(
        draw=probe_rows.prepared(device, M, num_recent, num_random),
        row_sums=score[0],
        column_sums=score[1],
        select=select,
        compact=compact,
        attend=sparse_attention.prepared(device, half, *queries, scale, default_start),
        counters=counters,
        sets=(B, G, N),
        offsets=offsets,
        in_out=offsets[-1] <= q.numel() * q.element_size(),
    )
