"""A training step as a CUDA graph: launching the kernels of models this small costs more than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from chats import Batch
from torch import Tensor


class CapturedStep:
    """Runs `step(batch)` for batches of one fixed shape, captured or as it is; `clear` drops the gradients.

    Capture it before any other thread uses the GPU: the capture fails on their calls.
    """

    def __init__(
        self, step: Callable[[Batch], list[Tensor]], example: Batch, clear: Callable[[], None], capture: bool
    ) -> None:
        self.step, self.graph = step, None
        if not capture:
            return
        self.batch = Batch(*(t.clone() for t in vars(example).values()))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles the kernels and lets the optimizer make its state
                step(self.batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = step(self.batch)

    def __call__(self, batch: Batch) -> list[Tensor]:
        """The step's losses; waits for the step, since the schedule goes by the clock."""
        if self.graph is None:
            return self.step(batch)
        self.batch.copy_(batch)
        self.graph.replay()
        torch.cuda.current_stream().synchronize()
        return self.losses
