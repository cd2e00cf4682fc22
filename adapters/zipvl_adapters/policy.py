"""What is kept, and when: the seam that every system of token sparsification fits into, and ZipVL on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

import zipvl_kernels as zk
from zipvl_adapters import ranks
from zipvl_adapters.dense import append_and_attend

if TYPE_CHECKING:
    from zipvl_adapters.cache import ZipVLLayer


@dataclass(frozen=True)
class Padding:
    """Which of `n` new rows are real: row `i` of sequence `b` where `leftpad[b] <= i < seqused[b]`."""

    leftpad: Tensor  # int32 [B]
    seqused: Tensor  # int32 [B]
    last_masked: bool  # some sequence's last row is padding
    is_regular: bool  # it is so: no holes, and no padding between the past and the new

    @classmethod
    def of(cls, mask: Tensor, n: int) -> Padding | None:
        """Of the last `n` columns of a padding mask, bool `[B, seen]`; None without any. Reads the mask on the host."""
        past, new = mask[:, :-n].any(1), mask[:, -n:]
        some = new.any(1)
        leftpad = torch.where(some, new.int().argmax(1), 0).int()
        seqused = torch.where(some, n - new.flip(1).int().argmax(1), 0).int()
        irregular = (new.sum(1) != seqused - leftpad) | (past & (leftpad > 0))
        is_irregular, is_padded, last_masked = torch.stack([irregular.any(), ~new.all(), ~new[:, -1].all()]).tolist()
        return cls(leftpad, seqused, last_masked, not is_irregular) if is_padded else None


@dataclass(frozen=True)
class Step:
    """What one layer's attention was called with."""

    module: nn.Module
    q: Tensor  # [B, Hq, n, D]
    k: Tensor  # [B, Hkv, n, D], the new tokens alone
    v: Tensor  # [B, Hkv, n, D]
    mask: Tensor | None  # None, padding bool [B, seen], or a 4-D mask [B, 1 or Hq, n, seen]
    padding: Padding | None  # of the new rows; None: all are real
    scale: float | None


class Policy:
    """The seam. A policy sees one layer at a time; all state lives in the layer (`ZipVLLayer`), none in the policy.

    The defaults keep everything and attend to everything, so a system overrides only what it changes:

    - `prefill`: systems that prune before attention and make attention itself sparse (ZipVL, AnchorCoder).
    - `after_prefill`: systems that attend densely and compact afterwards, from scores of rows of their choice and
      with a set per layer or per head (SCOPE, PrefixKV, Elastic Cache, Keyformer), or that prune key channels (ThinK).
    - `decode`: systems that read a part of a full cache (AttentionPredictor, TidalDecode).
    - `after_decode`: systems that evict while decoding (ZipVL every 100 tokens; SCOPE, PrefixKV, Elastic Cache,
      Keyformer every step or slot by slot).
    - `hooks`: systems that drop hidden states between decoder layers (FastV, SGL) hook the layers themselves.
    """

    @property
    def keeps_all(self) -> bool:
        """True: nothing is ever dropped, and the models compute exactly what they compute without a policy."""
        return True

    def prefill(self, layer: ZipVLLayer, step: Step) -> Tensor:
        """Attention output `[B, n, Hq, D]` of new rows, with their keys and values stored in the layer."""
        return append_and_attend(layer, step)

    def after_prefill(self, layer: ZipVLLayer, step: Step) -> None:
        """Called when `prefill` has stored its tokens."""

    def decode(self, layer: ZipVLLayer, step: Step) -> Tensor:
        """Attention output `[B, 1, Hq, D]` of one new row over what the layer holds, which the row joins."""
        if layer.is_complete:
            return append_and_attend(layer, step)
        layer.append(step.k, step.v, valid=None if step.mask is None else step.mask[:, -1:])
        out = zk.decode_attention(step.q, layer.keys, layer.values, layer.seqused_k, scale=step.scale)
        return out.transpose(1, 2).contiguous()

    def after_decode(self, layer: ZipVLLayer, step: Step) -> None:
        """Called when `decode` has stored its token."""

    def hooks(self, decoder: nn.Module) -> Sequence[RemovableHandle]:
        """Hooks on the decoder that `attach` removes again."""
        return ()


@dataclass(frozen=True)
class ZipVLPolicy(Policy):
    """ZipVL (arXiv 2410.08584): in each layer as many tokens as hold `tau` of the attention of a few probe rows.

    tau: share of the attention that decides how many tokens stay, in (0, 1]; 1 keeps every token.
    keep_ratio: a fixed share of the tokens in place of `tau`.
    num_recent, num_random: probe rows, the last ones and drawn ones.
    keep_first, keep_recent: tokens that always stay; the last row's logits are needed, so `keep_recent >= 1`.
    recompress_interval: the tokens of each so many decode steps are reselected once; None or 0 never.
    pool: "layer", one set a layer, or "kv_head", one set for each key/value head.
    seed: of the drawn probes.
    """

    tau: float = 0.975
    keep_ratio: float | None = None
    num_recent: int = 64
    num_random: int = 64
    keep_first: int = 0
    keep_recent: int = 1
    recompress_interval: int | None = 100
    pool: str = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "keep_ratio"):
            value = getattr(self, name)
            if value is None and name == "keep_ratio":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")
        least = {"num_recent": 1, "num_random": 0, "keep_first": 0, "keep_recent": 1, "seed": 0}
        if self.recompress_interval is not None:
            least["recompress_interval"] = 0
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if self.pool not in ("layer", "kv_head"):
            raise ValueError(f'pool: expected "layer" or "kv_head", got {self.pool!r}')

    @property
    def keeps_all(self) -> bool:
        return (self.tau if self.keep_ratio is None else self.keep_ratio) >= 1

    def layer_seed(self, layer: int) -> int:
        """Seed of a layer's drawn probes: every layer draws others, every rank the same."""
        return self.seed * 65537 + layer

    def probe_rows(self, n: int, layer: int, device: torch.device | None = None) -> Tensor:
        """The rows that a layer's prefill of `n` rows is scored from, int32 `[P]`."""
        seed = self.layer_seed(layer)
        return zk.probe_rows(n, num_recent=self.num_recent, num_random=self.num_random, seed=seed, device=device)

    def prefill(self, layer: ZipVLLayer, step: Step) -> Tensor:
        if self.keeps_all:
            return append_and_attend(layer, step)
        # While drafts are verified, every row of the prompt's end may be asked for its logits.
        keep_recent = max(self.keep_recent, self.num_recent) if layer.record_past else self.keep_recent
        out = self._first(layer, step, keep_recent) if layer.is_empty else self._later(layer, step, keep_recent)
        if step.padding is not None and step.padding.last_masked:
            # The last row's logits are read even where it is padding: as a query it stays, as a key it does not.
            last = zk.decode_attention(step.q[:, :, -1:], layer.keys, layer.values, layer.seqused_k, scale=step.scale)
            real = (step.padding.seqused == step.q.shape[2])[:, None, None, None]
            out[:, :, -1:] = torch.where(real, out[:, :, -1:], last)
        return out.transpose(1, 2).contiguous()

    def _first(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        """Prefill of an empty layer: the operator as it is, or its steps where other ranks have heads to score from."""
        if self._group(step) is not None:
            return self._first_over_ranks(layer, step, keep_recent)
        out, indices, counts = zk.zipvl_prefill_(
            step.q,
            step.k,
            step.v,
            tau=self.tau,
            keep_ratio=self.keep_ratio,
            num_recent=self.num_recent,
            num_random=self.num_random,
            seed=self.layer_seed(layer.index),
            keep_first=self.keep_first,
            keep_recent=keep_recent,
            scale=step.scale,
            leftpad_k=step.padding.leftpad if step.padding else None,
            seqused_k=step.padding.seqused if step.padding else None,
            pool=self.pool,
        )
        layer.note(step, indices, counts, self._scored(layer, step))
        layer.fill(step.k, step.v, indices, counts)
        return out

    def _first_over_ranks(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        rows = self.probe_rows(step.q.shape[2], layer.index, step.q.device)
        valid = {"leftpad_k": step.padding.leftpad, "seqused_k": step.padding.seqused} if step.padding else {}
        accumulated, normalized = self._score(step, step.q, step.k, rows, **valid)
        indices, counts = self._select(
            accumulated, normalized, keep_first=self.keep_first, keep_recent=keep_recent, **valid
        )
        zk.compact_kv_(step.k, step.v, indices, counts)
        out = zk.sparse_attention(step.q, step.k, step.v, indices, counts, scale=step.scale, kv_compacted=True)
        layer.note(step, indices, counts, self._scored(layer, step))
        layer.fill(step.k, step.v, indices, counts)
        return out

    def _later(self, layer: ZipVLLayer, step: Step, keep_recent: int) -> Tensor:
        """A later turn or chunk: the past stays, the new tokens are selected among themselves."""
        (B, Hq, n, D), G, used = step.q.shape, layer.groups, layer.used
        device = step.q.device
        # A group stands in the batch, as a sequence of its own: each has a past of its own length.
        q, k, v = (fold(x, G) for x in (step.q, step.k, step.v))
        past = layer.lens.flatten()  # [B * G]
        leftpad = seqused = None
        if step.padding is not None:
            leftpad, seqused = (x.repeat_interleave(G) for x in (step.padding.leftpad, step.padding.seqused))

        # [past | new] without a gap: new row i stands at column past + i. A chunk is left-padded only where nothing
        # is past, so its padding is the buffer's left padding too.
        at = past.long()[:, None] + torch.arange(n, device=device)  # [B * G, n]
        K, V = (
            torch.cat([fold(held[:, :, :used], G), new.new_zeros(new.shape)], 2).scatter_(
                2, at[:, None, :, None].expand_as(new), new
            )
            for held, new in ((layer.keys, k), (layer.values, v))
        )
        accumulated, normalized = self._score(
            step,
            q,
            K,
            self.probe_rows(n, layer.index, device),
            q_start=past,
            leftpad_k=leftpad,
            seqused_k=past + (n if seqused is None else seqused),
        )
        indices, counts = self._select(
            accumulated.gather(2, at[:, None]),
            normalized.gather(2, at[:, None]),
            keep_first=self.keep_first,
            keep_recent=keep_recent,
            leftpad_k=leftpad,
            seqused_k=seqused,
        )
        slot = torch.arange(used + n, dtype=torch.int32, device=device)[None]
        start = past[:, None]
        kept_new = indices[:, 0].gather(1, (slot - start).clamp(0, n - 1).long()) + start
        whole = torch.where(slot < start, slot, kept_new)
        total = past[:, None] + counts
        whole = whole.masked_fill(slot >= total, -1)[:, None]
        out = zk.sparse_attention(q, K, V, whole, total, scale=step.scale, q_start=past)
        zk.compact_kv_(K, V, whole, total)
        new_indices, new_counts = indices.view(B, G, n), counts.view(B, G)
        layer.note(step, new_indices, new_counts, self._scored(layer, step))
        layer.refill(K.view(B, -1, used + n, D), V.view(B, -1, used + n, D), new_indices, new_counts)
        return out.reshape(B, Hq, n, D)

    def _scored(self, layer: ZipVLLayer, step: Step) -> Callable[[], Tensor]:
        return partial(self.probe_rows, step.q.shape[2], layer.index)

    def _group(self, step: Step) -> ProcessGroup | None:
        """The ranks whose scores are summed; None where this process has all heads that share a set."""
        return None if self.pool == "kv_head" else ranks.group_of(step.module, step.q)

    def _score(self, step: Step, q: Tensor, k: Tensor, rows: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
        """Scores `[B, 1, N]` of each sequence over all of its heads, also those of other ranks that share its set."""
        group = self._group(step)
        if group is None:
            return zk.score_tokens(q, k, rows, scale=step.scale, **where)
        return ranks.score_tokens(group, q, k, rows, scale=step.scale, **where)

    def _select(
        self,
        accumulated: Tensor,
        normalized: Tensor,
        *,
        keep_first: int,
        keep_recent: int,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return zk.select_tokens(
            accumulated,
            normalized,
            tau=self.tau if self.keep_ratio is None else None,
            keep_ratio=self.keep_ratio,
            keep_first=keep_first,
            keep_recent=keep_recent,
            leftpad_k=leftpad_k,
            seqused_k=seqused_k,
        )

    def after_decode(self, layer: ZipVLLayer, step: Step) -> None:
        """Every `recompress_interval` tokens: reselect among them, scored from the newest row; the rest is untouched.

        Reads the new length on the host, once a layer and interval.
        """
        if not self.recompress_interval or not layer.due(step, self.recompress_interval):
            return
        G, w = layer.groups, layer.fresh
        keys, values = fold(layer.keys, G), fold(layer.values, G)  # views: the layer's storage is contiguous
        start = layer.anchor.flatten()
        length = layer.lens.flatten() - start  # of the window; shorter than w only where steps were masked
        at = start.long()[:, None] + torch.arange(w, device=keys.device)  # [B * G, w]
        rows = at[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        K, V = keys.gather(2, rows), values.gather(2, rows)
        newest = torch.zeros(1, dtype=torch.int32, device=keys.device)
        q = fold(step.q[:, :, -1:], G)
        accumulated, normalized = self._score(step, q, K, newest, q_start=length - 1, seqused_k=length)
        indices, counts = self._select(
            accumulated, normalized, keep_first=0, keep_recent=self.keep_recent, seqused_k=length
        )
        zk.compact_kv_(K, V, indices, counts)
        keys.scatter_(2, rows, K)
        values.scatter_(2, rows, V)
        positions = layer.positions.view(at.shape[0], -1)
        positions.scatter_(1, at, positions.gather(1, at).gather(1, indices[:, 0].clamp(min=0).long()))
        layer.shorten(layer.anchor + counts.view_as(layer.anchor))


def fold(x: Tensor, groups: int) -> Tensor:
    """`[B, H, ...]` as `[B * groups, H / groups, ...]`."""
    return x if groups == 1 else x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])
