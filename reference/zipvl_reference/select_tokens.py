"""Which tokens are kept (ZipVL: how many from the accumulated scores and tau, which from the normalised scores)."""

import torch
from torch import Tensor

from zipvl_reference.packed import Packed

MAX = 2**63 - 1


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

    With `cu_seqlens` of packed scores `[G, T]`, columns count within their sequence, `[G, T]`. Exact in integers:
    masses, and their sums, saturate at 2**63 - 1.
    """
    if cu_seqlens is not None:
        packed = Packed(cu_seqlens, max_seqlen, accumulated.shape[1])
        indices, counts = select_tokens(
            packed.groups(accumulated),
            packed.groups(normalized),
            tau=tau,
            keep_ratio=keep_ratio,
            keep_first=keep_first,
            keep_recent=keep_recent,
            seqused_k=packed.lengths,
        )
        return packed.packed_groups(indices), counts
    B, _, N = accumulated.shape
    column = torch.arange(N, dtype=torch.int32, device=accumulated.device)
    first = column.new_zeros(B, 1, 1) if leftpad_k is None else leftpad_k.view(B, 1, 1)
    end = column.new_full((B, 1, 1), N) if seqused_k is None else seqused_k.view(B, 1, 1).clamp(max=N)
    valid = (column >= first) & (column < end)  # [B, 1, N]
    n = valid.sum(-1)  # int64 [B, 1]

    # p = min { p : the p largest a_j sum to at least tau * sum_j a_j }
    if tau is not None:
        p = _count(_mass(accumulated).masked_fill(~valid, 0), tau, n)
    else:
        assert keep_ratio is not None
        p = torch.ceil(keep_ratio * n.double()).long()
    p = p.clamp(min=max(keep_first + keep_recent, 1)).minimum(n).expand(accumulated.shape[:2])

    # T = the forced columns, then the largest normalised scores, until there are p
    forced = (column < first + keep_first) | (column >= end - keep_recent)
    isnan = normalized.isnan()
    rank = torch.where(valid, torch.where(forced, 3, torch.where(isnan, 1, 2)), 0)  # a NaN is below every number
    value = torch.where(isnan | (normalized == 0), 0, normalized)  # -0.0 ties with 0.0
    order = value.argsort(dim=-1, descending=True, stable=True)  # ties: the lower column first
    order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    kept = torch.where(column < p[..., None], order, N).sort(-1).values
    return torch.where(kept < N, kept, -1).to(torch.int32), p.to(torch.int32)


def _mass(accumulated: Tensor) -> Tensor:
    """floor(a * 2**32) as int64; 0 where not finite or negative. Exact: float64 holds fp32 times a power of two."""
    a = torch.where(accumulated.isfinite() & (accumulated > 0), accumulated, 0).double()
    mass = torch.floor(a * 2.0**32)
    return torch.where(mass < 2.0**63, mass, 0).long().masked_fill(mass >= 2.0**63, MAX)


def _count(mass: Tensor, tau: float, n: Tensor) -> Tensor:
    """The least number of largest masses whose sum reaches ceil(tau * total); all n columns where the total is 0."""
    sums = mass.sort(-1, descending=True).values.cumsum(-1)
    sums = torch.where(sums.cummin(-1).values < 0, MAX, sums)  # from the first overflow on
    total = sums[..., -1:] if sums.shape[-1] else sums.new_zeros(*sums.shape[:-1], 1)
    need = torch.ceil(tau * total.double())
    need = torch.where(need < 2.0**63, need.long(), total).minimum(total)
    return torch.where(total[..., 0] > 0, (sums < need).sum(-1) + 1, n)
