"""Counters that kernels draw tickets from: zero before a launch and after it, with no launch to clear them."""

from functools import cache

import torch
from torch import Tensor


def tickets(device: torch.device, count: int) -> Tensor:
    """`count` counters for the next launch on the current stream, int32 `[count]`.

    Launches that may overlap must not share counters: each stream has its own, and so has each launch that is captured,
    since a graph is replayed on any stream.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _pool(device).take(count)


class _Pool:
    """Zeroed counters on one device."""

    SIZE = 1 << 20

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}
        torch.cuda.current_stream(device).synchronize()  # once a process: other streams find zeros too

    def take(self, count: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return self.cut(count)
        stream = torch.cuda.current_stream(self.counters.device).cuda_stream
        held = self.of_stream.get(stream)
        if held is None or held.numel() < count:
            held = self.of_stream[stream] = self.cut(max(count, 64))
        return held

    def cut(self, count: int) -> Tensor:
        if count > self.SIZE:
            return torch.zeros(count, dtype=torch.int32, device=self.counters.device)
        if self.used + count > self.SIZE:
            self.used = 0  # shared with a launch of long ago: wrong only where both run at once on two streams
        self.used += count
        return self.counters[self.used - count : self.used]


@cache
def _pool(device: torch.device) -> _Pool:
    return _Pool(device)
