"""Counters that kernels draw tickets from: zero before a launch and after it, with no launch to clear them."""

from functools import cache

import torch
from torch import Tensor

from zipvl_kernels._streams import current_stream


def tickets(device: torch.device, count: int) -> Tensor:
    """At least `count` counters, int32, for the next launch on the current stream.

    Launches that may overlap must not share counters: each stream has its own, and so has each launch that is captured,
    since a graph is replayed on any stream.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _pool(device).take(count)


class _Pool:
    """Zeroed counters on one device, made by the first launch that is not captured."""

    CAPTURED = 1 << 20
    LEAST = 1 << 12

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.captured = self.zeros(self.CAPTURED)
        self.used = 0

    def take(self, count: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            if self.used + count > self.CAPTURED:
                return self.zeros(count)  # by a node of the graph, at each replay
            self.used += count
            return self.captured[self.used - count : self.used]
        stream = current_stream(self.device)
        held = self.of_stream.get(stream)
        if held is None or held.numel() < count:
            held = self.of_stream[stream] = self.zeros(max(count, self.LEAST))
        return held

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


@cache
def _pool(device: torch.device) -> _Pool:
    return _Pool(device)
