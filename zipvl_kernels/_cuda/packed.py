"""Packed sequences in CUDA C: what launchers of kernels with PACKED = 1 share. packed.cuh says what places are."""

from collections.abc import Sequence

from torch import Tensor

NEVER = 2**31 - 1  # rows


def as_batch(x: Tensor) -> Tensor:
    """`[T, H, D]`, sequences one after the other, as a batch of one, `[1, H, T, D]`."""
    return x.transpose(0, 1)[None]


def ways(sizes: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """Ways `(every, apart)` by which a sequence of `t` tiles, the last of them begun, has `sizes[t]` places or more."""
    longest = len(sizes) - 1
    aparts = {max(sizes), *(sizes[longest // fraction] for fraction in (1, 2, 4, 8, 16)), sizes[min(longest, 1)]}
    found = []
    for apart in sorted(aparts):
        left = ((tile * (t - 1) + 1) // (size - apart) for t, size in enumerate(sizes) if size > apart)
        every = min(left, default=NEVER)
        if every > 0 and apart > 0:
            found.append((every, apart))
    return found


def fewest(ways: Sequence[tuple[int, int]], rows: int, sequences: int) -> tuple[int, int, int]:
    """The fewest places for so many sequences, of so many rows in all: how many, `every` and `apart`."""
    return min((rows // every + sequences * apart, every, apart) for every, apart in ways)
