"""What a prefill saw and kept, in tokens, bytes and floating-point operations, each against dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zipvl_adapters.cache import ZipVLCache, ZipVLLayer
    from zipvl_adapters.policy import Padding


@dataclass(frozen=True)
class Prefill:
    """One prefill, or one chunk of one, as a layer noted it down: nothing here has been read from the device yet."""

    batch: int
    n: int  # padded length
    start: int  # true position of its first row
    padding: Padding | None
    pads: Tensor | None  # int32 [B], padding tokens before it
    past: Tensor | None  # int32 [B, G], rows held before it; None: every real token
    indices: Tensor | None  # int32 [B, G, n], its kept rows; None: every real row
    counts: Tensor | None  # int32 [B, G]
    probes: Callable[[], Tensor] | None  # the rows that were scored
    heads: tuple[int, int, int]  # Hq, Hkv, D

    def read(self) -> Counted:
        """Reads the device, and counts."""
        B, n = self.batch, self.n
        first = self.padding.leftpad.tolist() if self.padding else [0] * B
        end = self.padding.seqused.tolist() if self.padding else [n] * B
        pads = self.pads.tolist() if self.pads is not None else [0] * B
        seen = [e - f for f, e in zip(first, end, strict=True)]
        before = [self.start - p for p in pads]  # real tokens, as a dense cache holds them
        past = self.past.tolist() if self.past is not None else [[x] for x in before]
        if self.indices is None or self.counts is None:
            rows = [[torch.arange(f, e)] for f, e in zip(first, end, strict=True)]
        else:
            indices, counts = self.indices.cpu().long(), self.counts.tolist()
            rows = [[indices[b, g, :c] for g, c in enumerate(counts[b])] for b in range(B)]
        probes = self.probes().tolist() if self.probes else []
        Hq, _, D = self.heads
        pairs, dense, scored = 0, 0, 0
        for b in range(B):
            G = max(len(rows[b]), len(past[b]))
            sizes = zip([len(x) for x in rows[b]] * (G // len(rows[b])), past[b] * (G // len(past[b])), strict=True)
            pairs += Hq // G * sum(c * p + c * (c + 1) // 2 for c, p in sizes)
            dense += Hq * (seen[b] * before[b] + seen[b] * (seen[b] + 1) // 2)
            held = sum(past[b]) // len(past[b])
            scored += Hq * sum(held + i - first[b] + 1 for i in probes if first[b] <= i < end[b])
        # Positions in the padded batch, of tokens that at least one group of heads kept.
        kept = [torch.cat(x).unique() + self.start for x in rows]  # type: ignore[no-untyped-call]
        return Counted(seen, kept, 4 * D * pairs + 2 * D * scored, 4 * D * dense)


@dataclass(frozen=True)
class Counted:
    """A `Prefill`, read."""

    seen: list[int]
    kept: list[Tensor]  # int64, per sequence
    flops: int
    flops_dense: int


@dataclass(frozen=True)
class LayerStats:
    """One decoder layer: the last prefill, and the cache as it is now.

    seen, kept: real tokens a sequence, and how many of them the prefill kept (for `pool="kv_head"`: at least one
    head kept). kept_positions: which, int64 `[kept]` a sequence, counted in the padded batch.
    kv_bytes: keys and values held now, rows in use; kv_bytes_dense: the same for all real tokens seen so far.
    attention_flops: QK^T and PV of the prefill, 4 D for each query head and (query, key) pair, and QK^T of the probe
    rows, 2 D; attention_flops_dense: 4 D for each causal pair of real tokens.
    """

    layer: int
    seen: tuple[int, ...]
    kept: tuple[int, ...]
    kept_positions: tuple[Tensor, ...]
    kv_bytes: int
    kv_bytes_dense: int
    attention_flops: int
    attention_flops_dense: int

    @property
    def ratio(self) -> tuple[float, ...]:
        """Share of the tokens that the prefill kept, per sequence."""
        return tuple(k / s if s else 1.0 for k, s in zip(self.kept, self.seen, strict=True))

    @classmethod
    def of(cls, layer: ZipVLLayer) -> LayerStats:
        """Reads one layer of a cache."""
        chunks = [p.read() for p in layer.prefills]
        seen = [sum(x) for x in zip(*(c.seen for c in chunks), strict=True)]
        kept = [torch.cat(x) for x in zip(*(c.kept for c in chunks), strict=True)]
        _, Hkv, D = layer.prefills[-1].heads
        token = 2 * Hkv * D * layer.keys.element_size()
        real = int(layer.seen) * layer.batch_size - (int(layer.pads.sum()) if layer.pads is not None else 0)
        held = real if layer.lens is None else int(layer.lens.sum()) / layer.groups
        return cls(
            layer=layer.index,
            seen=tuple(seen),
            kept=tuple(len(x) for x in kept),
            kept_positions=tuple(kept),
            kv_bytes=round(held * token),
            kv_bytes_dense=real * token,
            attention_flops=sum(c.flops for c in chunks),
            attention_flops_dense=sum(c.flops_dense for c in chunks),
        )


@dataclass(frozen=True)
class Stats:
    """All layers of a cache that has seen a prompt; `table()` for people."""

    layers: tuple[LayerStats, ...]

    @classmethod
    def of(cls, cache: ZipVLCache) -> Stats:
        """Reads a cache; raises RuntimeError if it is empty."""
        if any(not layer.prefills for layer in cache.layers):
            raise RuntimeError("stats: the cache has seen no prompt yet; run the model first")
        return cls(tuple(LayerStats.of(layer) for layer in cache.layers))

    @property
    def kept_ratio(self) -> float:
        """Mean over layers and sequences."""
        ratios = [r for layer in self.layers for r in layer.ratio]
        return sum(ratios) / len(ratios)

    @property
    def kv_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def kv_bytes_dense(self) -> int:
        """Of all layers."""
        return sum(layer.kv_bytes_dense for layer in self.layers)

    @property
    def attention_flops(self) -> int:
        """Of all layers."""
        return sum(layer.attention_flops for layer in self.layers)

    @property
    def attention_flops_dense(self) -> int:
        """Of all layers."""
        return sum(layer.attention_flops_dense for layer in self.layers)

    def table(self) -> str:
        """A line a layer and a last one for all, in plain text."""
        head = (
            f"{'layer':>5} {'seen':>8} {'kept':>8} {'ratio':>7} {'KV bytes':>12} {'of dense':>8} {'FLOPs of dense':>14}"
        )
        lines = [head]
        for x in self.layers:
            ratio = sum(x.ratio) / len(x.ratio)
            lines.append(_line(str(x.layer), sum(x.seen), sum(x.kept), ratio, x))
        seen, kept = (sum(sum(getattr(x, name)) for x in self.layers) for name in ("seen", "kept"))
        return "\n".join([*lines, _line("all", seen, kept, self.kept_ratio, self)])


def _line(name: str, seen: int, kept: int, ratio: float, x: LayerStats | Stats) -> str:
    memory = x.kv_bytes / x.kv_bytes_dense if x.kv_bytes_dense else 1.0
    flops = x.attention_flops / x.attention_flops_dense if x.attention_flops_dense else 1.0
    return f"{name:>5} {seen:>8} {kept:>8} {ratio:>7.1%} {x.kv_bytes:>12} {memory:>8.1%} {flops:>14.1%}"
