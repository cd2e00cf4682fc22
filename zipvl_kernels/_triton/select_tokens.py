"""`select_tokens` in Triton: one program a set, which finds both thresholds bit by bit and sorts nothing.

Exact: all decisions are made in integers.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense, sequence

BLOCK = 4096  # columns at a time


def select_tokens(
    accumulated: Tensor,  # fp32 [B, G, N]
    normalized: Tensor,  # fp32 [B, G, N]
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 1,
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascending columns of the kept set, then -1, int32 `[B, G, N]`; how many there are, int32 `[B, G]`.

    With `cu_seqlens` of packed scores `[G, T]`, columns count within their sequence, `[G, T]`.
    """
    indices = torch.empty_like(accumulated, dtype=torch.int32, memory_format=torch.contiguous_format)
    if cu_seqlens is not None:
        B = cu_seqlens.shape[0] - 1
        accumulated, normalized = accumulated.expand(B, -1, -1), normalized.expand(B, -1, -1)
    B, G, T = accumulated.shape
    N = T if max_seqlen is None else min(max_seqlen, T)
    counts = indices.new_empty(B, G)
    if B * G == 0 or N == 0:
        return indices, counts.zero_()
    block = min(BLOCK, max(16, common.power_of_2(N)))
    common.launch(
        _kernel,
        (G, B),
        (accumulated, normalized, dense(leftpad_k), dense(seqused_k), dense(cu_seqlens), indices, counts),
        (
            *accumulated.stride(),
            *normalized.stride(),
            G * N if cu_seqlens is None else 0,
            T,
            N,
            min(keep_first, N),  # more would be the same, and their sum has to fit 32 bits
            min(keep_recent, N),
            # Scalars reach a kernel as fp32: the share goes as the bits of its fp64.
            _bits(tau if keep_ratio is None else keep_ratio),
        ),
        BY_RATIO=keep_ratio is not None,
        BLOCK=block,
        num_warps=max(1, min(16, block // 128)),
    )
    return indices, counts


def _bits(x: float | None) -> int:
    """The bits of `x` in fp64, as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


@triton.jit
def _masses(accumulated, j, valid):  # type: ignore[no-untyped-def]
    """floor(a * 2**32) as int64, saturating; 0 where not valid, not finite or not positive."""
    a = tl.load(accumulated + j, mask=valid, other=0).to(tl.float64)
    a = tl.where((a > 0) & (a < float("inf")), a, 0)  # not a NaN either
    scaled = a * 4294967296.0
    mass = tl.where(scaled < 9223372036854775808.0, scaled, 0).to(tl.int64)
    return tl.where(scaled < 9223372036854775808.0, mass, 9223372036854775807)


@triton.jit
def _keys(normalized, j, valid, forced):  # type: ignore[no-untyped-def]
    """int64 in the order of preference: -1 not valid, 0 a NaN, 1 to 2**32 a number, 2**33 forced."""
    x = tl.load(normalized + j, mask=valid, other=0)
    x = tl.where(x == 0, 0.0, x)  # -0.0 ties with 0.0
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(x != x, 0, ordered + 2147483649)
    return tl.where(valid, tl.where(forced, 8589934592, key), -1)


@triton.jit(do_not_specialize=["share_bits", "keep_first", "keep_recent"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    accumulated,  # [B, G, N]
    normalized,  # [B, G, N]
    leftpad_k,  # [B] or None
    seqused_k,  # [B] or None
    cu_seqlens,  # [B + 1] or None: scores and indices are [G, T]
    indices,  # [B, G, N], dense
    counts,  # [B, G], dense
    a_b,
    a_g,
    a_n,
    n_b,
    n_g,
    n_n,
    indices_b,
    T,  # columns of scores and indices
    N,  # columns of a sequence
    keep_first,
    keep_recent,
    share_bits,
    BY_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    start, N = sequence(cu_seqlens, b, T, N)
    accumulated += b * a_b + g * a_g + start * a_n
    normalized += b * n_b + g * n_g + start * n_n
    first = 0
    if leftpad_k is not None:
        first = tl.maximum(tl.load(leftpad_k + b), 0)
    end = N
    if seqused_k is not None:
        end = tl.minimum(tl.load(seqused_k + b), N)
    n = tl.maximum(end - first, 0)
    share = share_bits.to(tl.int64).to(tl.float64, bitcast=True)
    lane = tl.arange(0, BLOCK)
    wide = lane.to(tl.int64)

    # p, the number of tokens.
    if BY_RATIO:
        p = tl.ceil(share * n.to(tl.float64)).to(tl.int32)
    else:
        # Sums in two halves cannot overflow; put together they saturate.
        low = tl.zeros([1], tl.int64)
        high = tl.zeros([1], tl.int64)
        for begin in range(0, N, BLOCK):
            j = begin + lane
            mass = _masses(accumulated, (begin + wide) * a_n, (j >= first) & (j < end))
            low += tl.sum(mass & 0xFFFFFFFF, 0)
            high += tl.sum(mass >> 32, 0)
        total = _together(low, high)
        wanted = tl.ceil(share * total.to(tl.float64))
        need = tl.where(wanted < 9223372036854775808.0, wanted, 0).to(tl.int64)
        need = tl.minimum(tl.where(wanted < 9223372036854775808.0, need, total), total)  # [1]
        # The largest mass of which, and of all above it, there is enough.
        threshold = tl.zeros([1], tl.int64)
        bit = tl.full([1], 1 << 62, tl.int64)
        for _ in range(63):
            tried = threshold + bit
            low = tl.zeros([1], tl.int64)
            high = tl.zeros([1], tl.int64)
            for begin in range(0, N, BLOCK):
                j = begin + lane
                mass = _masses(accumulated, (begin + wide) * a_n, (j >= first) & (j < end))
                mass = tl.where(mass >= tried, mass, 0)
                low += tl.sum(mass & 0xFFFFFFFF, 0)
                high += tl.sum(mass >> 32, 0)
            threshold = tl.where(_together(low, high) >= need, tried, threshold)
            bit = bit >> 1
        above = tl.zeros([1], tl.int64)
        more = tl.zeros([1], tl.int64)
        for begin in range(0, N, BLOCK):
            j = begin + lane
            mass = _masses(accumulated, (begin + wide) * a_n, (j >= first) & (j < end))
            above += tl.sum(tl.where(mass > threshold, mass, 0), 0)  # below `need`: no overflow
            more += tl.sum((mass > threshold).to(tl.int64), 0)
        copies = (need - above - 1) // tl.maximum(threshold, 1) + 1  # `need` and `threshold` may be close to 2**63
        p = tl.sum(tl.where(total > 0, more + copies, n), 0).to(tl.int32)
    p = tl.minimum(tl.maximum(p, tl.maximum(keep_first + keep_recent, 1)), n)

    # The largest key that p tokens reach; of those at it, the first ones.
    threshold = tl.full([1], -1, tl.int64)
    bit = tl.full([1], 1 << 33, tl.int64)
    for _ in range(34):
        tried = threshold + bit
        reach = tl.zeros([1], tl.int32)
        for begin in range(0, N, BLOCK):
            j = begin + lane
            forced = (j < first + keep_first) | (j >= end - keep_recent)
            key = _keys(normalized, (begin + wide) * n_n, (j >= first) & (j < end), forced)
            reach += tl.sum((key >= tried).to(tl.int32), 0)
        threshold = tl.where(reach >= p, tried, threshold)
        bit = bit >> 1
    more_keys = tl.zeros([1], tl.int32)
    for begin in range(0, N, BLOCK):
        j = begin + lane
        forced = (j < first + keep_first) | (j >= end - keep_recent)
        key = _keys(normalized, (begin + wide) * n_n, (j >= first) & (j < end), forced)
        more_keys += tl.sum((key > threshold).to(tl.int32), 0)

    out = indices + b * indices_b + g * T + start
    ties = p - more_keys  # [1], still to be taken
    taken = tl.zeros([1], tl.int32)
    for begin in range(0, N, BLOCK):
        j = begin + lane
        forced = (j < first + keep_first) | (j >= end - keep_recent)
        key = _keys(normalized, (begin + wide) * n_n, (j >= first) & (j < end), forced)
        tie = (key == threshold).to(tl.int32)
        kept = ((key > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties))).to(tl.int32)
        ties -= tl.sum(tie, 0)
        place = taken + tl.cumsum(kept, 0) - 1
        tl.store(out + place, j, mask=kept > 0)
        taken += tl.sum(kept, 0)
        tl.store(out + j, -1, mask=(j >= p) & (j < N))
    tl.store(counts + b * tl.num_programs(0) + g, p)


@triton.jit
def _together(low, high):  # type: ignore[no-untyped-def]
    """low + high * 2**32, at most 2**63 - 1."""
    high += low >> 32
    return tl.where(high < 2147483648, (high << 32) | (low & 0xFFFFFFFF), 9223372036854775807)
