"""Attention over a full stock cache in which evicted tokens are masked: what a compacted cache has to equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from zipvl_adapters import Stats


@dataclass
class Oracle:
    """Which tokens are alive, `[B, G, seen]` bool a layer; decoded tokens join by themselves.

    `interval` and `tau`: every `interval` decoded tokens, those are reselected from the newest query row.
    """

    alive: list[Tensor]
    interval: int = 0
    tau: float = 1.0
    decoded: dict[int, int] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        Hq, n, D, m = *q.shape[1:], k.shape[2]
        k, v = (x.repeat_interleave(Hq // x.shape[1], 1) for x in (k, v))
        alive = self.alive[layer]
        new = m - alive.shape[-1]
        alive = self.alive[layer] = torch.cat([alive, alive.new_ones(*alive.shape[:2], max(new, 0))], -1)
        heads = alive[:, :, :m].repeat_interleave(Hq // alive.shape[1], 1)
        rows = torch.arange(m - n, m)
        allowed = heads[:, :, None] & (torch.arange(m) <= rows[:, None])
        if padding is not None:
            allowed = allowed & padding[:, None, None, :m]
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~allowed, -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0)
        asked = heads[:, :, m - n :].clone()
        asked[..., -1] = True  # the last row is a query always
        if n == 1:
            self._recompress(layer, scores[:, :, 0], m)
        return (weights @ v * asked[..., None]).transpose(1, 2).contiguous()

    def _recompress(self, layer: int, scores: Tensor, m: int) -> None:
        """The rule in plain words: of the last tokens, the fewest that hold tau of the newest row's attention."""
        self.decoded[layer] = self.decoded.get(layer, 0) + 1
        if not self.interval or self.decoded[layer] < self.interval:
            return
        self.decoded[layer] = 0
        window = torch.arange(m - self.interval, m)
        mass = torch.softmax(scores[..., window], -1)
        groups = self.alive[layer].shape[1]
        mass = mass.unflatten(1, (groups, -1)).sum(2)  # [B, G, interval]
        for b in range(len(mass)):
            for g in range(groups):
                largest, order = mass[b, g].sort(descending=True)
                p = int((largest.cumsum(0) < self.tau * largest.sum()).sum()) + 1
                kept = set(order.tolist()[:p])
                if self.interval - 1 not in kept:  # the newest stays, in the place of the least
                    kept = {self.interval - 1, *order.tolist()[: p - 1]}
                dead = [i for i in range(self.interval) if i not in kept]
                self.alive[layer][b, g, window[dead]] = False


def alive_of(stats: Stats, seen: int) -> list[Tensor]:
    """The tokens that a first prefill of `seen` padded tokens kept, `[B, 1, seen]` a layer."""
    layers = []
    for layer in stats.layers:
        alive = torch.zeros(len(layer.kept), 1, seen, dtype=torch.bool)
        for b, positions in enumerate(layer.kept_positions):
            alive[b, 0, positions] = True
        layers.append(alive)
    return layers


def held_by(cache: Any) -> list[Tensor]:
    """The tokens that a compacted cache holds now, `[B, G, seen]` a layer."""
    layers = []
    for layer in cache.layers:
        alive = torch.zeros(*layer.lens.shape, layer.seen, dtype=torch.bool)
        for b, g in torch.cartesian_prod(*map(torch.arange, layer.lens.shape)).tolist():
            alive[b, g, layer.positions[b, g, : layer.lens[b, g]].long()] = True
        layers.append(alive)
    return layers


_current: list[Oracle] = []


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    return _current[-1].attend(module.layer_idx, q, k, v, mask), None


def _mask(batch_size: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


AttentionInterface.register("oracle", _attention)
AttentionMaskInterface.register("oracle", _mask)


@contextmanager
def judged_by(model: Any, oracle: Oracle) -> Iterator[None]:
    """Within the block the text attention of `model` is the oracle's."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    model.set_attn_implementation("oracle" if text is model.config else {"text_config": "oracle"})
    _current.append(oracle)
    try:
        yield
    finally:
        _current.pop()
        text._attn_implementation_internal = before
