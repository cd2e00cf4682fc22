"""What the training minimises beside the spread of attention: wrong answers and unread cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pictures import LABELS, MEASURES
from torch import Tensor, nn


class CellLoss(nn.Module):
    """Reads every cell's labels off its visual token: what took the models off the plateau of the answer loss alone.

    With `measures`, also where the cell's object lies and how large it is, as numbers that can be compared.
    """

    def __init__(self, width: int, *, measures: bool = True) -> None:
        super().__init__()
        self.classes, self.measured = list(LABELS.values()), len(MEASURES) if measures else 0
        self.head = nn.Linear(width, sum(self.classes) + self.measured)
        for i, classes in enumerate(self.classes):
            self.register_buffer(f"weight{i}", torch.tensor([0.1] + [1.0] * (classes - 1)))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of tokens [B, V, C] against maps [B, L, h, w] with h * w = V; empty cells weigh little."""
        *logits, measures = self.head(tokens).float().flatten(0, 1).split([*self.classes, self.measured], -1)
        maps = labels.flatten(2).transpose(0, 1).flatten(1)  # [L, B * V]
        losses = []
        for i, part in enumerate(logits):
            losses.append(F.cross_entropy(part, maps[i], self.get_buffer(f"weight{i}")))
        for measure, target in zip(measures.unbind(-1), maps[len(self.classes) :], strict=False):
            there = (target > 0).float()
            losses.append(5 * ((measure - target / 168).abs() * there).sum() / there.sum().clamp(min=1))
        return torch.stack(losses).sum()


def answer_loss(lm_head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens; hidden [B, S, C], targets [B, S] with -100 elsewhere."""
    return F.cross_entropy(lm_head(hidden[:, :-1]).float().flatten(0, 1), targets[:, 1:].flatten())
