"""Which query rows stand for all of them when tokens are scored (ZipVL, probe tokens: 64 recent and 64 random)."""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`.

    Every row gets a key that depends on the row and the seed alone, and the rows with the smallest keys are drawn: a
    uniform draw without replacement in integers, hence the same on every device.
    """
    recent = min(num_rows, max(num_recent, 1))  # the last row is always a probe
    random = min(num_rows - recent, num_recent + num_random - recent)
    rest = torch.arange(num_rows - recent, dtype=torch.int64, device=device)
    key = _mix(_mix(rest) ^ _mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)))
    keyed = (key << 31) | rest  # the row breaks ties between equal keys
    drawn = torch.topk(keyed, random, largest=False, sorted=False).values & 0x7FFFFFFF
    last = torch.arange(num_rows - recent, num_rows, dtype=torch.int64, device=device)
    return torch.cat([drawn.sort().values, last]).to(torch.int32)


def _mix(x: T) -> T:
    """A bijection of 32-bit numbers that scatters them (xor-shift and multiply, here without overflow in int64)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
