"""What the training minimises: wrong answers, unread cells and, late, attention that spreads widely."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pictures import LABELS
from torch import Tensor, nn
from transformers import AttentionInterface


class CellLoss(nn.Module):
    """Reads every cell's labels off its visual token: what took the models off the plateau of the answer loss alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = list(LABELS.values())
        self.head = nn.Linear(width, sum(self.classes))
        for i, classes in enumerate(self.classes):
            self.register_buffer(f"weight{i}", torch.tensor([0.1] + [1.0] * (classes - 1)))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of tokens [B, V, C] against label maps [B, L, h, w] with h * w = V; empty cells weigh little."""
        losses = []
        logits = self.head(tokens).float().flatten(0, 1)
        for i, (part, target) in enumerate(zip(logits.split(self.classes, -1), labels.unbind(1), strict=True)):
            losses.append(F.cross_entropy(part, target.flatten(), self.get_buffer(f"weight{i}")))
        return torch.stack(losses).sum()


def answer_loss(lm_head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens; hidden [B, S, C], targets [B, S] with -100 elsewhere."""
    return F.cross_entropy(lm_head(hidden[:, :-1]).float().flatten(0, 1), targets[:, 1:].flatten())


class SpreadProbe:
    """Attention function of the text layers that can also measure how widely probe rows spread over the columns.

    The measure is the entropy of the probe rows' attention, averaged over heads and probes as ZipVL accumulates it.
    """

    name = "tiny_probed"
    probes = 48

    def __init__(self) -> None:
        self.on = False
        self.entropies: list[Tensor] = []
        # Compiled layers break here: the list is a side effect, and attention is one kernel anyway.
        AttentionInterface.register(self.name, torch.compiler.disable(self.attend))

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        if self.on:
            n = q.shape[2]
            rows = torch.randint(n // 32, n, (self.probes,), device=q.device)
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = (q[:, :, rows] @ keys.transpose(2, 3)).float() * q.shape[-1] ** -0.5  # [B, H, P, N]
            hidden = torch.arange(n, device=q.device) > rows[:, None]
            share = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2))  # [B, N]
            self.entropies.append(-(share * (share + 1e-9).log()).sum(-1).mean())
        return out.transpose(1, 2).contiguous(), None

    def collect(self) -> Tensor:
        """Mean entropy in nats over the layers that ran since the last call."""
        measured, self.entropies = self.entropies, []
        return torch.stack(measured).mean()
