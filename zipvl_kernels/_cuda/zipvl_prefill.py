"""`zipvl_prefill_` in CUDA C: the launches of its steps, prepared once for all calls that are alike.

Kernels, parameters and order are those of the steps called one after the other, hence the same bits. The host is done
in half the time: a call looks up one plan, and what steps hand on lies in memory of `out`, which is written last.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from zipvl_kernels._cuda import common, compact_kv, probe_rows, score_tokens, select_tokens, sparse_attention
from zipvl_kernels._cuda.packed import as_batch
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
    sets: tuple[int, ...]  # B, G, N; packed: G, T
    groups: tuple[int, int]  # B, G
    keys: tuple[torch.Size, tuple[int, ...], tuple[int, ...]]  # shape as a batch, strides of k and v
    # In bytes: where rows, log-sum-exps, sums of parts, counters, accumulated and normalised scores start, and the end.
    offsets: tuple[int, ...]
    in_out: bool  # they fit there


_plans: dict[tuple[object, ...], Plan | str] = {}


def zipvl_prefill_(
    q: Tensor,  # [B, Hq, M, D], or [T, Hq, D] with `cu_seqlens`
    k: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
    v: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
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
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | str:
    """`out`, indices and counts; or, with nothing done, what keeps kernels from the arguments, "" if they are empty."""
    device = q.device
    if device.index != common.current_device():
        with torch.cuda.device(device):
            given = num_recent, num_random, seed, keep_first, keep_recent, scale, q_start, leftpad_k, seqused_k, pool
            return zipvl_prefill_(q, k, v, tau, keep_ratio, *given, cu_seqlens, max_seqlen)
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    dtype = q.dtype
    layout = device, dtype, q_at % 16, k_at % 16, v_at % 16, q.shape, k.shape, q.stride(), k.stride(), v.stride()
    packed = None if cu_seqlens is None or max_seqlen is None else (cu_seqlens.shape[0] - 1, max_seqlen)
    options = tau, keep_ratio, num_recent, num_random, keep_first, keep_recent, scale, q_start is None, pool, packed
    plan = _plans.get((layout, options))
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[layout, options] = prepared(q, k, v, *options)
    if isinstance(plan, str):
        return plan

    draw, row_sums, column_sums, select, compact, attend, counters, sets, groups, keys, offsets, in_out = plan
    rows, lse, partial, arrived, accumulated, normalized, end = offsets
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    indices = torch.empty(sets, dtype=torch.int32, device=device)
    counts = indices.new_empty(groups)
    scratch = out if in_out else torch.empty(end, dtype=torch.uint8, device=device)
    held = [None if x is None else x.contiguous() for x in (q_start, leftpad_k, seqused_k, cu_seqlens)]
    start, *padding, sequences = map(common.address, held)
    at, kept = scratch.data_ptr(), (indices.data_ptr(), counts.data_ptr())
    scores = at + accumulated, at + normalized
    zeroed = tickets(device, counters).data_ptr()  # which each kernel leaves zero for the next one
    half, stream = dtype == torch.float16, common.current_stream(device)
    shape, k_stride, v_stride = keys
    k_map, v_map = encoded(k_at, half, shape, k_stride), encoded(v_at, half, shape, v_stride)
    scoring = k_map, q_at, at + rows, start, *padding, at + lse, at + partial, at + arrived, *scores, sequences, 0
    with draw.lock:
        draw.fill(at + rows, sequences, probe_rows.seed_key(seed))
        row_sums.fill(*scoring)
        column_sums.fill(*scoring)
        select.fill(*scores, *padding, *kept, sequences)
        compact.fill(k_at, v_at, *kept, 0, sequences, zeroed)
        attend.fill(k_map, v_map, q_at, out.data_ptr(), *kept, start, zeroed, sequences, 0, 0)
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
    packed: tuple[int, int] | None = None,
) -> Plan | str:
    """The plan of calls like this one, or what `zipvl_prefill_` returns in its place.

    `packed` is how many sequences there are one after the other, and the longest.
    """
    if not q.numel() or not k.numel() or (packed and not min(packed)):
        return ""
    given = k.shape, k.stride(), v.stride()
    if packed:
        q, k, v = as_batch(q), as_batch(k), as_batch(v)
    (B, Hkv, N, _), device, half = k.shape, q.device, q.dtype == torch.float16
    sequences, M = packed or (B, q.shape[2])
    G, P = 1 if pool == "layer" else Hkv, min(M, num_recent + num_random)
    sets, strides = ((G, N), (N, 1)) if packed else ((B, G, N), (G * N, N, 1))
    probes, probe_strides = ((sequences, P), (P, 1)) if packed else ((P,), (1,))
    groups, group_strides = (sequences, G), (G, 1)
    # Of these, only the shapes are of interest.
    rows, scores, counts = (torch.empty(1, device=device).expand(shape) for shape in (probes, sets, groups))
    why = (
        score_tokens.lacks(q, k, rows, scale=scale)
        or select_tokens.lacks(scores, scores, max_seqlen=packed and M)
        or sparse_attention.lacks(q, k, v, scores, counts, scale=scale, kv_compacted=True)
    )
    if why:
        return why
    layout = q.shape, k.shape, rows.shape, q.stride(), probe_strides
    score, sizes = score_tokens.prepared(device, half, *layout, G, scale, None, packed)
    forced = tau, keep_ratio, keep_first, keep_recent
    select = select_tokens.prepared(device, scores.shape, strides, strides, *forced, packed)
    shape, *in_k_v, in_sets = compact_kv.packed(sequences, *given, strides) if packed else (*given, strides)
    moved = shape, *in_k_v, G, in_sets, group_strides
    compact, counters = compact_kv.prepared(device, k.element_size(), 0, *moved, packed and M)
    queries = q.shape, k.shape, torch.Size((B, G, N)), q.stride(), (G * N, N, 1), group_strides
    parts = (-(-4 * n // ALIGNED) * ALIGNED for n in (rows.numel(), *sizes, B * G * N, B * G * N))
    offsets = tuple(accumulate(parts, initial=0))
    return Plan(
        draw=probe_rows.prepared(device, M, num_recent, num_random, packed and sequences),
        row_sums=score[0],
        column_sums=score[1],
        select=select,
        compact=compact,
        attend=sparse_attention.prepared(device, half, *queries, scale, default_start, packed),
        counters=counters,
        sets=sets,
        groups=groups,
        keys=(k.shape, k.stride(), v.stride()),
        offsets=offsets,
        in_out=offsets[-1] <= q.numel() * q.element_size(),
    )
