"""Attention of the text layers in the last stage of the training: its spread is measured, and tokens are evicted.

A model this small has nothing to spare: trained on dense attention alone it reads an answer's later characters in decode
steps, from columns that no row of the prompt had attended to, and fails once those are evicted. So it learns in the end
under what ZipVL does, for values of tau from strict to dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# In the proportions of a prompt with one question, whose 64 recent rows are the question and the picture's end.
PROBES = {"anywhere": 12, "picture's end": 4, "questions": 8}
END = 40
HIDDEN = -10_000.0


class NarrowAttention:
    """Causal attention; while `on`, it also evicts tokens as ZipVL does and measures how widely attention spreads.

    The spread is Renyi's entropy of order 1/2 of the probes' attention, averaged over heads and probes as ZipVL accumulates
    it: it weighs the many columns with little attention, which make ZipVL's count, more than Shannon's does.
    """

    name = "tiny_narrow"

    def __init__(self) -> None:
        self.on = False
        self.spreads: list[Tensor] = []
        # Compiled layers break here: the list is a side effect, and attention is one kernel anyway.
        AttentionInterface.register(self.name, torch.compiler.disable(self.attend))

    def begin(self, targets: Tensor, text: int) -> None:
        """For the next forward: draws probes and taus. `text` is the column of the first question.

        Answers are decoded after the eviction: they are no probes, and they and the rows before them stay.
        """
        self.on = True
        b, n = targets.shape
        answers = targets >= 0
        self.stays = answers | F.pad(answers[:, 1:], (0, 1))
        key = torch.rand(b, n, device=targets.device).masked_fill(answers, 2)
        ranges = ((n // 32, text), (text - END, text), (text, n))
        self.rows = torch.cat(
            [
                low + key[:, low:high].topk(count, largest=False).indices
                for (low, high), count in zip(ranges, PROBES.values(), strict=True)
            ],
            1,
        )  # [B, P]
        self.tau = torch.empty(b, 1, device=targets.device).uniform_(0.92, 1.02)  # a fifth of the sequences stay dense

    def attend(self, module: object, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object):
        d, gqa = q.shape[-1], q.shape[1] != k.shape[1]
        if not self.on:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            return out.transpose(1, 2).contiguous(), None
        kept = self.choose(q, k)  # [B, N]
        # One more channel, 1 in every query, hides the evicted columns: a mask would rule out the fast kernels.
        hidden = torch.where(kept, 0.0, HIDDEN).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
        q, k, v = (
            F.pad(x, (0, 7)) for x in (F.pad(q, (0, 1), value=1.0), torch.cat([k, hidden], -1), F.pad(v, (0, 1)))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, scale=d**-0.5)
        return (out[..., :d] * kept[:, None, :, None]).transpose(1, 2).contiguous(), None

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        """Which tokens stay, bool [B, N]: those that have to, and what ZipVL takes of the rest."""
        (b, h, n, d), rows = q.shape, self.rows
        probes = q.gather(2, rows[:, None, :, None].expand(-1, h, -1, d))
        scores = (probes @ k.repeat_interleave(h // k.shape[1], 1).mT).float() * d**-0.5  # [B, H, P, N]
        column = torch.arange(n, device=q.device)
        unseen = column > rows[..., None]  # [B, P, N]
        share = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1).mean((1, 2))  # [B, N]
        self.spreads.append(2 * (share + 1e-9).sqrt().sum(-1).log().mean())
        with torch.no_grad():
            count = (share.sort(-1, descending=True).values.cumsum(-1) < self.tau).sum(-1, keepdim=True) + 1
            normalized = (share / (~unseen).sum(1).clamp(min=1)).masked_fill(self.stays, -1)
            order = normalized.argsort(-1, descending=True)
            rank = torch.empty_like(order).scatter_(1, order, column.expand(b, -1))
            return (rank < count) | self.stays

    def collect(self) -> Tensor:
        """Mean spread in nats over the layers that ran since the last call; ends the measuring."""
        measured, self.spreads, self.on = self.spreads, [], False
        return torch.stack(measured).mean()
