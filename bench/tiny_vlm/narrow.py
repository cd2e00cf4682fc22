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

# Rows and the weight of each: with one question, ZipVL's 128 probes are 64 drawn rows, about 48 of the picture's end and
# about 16 of the question. Here up to twelve questions share a picture, so theirs weigh more.
PROBES = {"anywhere": (16, 4.0), "picture's end": (12, 4.0), "questions": (24, 2.0)}
END = 48
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
        column = torch.arange(n, device=targets.device)
        answers = targets >= 0
        last = F.pad(answers[:, 1:], (0, 1)) & ~answers  # of a question
        self.stays = answers | last
        self.question = F.pad(last[:, :-1], (1, 0)).cumsum(1)  # the question that a token belongs to, [B, N]
        self.shared = column < text
        padding = self.question == last.sum(1, keepdim=True)
        key = torch.rand(b, n, device=targets.device) + 2.0 * (answers | padding) - last.float()
        ranges = ((n // 32, text), (text - END, text), (text, n))
        kinds = zip(ranges, PROBES.values(), strict=True)
        drawn = [low + key[:, low:high].topk(count, largest=False).indices for (low, high), (count, _) in kinds]
        self.rows = torch.cat(drawn, 1)  # [B, P]
        weights = torch.cat([torch.full((count,), weight, device=targets.device) for count, weight in PROBES.values()])
        # A short chat has fewer rows than are drawn.
        self.weights = weights * (key.gather(1, self.rows) < 1)  # [B, P]
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
        """Which tokens stay, bool [B, N]: those that have to, and what ZipVL takes of the rest.

        A question's tokens are judged by its own probes alone, as if it were the only one.
        """
        (b, h, n, d), rows = q.shape, self.rows
        probes = q.gather(2, rows[:, None, :, None].expand(-1, h, -1, d))
        scores = (probes @ k.repeat_interleave(h // k.shape[1], 1).mT).float() * d**-0.5  # [B, H, P, N]
        column = torch.arange(n, device=q.device)
        unseen = column > rows[..., None]  # [B, P, N]
        attention = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1).mean(1)  # [B, P, N]
        weights = self.weights[..., None]  # [B, P, 1]
        share = (attention * weights).sum(1) / weights.sum(1)  # [B, N]
        self.spreads.append(2 * (share + 1e-9).sqrt().sum(-1).log().mean())
        with torch.no_grad():
            count = (share.sort(-1, descending=True).values.cumsum(-1) < self.tau).sum(-1, keepdim=True) + 1
            judges = self.shared | (self.question[:, None] == self.question.gather(1, rows)[..., None])
            weights = weights * (judges & ~unseen)
            normalized = (attention * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
            order = normalized.masked_fill(self.stays, -1).argsort(-1, descending=True)
            rank = torch.empty_like(order).scatter_(1, order, column.expand(b, -1))
            return (rank < count) | self.stays

    def collect(self) -> Tensor:
        """Mean spread in nats over the layers that ran since the last call; ends the measuring."""
        measured, self.spreads, self.on = self.spreads, [], False
        return torch.stack(measured).mean()
