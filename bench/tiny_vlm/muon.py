"""Muon (Jordan et al.) with equal shapes batched and the rate in a tensor: torch.optim.Muon runs some twenty small kernels
a matrix, more than a whole step of these models takes, and a CUDA graph would freeze its rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95


class Muon:
    """Updates matrices by their orthogonalised momentum, scaled to the size of AdamW's updates (Liu et al.)."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: Tensor, weight_decay: float) -> None:
        self.parameters = [p for p in parameters if p.ndim == 2]
        self.momentum = {p: torch.zeros_like(p) for p in self.parameters}
        self.rate, self.weight_decay = rate, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters that have a gradient."""
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in self.parameters:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, group in by_shape.items():
            gradients, held = [p.grad for p in group], [self.momentum[p] for p in group]
            torch._foreach_lerp_(held, gradients, 1 - MOMENTUM)
            ahead = torch.stack(gradients).lerp(torch.stack(held), MOMENTUM)
            updates = orthogonalised(ahead) * (self.rate * -0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(group, 1 - self.rate * self.weight_decay)
            torch._foreach_add_(group, list(updates.unbind()))


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices [n, r, c] with their singular values brought near 1, by five Newton-Schulz steps in bf16."""
    wide = x.bfloat16() if x.shape[1] <= x.shape[2] else x.bfloat16().mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
    return (wide if x.shape[1] <= x.shape[2] else wide.mT).float()
