"""ZipVL with one thing changed, to see what that thing is worth. For measurements of single prompts only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import zipvl_kernels as zk
from zipvl_adapters import ZipVLPolicy
from zipvl_adapters.stats import Counted, Prefill

if TYPE_CHECKING:
    from zipvl_adapters.cache import ZipVLLayer
    from zipvl_adapters.policy import Step


@dataclass(frozen=True)
class _OnePrompt(ZipVLPolicy):
    """Neither recompresses nor takes a second turn: each variant would have to be defined there first."""

    recompress_interval: int | None = None

    def _later(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} measures the prefill of one prompt: start a new cache")


@dataclass(frozen=True)
class RandomPolicy(_OnePrompt):
    """As many tokens as `keep_ratio` says, drawn at random in every layer and sequence; the last ones always stay.

    Which ones depends on `seed`, the layer and the sequence's place in the batch, and is the same on every device.
    Nothing is scored: `tau` and the probes play no part.
    """

    def _first(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        (B, _, n, _), Hkv, device = step.q.shape, step.k.shape[1], step.q.device
        if self.keep_ratio is None:
            raise ValueError("keep_ratio: expected a number in (0, 1], for there is no mass to compare tau with")
        draw = torch.Generator().manual_seed(self.layer_seed(layer.index))
        scores = torch.rand(B, 1 if self.pool == "layer" else Hkv, n, generator=draw).to(device)
        indices, counts = _select(self, step, scores, scores, keep_recent)
        layer.note(step, indices, counts)
        zk.compact_kv_(step.k, step.v, indices, counts)
        layer.fill(step.k, step.v, indices, counts)
        return zk.sparse_attention(step.q, step.k, step.v, indices, counts, scale=step.scale, kv_compacted=True)


@dataclass(frozen=True)
class AllRowsPolicy(_OnePrompt):
    """ZipVL's selection, but every row attends, causally, over the kept columns: no row's output is zero.

    A row before the first kept column sees itself alone. Attention FLOPs fall by the kept ratio instead of its square;
    the cache is compacted as ever. Computed through a mask over all columns, so its time says nothing.
    """

    def _first(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        (_, Hq, n, _), device = step.q.shape, step.q.device
        leftpad, seqused = _valid(step)
        rows = self.probe_rows(n, layer.index, device)
        scores = zk.score_tokens(
            step.q, step.k, rows, scale=step.scale, leftpad_k=leftpad, seqused_k=seqused, pool=self.pool
        )
        indices, counts = _select(self, step, *scores, keep_recent)
        kept = torch.zeros(*indices.shape[:2], n + 1, dtype=torch.bool, device=device)
        kept = kept.scatter_(2, indices.long() % (n + 1), True)[..., :n]  # -1, of which there are many, falls off
        place = torch.arange(n, device=device)
        seen = kept[:, :, None] & (place <= place[:, None])  # [B, G, n, n]
        seen |= ~seen.any(-1, keepdim=True) & (place == place[:, None])
        k, v = (x.repeat_interleave(Hq // x.shape[1], 1) for x in (step.k, step.v))
        mask = seen.repeat_interleave(Hq // seen.shape[1], 1) if seen.shape[1] > 1 else seen
        out = scaled_dot_product_attention(step.q, k, v, attn_mask=mask, scale=step.scale)
        layer.note(step, indices, counts, self._scored(layer, step))
        layer.prefills[-1] = _AllRows(**vars(layer.prefills[-1]))
        zk.compact_kv_(step.k, step.v, indices, counts)
        layer.fill(step.k, step.v, indices, counts)
        return out


class _AllRows(Prefill):
    """A prefill of which every row was computed."""

    def read(self) -> Counted:
        assert self.indices is not None
        assert self.counts is not None
        Hq, _, D = self.heads
        indices, counts = self.indices.cpu().long(), self.counts.cpu().long()
        first, end = torch.tensor(0), torch.tensor(self.n)
        if self.padding is not None:
            first, end = (x.cpu().long()[:, None] for x in (self.padding.leftpad, self.padding.seqused))
        pairs = ((end[..., None] - indices) * (indices >= 0)).sum() + (indices[..., 0] - first).sum()
        extra = int(pairs - (counts * (counts + 1) // 2).sum())
        counted = super().read()
        return replace(counted, flops=counted.flops + 4 * D * Hq // indices.shape[1] * extra)


def _valid(step: Step) -> tuple[Tensor | None, Tensor | None]:
    """First column and end of each sequence, as the operators take them."""
    return (step.padding.leftpad, step.padding.seqused) if step.padding else (None, None)


def _select(
    policy: ZipVLPolicy, step: Step, accumulated: Tensor, normalized: Tensor, keep_recent: int
) -> tuple[Tensor, Tensor]:
    leftpad, seqused = _valid(step)
    return policy._select(
        accumulated,
        normalized,
        keep_first=policy.keep_first,
        keep_recent=keep_recent,
        leftpad_k=leftpad,
        seqused_k=seqused,
    )
