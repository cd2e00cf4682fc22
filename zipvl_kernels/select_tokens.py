"""`select_tokens`: which tokens are kept."""

import torch
from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def select_tokens(
    accumulated: Tensor,
    normalized: Tensor,
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 1,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens to keep: how many from `accumulated`, which from `normalized` (ZipVL, arXiv 2410.08584).

    For each sequence and group with `n` valid columns:

    1. `mass[j] = floor(accumulated[j] * 2**32)` as int64; not finite or negative counts as 0. `total = sum(mass)`.
       Masses and their sums saturate at `2**63 - 1`.
    2. With `tau`: `need = ceil(tau * total)` in float64, at most `total`; `p` is the least number of largest masses
       whose sum reaches `need`; `total == 0` gives `p = n`. With `keep_ratio`: `p = ceil(keep_ratio * n)` in float64.
    3. `p` is raised to `keep_first + keep_recent` and to 1, and lowered to `n`.
    4. The set holds the first `keep_first` and last `keep_recent` valid columns, then the largest `normalized` (ties to
       the lower column, NaN below everything) until it has `p` members.

    Integers make this exact: every backend, device and batch slot returns the same bits for the same scores.

    Args:
        accumulated: fp32 `[B, G, N]`, packed `[G, T]`, decides `p`.
        normalized: of the same shape, decides the members.
        tau: share of the attention mass to keep, in (0, 1]. The paper uses 0.96 and 0.975.
        keep_ratio: share of the tokens to keep, in (0, 1]. Exactly one of `tau` and `keep_ratio` is given.
        keep_first, keep_recent: so many columns are kept whatever their scores.
        leftpad_k, seqused_k: int32 `[B]`, valid columns are `[leftpad_k, seqused_k)`; default `[0, N)`.
        backend: "auto", "reference", "triton" or "cuda".
        cu_seqlens, max_seqlen: int32 `[B + 1]` and a whole number, for packed sequences. The padding arguments are then
            None.

    Returns:
        `indices`, int32 `[B, G, N]`, packed `[G, T]`: the kept columns, ascending, then -1; packed, in the rows of each
        sequence, and counted within it. `counts`, int32 `[B, G]`: how many.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate.scores(accumulated, normalized, packed=cu_seqlens is not None)
    T = accumulated.shape[-1]
    padding = {"leftpad_k": leftpad_k, "seqused_k": seqused_k}
    max_seqlen = _validate_where.sequences(cu_seqlens, max_seqlen, T, accumulated.device, **padding)
    _validate.one_ratio(tau, keep_ratio)
    keep_first, keep_recent = _validate.forced(keep_first, keep_recent)
    _validate.per_sequence(accumulated, **padding)
    options = tau, keep_ratio, keep_first, keep_recent, leftpad_k, seqused_k, backend
    selection: tuple[Tensor, Tensor] = _select_tokens(accumulated, normalized, *options, cu_seqlens, max_seqlen)
    return selection


def _fake(
    accumulated: Tensor,
    normalized: Tensor,
    tau: float | None,
    keep_ratio: float | None,
    keep_first: int,
    keep_recent: int,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    G = accumulated.shape[-2]
    B = accumulated.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    indices = accumulated.new_empty(accumulated.shape, dtype=torch.int32)
    return indices, indices.new_empty((B, G))


@operator(
    "select_tokens(Tensor accumulated, Tensor normalized, float? tau, float? keep_ratio, int keep_first, "
    "int keep_recent, Tensor? leftpad_k, Tensor? seqused_k, str backend, Tensor? cu_seqlens=None, "
    "SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _fake,
)
def _select_tokens(
    accumulated: Tensor,
    normalized: Tensor,
    tau: float | None,
    keep_ratio: float | None,
    keep_first: int,
    keep_recent: int,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None and _checking.enabled():
        _checking.sequences(cu_seqlens, max_seqlen, accumulated.shape[1])
    implementation = resolve("select_tokens", backend, accumulated.device.type)
    selection: tuple[Tensor, Tensor] = implementation(
        accumulated,
        normalized,
        tau=tau,
        keep_ratio=keep_ratio,
        keep_first=keep_first,
        keep_recent=keep_recent,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    return selection
