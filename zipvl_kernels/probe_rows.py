"""`probe_rows`: which query rows stand for all of them when tokens are scored."""

import torch
from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Draw the rows whose attention scores the tokens (ZipVL's probe tokens, arXiv 2410.08584: 64 recent, 64 random).

    Args:
        num_rows: number of query rows, `M`; with `cu_seqlens` the most that a sequence has, `max_seqlen`.
        num_recent: the last so many rows are probes. The last row always is, also with 0.
        num_random: so many more are drawn without replacement from the rest.
        seed: same seed, same rows, on every device.
        device: where the result lives; default: torch's default device, or that of `cu_seqlens`.
        cu_seqlens: int32 `[B + 1]`, where packed sequences start and end.

    Returns:
        int32 `[P]`, ascending, distinct, `P = min(num_rows, num_recent + num_random)`. With `cu_seqlens` `[B, P]`: the
        rows that a sequence of that length has, counted from its first, and then -1.

    Raises:
        TypeError: an argument is not a whole number, `cu_seqlens` not int32, or `device` no device.
        ValueError: an argument other than `seed` is negative, `num_rows` is more than int32 holds, or no probe is asked
            for at all; the shape or device of `cu_seqlens`; `device` names none.
    """
    _validate.not_negative(num_rows=num_rows)
    if num_rows >= 2**31:
        raise ValueError(f"num_rows: expected less than 2**31, since row numbers are int32, got {num_rows!r}")
    _validate.probes(num_recent, num_random)
    _validate.whole_number("seed", seed)
    where = _validate.device(device)
    if cu_seqlens is not None:
        where = _validate_where.sequence_bounds(cu_seqlens, where)
    rows: Tensor = _probe_rows(num_rows, num_recent, num_random, seed, where, cu_seqlens)
    return rows


def _fake(
    num_rows: int,
    num_recent: int,
    num_random: int,
    seed: int,
    device: torch.device | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    P = torch.sym_min(num_rows, num_recent + num_random)  # type: ignore[no-untyped-call]
    shape = (P,) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, P)
    return torch.empty(shape, dtype=torch.int32, device=device)


@operator(
    "probe_rows(SymInt num_rows, int num_recent, int num_random, int seed, Device? device, "
    "Tensor? cu_seqlens=None) -> Tensor",
    _fake,
)
def _probe_rows(
    num_rows: int,
    num_recent: int,
    num_random: int,
    seed: int,
    device: torch.device | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    if cu_seqlens is not None and _checking.enabled():
        _checking.sequences(cu_seqlens, num_rows)
    implementation = resolve("probe_rows", "auto", device.type if device else "cpu")
    rows: Tensor = implementation(
        num_rows, num_recent=num_recent, num_random=num_random, seed=seed, device=device, cu_seqlens=cu_seqlens
    )
    return rows
