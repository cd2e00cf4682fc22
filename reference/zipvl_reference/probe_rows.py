"""Which query rows stand for all of them when tokens are scored (ZipVL, probe tokens: 64 recent and 64 random)."""

from math import isqrt
from typing import TypeVar

import torch
from torch import Tensor

ROUNDS = 6  # even: the halves end where they began
T = TypeVar("T", int, Tensor)


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`.

    The seed picks a permutation of the rest, and what it makes of 0, 1, 2, ... is drawn: a draw without replacement in
    integers, hence the same on every device, and each row drawn on its own. With `cu_seqlens` of packed sequences of at
    most `num_rows` rows each, those of each sequence, and then -1: `[B, P]`.
    """
    if cu_seqlens is not None:
        return _of_each(cu_seqlens, num_rows, num_recent, num_random, seed)
    recent, random = sizes(num_rows, num_recent, num_random)
    rest = num_rows - recent
    drawn = _permuted(torch.arange(random, dtype=torch.int64, device=device), rest, seed_key(seed))
    last = torch.arange(rest, num_rows, dtype=torch.int64, device=device)
    return torch.cat([drawn.sort().values, last]).to(torch.int32)


def _of_each(cu_seqlens: Tensor, num_rows: int, num_recent: int, num_random: int, seed: int) -> Tensor:
    """The rows of every sequence, by the same steps with lengths on the device."""
    bounds = cu_seqlens.long().clamp(min=0)
    length = (bounds[1:] - bounds[:-1]).clamp(0, num_rows)[:, None]  # [B, 1]
    most = max(num_recent, 1)
    recent = length.clamp(max=most)
    random = (length - recent).clamp(max=num_recent + num_random - most)
    rest = length - recent
    i = torch.arange(min(num_rows, num_recent + num_random), device=cu_seqlens.device).expand(len(length), -1)
    drawn = _permuted(i, rest, seed_key(seed))
    none = torch.iinfo(torch.int32).max
    rows = torch.where(i < random, drawn, torch.where(i < random + recent, rest + i - random, none)).sort(-1).values
    return torch.where(rows < none, rows, -1).to(torch.int32)


def sizes(num_rows: int, num_recent: int, num_random: int) -> tuple[int, int]:
    """How many rows are recent ones, and how many are drawn."""
    recent = min(num_rows, max(num_recent, 1))  # the last row is always a probe
    return recent, min(num_rows - recent, num_recent + num_random - recent)


def seed_key(seed: int) -> int:
    """What the permutation depends on, 31 bits."""
    return _mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) >> 1


def halves(n: int) -> tuple[int, int, int]:
    """`(a, b, walks)`: `[0, n)` lies in `[0, a * b)`, and so many more passes bring back what a pass took beyond `n`.

    A cycle that leaves `[0, n)` is back after at most `a * b - n < b` steps. Of those, 16 are enough where there are
    more than 16, since `b ** -16` is then below `2 ** -64`.
    """
    b = isqrt(max(n - 1, 0)) + 1
    a = (n + b - 1) // b
    return a, b, min(a * b - n, 16)


def _halves(n: Tensor) -> tuple[Tensor, Tensor, int]:
    """`halves` of every element; as many passes as any may need, for those that are too many change nothing."""
    b = (n - 1).clamp(min=0).double().sqrt().long() + 1  # exact, as a square root is rounded correctly
    return ((n + b - 1) // b).clamp(min=1), b, 16


def _permuted(x: Tensor, n: int | Tensor, key: int) -> Tensor:
    """A permutation of `[0, n)`: a Feistel network on `[0, a) x [0, b)`, applied until the value is below `n`."""
    a, b, walks = _halves(n) if isinstance(n, Tensor) else halves(n)
    for walk in range(walks + 1):
        left, right = x // b, x % b
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ _mix(key + i))) % a
            right = (right + _mix(left ^ _mix(key + i + 1))) % b
        through = left * b + right
        x = torch.where(x < n, x, through) if walk else through
    return x


def _mix(x: T) -> T:
    """A bijection of 32-bit numbers that scatters them (xor-shift and multiply, here without overflow in int64)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
