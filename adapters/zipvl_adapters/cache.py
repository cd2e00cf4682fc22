"""The compacted key/value cache: ragged storage, one layer at a time, behind transformers' own `Cache`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from zipvl_adapters.families import text_config_of
from zipvl_adapters.policy import Policy, Step
from zipvl_adapters.stats import Prefill, Stats

SPARE = 64  # rows that storage grows by when it is full, so that a decode step seldom copies the cache

# transformers up to 5.14 or so cannot announce speculative decoding: there, a crop is the first sign of it.
_ANNOUNCES_DRAFTS = hasattr(Cache, "activate_past_recording")


class ZipVLLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, as its policy kept them.

    Either *compacted*: sequence `b` (and KV head group `g`) holds its tokens in rows `[0, lens[b, g])` of `keys` and
    `values`, padding never among them; or *complete*: every column of the padded batch is there, as in a stock cache.

    keys, values: `[B, Hkv, capacity, D]`, contiguous. lens: int32 `[B, G]`. positions: int32 `[B, G, capacity]`, true
    positions in the padded batch. seen: tokens seen, padding included. used: host-side bound on `lens`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    keys: Any
    values: Any
    lens: Any
    positions: Any
    anchor: Any

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy = policy
        self.index = index
        self.reset()

    def reset(self) -> None:
        """Back to empty; the cache may then serve another prompt, or another model."""
        self.keys = self.values = self.lens = self.positions = None
        self.anchor = None  # int32 [B, G]: rows before it are never reselected
        self.pads: Tensor | None = None  # int32 [B]
        self.is_initialized = False
        self.seen = self.used = self.fresh = 0  # fresh: decode steps since `anchor`
        self.pending = False  # update() came, attention did not yet
        self.by_mask = False  # a 4-D mask was used: from then on masks decide what is seen
        self.record_past = False  # drafts are being verified: they are appended whole, so that `crop` can undo them
        self.owner: weakref.ref[nn.Module] | None = None
        self.prefills: list[Prefill] = []
        self.decoded = False  # a decode step came since the last prefill

    # -- between update() and the attention function ------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands this layer over to the attention function, on the keys: storing waits until attention has chosen."""
        self.pending = True
        tagged = key_states.view_as(key_states)
        tagged._zipvl_layer = self  # type: ignore[attr-defined]
        return tagged, value_states

    def begin(self, module: nn.Module, n: int) -> None:
        """The attention function of `module` takes over, with `n` new tokens."""
        self.pending = False
        if self.owner is None:
            self.owner = weakref.ref(module)
        elif self.owner() is not module:
            raise ValueError(
                "past_key_values: this ZipVLCache belongs to another model; make one for each, or reset() it first"
            )
        self.seen += n

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Nothing stored yet."""
        return self.keys is None

    @property
    def has_past(self) -> bool:
        """Tokens came before."""
        return self.seen > 0

    @property
    def is_complete(self) -> bool:
        """Every column is stored, padding too."""
        return self.keys is not None and self.lens is None

    @property
    def groups(self) -> int:
        """Sets a sequence: 1, or one for each KV head."""
        return int(self.lens.shape[1])

    @property
    def seqused_k(self) -> Tensor:
        """`lens` as the operators take it: int32 `[B]` or `[B, Hkv]`."""
        return self.lens[:, 0] if self.lens.shape[1] == 1 else self.lens  # type: ignore[no-any-return]

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first."""
        return -1 if self.keys is None else int(self.keys.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of keys and values, spare rows included."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes on the model's dtype and device; storage itself comes with the first prefill."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and masks are counted in these."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of a mask: over all tokens seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit (the name that transformers before 5.17 asks by)."""
        return -1

    # -- writing --------------------------------------------------------------------------------------------------

    def fill(self, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Takes over a first prefill: `k, v` hold the set in rows `[0, counts)`, `indices` says which rows they were.

        Reads the largest count on the host: the one synchronisation of a layer's prefill, without which the
        full-length buffers could not be replaced by ones of the size that is needed.
        """
        self._store(k, v, indices + (self.seen - indices.shape[-1]), counts)

    def refill(self, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Takes over a later prefill: `k, v` hold the past and then `counts` of the new rows, `indices` among these."""
        n = indices.shape[-1]
        at = self.lens[:, :, None].long() + torch.arange(n, device=indices.device)
        positions = torch.cat([self.positions[:, :, : self.used], torch.zeros_like(indices)], 2)
        positions.scatter_(2, at, indices + (self.seen - n))
        self._store(k, v, positions, self.lens + counts)

    def _store(self, k: Tensor, v: Tensor, positions: Tensor, lens: Tensor) -> None:
        self.used = int(lens.max()) if lens.numel() else 0  # the host synchronisation
        self.keys, self.values = (x[:, :, : self.used].clone(memory_format=torch.contiguous_format) for x in (k, v))
        self.positions = positions[:, :, : self.used].contiguous()
        self.lens = lens
        self.lazy_initialization(k, v)
        self.mark()

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Adds new tokens behind each sequence's own; with `valid` bool `[B, 1]`, one that only counts where true."""
        n = k.shape[2]
        self._grow(n)
        at = self.lens[:, :, None].long() + torch.arange(n, device=k.device)  # [B, G, n]
        rows = at[..., None].expand_as(k)  # G is 1 or Hkv
        self.keys.scatter_(2, rows, k)
        self.values.scatter_(2, rows, v)
        positions = torch.arange(self.seen - n, self.seen, dtype=torch.int32, device=k.device)
        self.positions.scatter_(2, at, positions.expand_as(at))
        self.lens = self.lens + (n if valid is None else valid.to(torch.int32))
        if valid is not None:
            self.add_pads(1 - valid.sum(1, dtype=torch.int32))
        self.used += n
        self.fresh += n
        self.decoded |= n == 1

    def _grow(self, n: int) -> None:
        """Makes room for `n` more rows."""
        missing = self.used + n - self.keys.shape[2]
        # Storage made under inference_mode cannot be written outside it.
        if missing <= 0 and not (self.keys.is_inference() and not torch.is_inference_mode_enabled()):
            return
        spare = max(missing, 0) + SPARE
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, spare)) for x in (self.keys, self.values))
        self.positions = nn.functional.pad(self.positions, (0, spare))

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens to an empty or complete layer, as a stock cache does."""
        if self.keys is None:
            self.lazy_initialization(k, v)
            # A plain copy: a tagged tensor would hold the layer, and the layer it.
            self.keys, self.values = (x.view_as(x) for x in (k, v))
        else:
            self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.used = self.keys.shape[2]
        return self.keys, self.values

    def shorten(self, lens: Tensor) -> None:
        """Fewer rows are in use from now on. Reads the largest length on the host."""
        self.lens = lens
        self.used = int(lens.max())
        self.mark()

    def mark(self) -> None:
        """What is held now is never reselected again."""
        self.anchor, self.fresh = self.lens, 0

    def due(self, step: Step, interval: int) -> bool:
        """Whether the tokens of the last `interval` decode steps are to be reselected now, after `step`."""
        return self.fresh >= interval

    def add_pads(self, pads: Tensor) -> None:
        """Counts padding tokens among those seen, int32 `[B]`."""
        self.pads = pads if self.pads is None else self.pads + pads

    def note(
        self,
        step: Step,
        indices: Tensor | None = None,
        counts: Tensor | None = None,
        probes: Callable[[], Tensor] | None = None,
    ) -> None:
        """Keeps for `stats` what a prefill sees and keeps, before it is stored; without `indices`, all of it.

        Chunks that follow one another are one prefill; a decode step ends it.
        """
        n = step.q.shape[2]
        if self.keys is not None and (n == 1 or self.record_past):
            self.decoded = True
            return
        if self.decoded:
            self.prefills, self.decoded = [], False
        past = None if self.is_empty else self.lens
        heads = (step.q.shape[1], step.k.shape[1], step.q.shape[3])
        start = self.seen - n
        self.prefills.append(
            Prefill(step.q.shape[0], n, start, step.padding, self.pads, past, indices, counts, probes, heads)
        )
        if step.padding is not None:
            self.add_pads(n - (step.padding.seqused - step.padding.leftpad))

    # -- what transformers does to a cache ------------------------------------------------------------------------

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "lens", "positions", "anchor", "pads"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, change(held))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence `i` becomes what `beam_idx[i]` was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences `indices` stay."""
        self._map(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        """Drafts will come, be verified and in part be cropped: every one is stored until then."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens seen: a negative number of them, or a positive length that is to remain.

        A compacted layer reads its new length on the host.
        """
        change = int(tokens_to_remove)  # some versions pass a 0-d tensor
        seen = self.seen + change if change <= 0 else min(change, self.seen)
        self.record_past |= not _ANNOUNCES_DRAFTS
        if seen == self.seen or self.is_empty:
            return
        self.seen = max(seen, 0)
        if self.is_complete:
            self.keys, self.values = self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
            self.used = self.seen
        else:
            held = torch.arange(self.positions.shape[-1], device=self.lens.device) < self.lens[:, :, None]
            self.shorten((held & (self.positions < self.seen)).sum(-1, dtype=torch.int32))

    def offload(self) -> None:
        """Not supported."""
        raise NotImplementedError("a ZipVLCache cannot be offloaded: pass no offloading or cache_implementation")

    prefetch = offload


class ZipVLCache(DynamicCache):
    """The cache of one conversation or batch, compacted by `policy` layer by layer as the prefill goes.

    policy: what is kept. config: the model's. The model's text attention has to be ours, through `attach`, `enable`
    or `from_pretrained(attn_implementation=...)`. Raises ValueError for a text model that is not supported.
    """

    layers: list[ZipVLLayer]  # type: ignore[assignment]

    def __init__(self, policy: Policy, config: PreTrainedConfig) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: expected a Policy such as ZipVLPolicy(), got {type(policy).__name__}")
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected the model's config, got {type(config).__name__}")
        depth = text_config_of(config).num_hidden_layers
        Cache.__init__(self, layers=[ZipVLLayer(policy, i) for i in range(depth)])
        self.policy = policy
        self.session: weakref.ref[Any] | None = None  # the attach() that it serves

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention, before the attention function."""
        if any(layer.pending for layer in self.layers):
            for layer in self.layers:
                layer.pending = False
            raise RuntimeError(
                "a ZipVLCache needs the model's text attention to be ours, and it is not: "
                "call zipvl_adapters.enable(model) first, or generate inside zipvl_adapters.attach(model, policy)"
            )
        return self.layers[layer_idx].update(key_states, value_states)

    def reset(self) -> None:
        """Back to empty, free for another prompt or model."""
        super().reset()  # type: ignore[no-untyped-call]
        self.session = None

    def activate_past_recording(self) -> None:
        """Drafts will come (see the layers'); older transformers have no such method."""
        for layer in self.layers:
            layer.activate_past_recording()

    @property
    def nbytes(self) -> int:
        """Bytes of the storage that all layers hold now."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def stats(self) -> Stats:
        """What the last prefill saw and kept, and what is held now. Reads the device; call it when you want to know."""
        return Stats.of(self)
