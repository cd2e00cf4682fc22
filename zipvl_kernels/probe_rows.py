"""`probe_rows`: which query rows stand for all of them when tokens are scored."""

import torch
from torch import Tensor

from zipvl_kernels import _validate
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the rows whose attention scores the tokens (ZipVL's probe tokens, arXiv 2410.08584: 64 recent, 64 random).

    Args:
        num_rows: number of query rows, `M`.
        num_recent: the last so many rows are probes. The last row always is, also with 0.
        num_random: so many more are drawn without replacement from the rest.
        seed: same seed, same rows, on every device.
        device: where the result lives; default: torch's default device.

    Returns:
        int32 `[P]`, ascending, distinct, `P = min(num_rows, num_recent + num_random)`.

    Raises:
        TypeError: an argument is not a whole number.
        ValueError: an argument other than `seed` is negative, or no probe is asked for at all.
    """
    _validate.not_negative(num_rows=num_rows)
    _validate.probes(num_recent, num_random)
    _validate.whole_number("seed", seed)
    rows: Tensor = _probe_rows(num_rows, num_recent, num_random, seed, device and torch.device(device))
    return rows


def _fake(num_rows: int, num_recent: int, num_random: int, seed: int, device: torch.device | None) -> Tensor:
    P = torch.sym_min(num_rows, num_recent + num_random)  # type: ignore[no-untyped-call]
    return torch.empty(P, dtype=torch.int32, device=device)


@operator("probe_rows(SymInt num_rows, int num_recent, int num_random, int seed, Device? device) -> Tensor", _fake)
def _probe_rows(num_rows: int, num_recent: int, num_random: int, seed: int, device: torch.device | None) -> Tensor:
    rows: Tensor = resolve("probe_rows", "auto", device.type if device else "cpu")(
        num_rows, num_recent=num_recent, num_random=num_random, seed=seed, device=device
    )
    return rows
