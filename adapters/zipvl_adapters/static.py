"""A compacted cache of fixed size, with its lengths on the device: a decode step compiles to one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from zipvl_adapters.cache import ZipVLCache, ZipVLLayer
from zipvl_adapters.policy import Step, ZipVLPolicy

ROUND = 256  # rows that a capacity is a multiple of: prompts that keep about as many tokens share a compiled graph
NO_DRAFTS = "past_key_values: a ZipVLStaticCache cannot verify drafts; use a ZipVLCache"


class ZipVLStaticLayer(ZipVLLayer):
    """A `ZipVLLayer` that grows during the prefill and, once `freeze` has been called, changes in place alone.

    Frozen: keys, values `[B, Hkv, capacity, D]`; `lens` and `anchor` int32 `[B, G]`, `positions` int32
    `[B, G, capacity]` and `seen` int64 `[]`, one for all layers of a device, keep their addresses, and nothing on the
    host changes from step to step.
    """

    is_compileable = True
    is_croppable = False

    seen: Any
    advances: bool  # of the layers that share `seen`, the one that adds to it: a kernel less for each of the others
    query: Any  # [B, Hq, 1, D], of the newest row: what is reselected is scored from it

    def reset(self) -> None:
        """Back to empty, for another prompt."""
        super().reset()
        self.is_frozen = self.is_due = False
        self.query = None
        self.scale: float | None = None

    @property
    def has_past(self) -> bool:
        """Tokens came before."""
        return not self.is_empty

    def freeze(self, capacity: int, shared: dict[torch.device, Tensor]) -> None:
        """Takes on its fixed size, and shares `seen` with the layers before it. Reads nothing on the host."""
        spare = capacity - self.keys.shape[2]
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, spare)) for x in (self.keys, self.values))
        self.positions = nn.functional.pad(self.positions, (0, spare))
        self.lens, self.anchor = self.lens.clone(), self.lens.clone()
        self.advances = self.keys.device not in shared
        if self.advances:
            shared[self.keys.device] = torch.full((), self.seen, device=self.keys.device)
        self.seen = shared[self.keys.device]
        for x in (self.keys, self.values, self.positions, self.lens, self.anchor, self.seen, self.query):
            torch._dynamo.mark_static_address(x)  # type: ignore[no-untyped-call]
        self.is_frozen = True

    def begin(self, module: nn.Module, n: int) -> None:
        """The attention function of `module` takes over, with `n` new tokens."""
        if not self.is_frozen:
            super().begin(module, n)
        else:
            self.pending = False
            if self.advances:
                self.seen.add_(n)

    def note(self, step: Step, *args: Any, **kwargs: Any) -> None:
        """Keeps for `stats` what a prefill sees and keeps; the query's buffer and its scale come with it."""
        super().note(step, *args, **kwargs)
        self.query, self.scale = step.q[:, :, -1:].clone(), step.scale

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Adds one new token behind each sequence's own, in place."""
        if not self.is_frozen:
            raise RuntimeError(
                "past_key_values: expected a ZipVLStaticCache that was made ready between prefill and decoding; "
                "call model.generate(**inputs, **cache.generate_arguments())"
            )
        # index_put_, since compiled code does that in place; a scatter_ it would do on a copy of the whole cache.
        at = self.lens.long()  # [B, G]
        (B, G), heads = at.shape, k.shape[1]
        b, g, h = [torch.arange(n, device=k.device) for n in (B, G, heads)]
        self.keys.index_put_((b[:, None], h, at), k[:, :, 0])  # G is 1 or the number of heads
        self.values.index_put_((b[:, None], h, at), v[:, :, 0])
        self.positions.index_put_((b[:, None], g, at), (self.seen - 1).to(torch.int32))
        self.lens.add_(1)

    def due(self, step: Step, interval: int) -> bool:
        """Never within a step, whose query is kept for the time after it."""
        if not self.is_due:
            self.query.copy_(step.q)
        return self.is_due

    def recompress(self, policy: ZipVLPolicy) -> None:
        """Between two steps, what `policy.after_decode` does after a step."""
        module = self.owner() if self.owner is not None else None
        assert module is not None
        self.fresh, self.is_due = policy.recompress_interval or 0, True
        nothing = self.query[:, :, :0]
        policy.after_decode(self, Step(module, self.query, nothing, nothing, None, None, self.scale))
        self.is_due = False

    def shorten(self, lens: Tensor) -> None:
        """Fewer rows are in use from now on, and are not reselected again. In place, reads nothing on the host."""
        self.lens.copy_(lens)
        self.anchor.copy_(lens)
        self.fresh = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of a mask: while decoding, of the new token alone, whose mask is never made."""
        if self.has_past and query_length > 1:
            raise ValueError(
                "past_key_values: a ZipVLStaticCache takes its prompt at once and then one token at a time, got "
                f"{query_length} more; reset() it for another prompt, or use a ZipVLCache for turns, chunks and drafts"
            )
        return (query_length, 0) if self.is_frozen else super().get_mask_sizes(query_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence `i` becomes what `beam_idx[i]` was, in place."""
        for x in (self.keys, self.values, self.positions, self.lens, self.anchor, self.query):
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def activate_past_recording(self) -> None:
        """Not supported."""
        raise NotImplementedError(NO_DRAFTS)

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported."""
        raise NotImplementedError("past_key_values: a ZipVLStaticCache cannot forget tokens; use a ZipVLCache")


class ZipVLStaticCache(ZipVLCache):
    """A `ZipVLCache` whose decode step compiles to one graph, for one prompt (or batch of prompts) at a time.

    The prefill is as ever. Then every layer takes on one capacity, the most tokens that a layer kept and
    `max_new_tokens`, rounded up, and lengths live on the device. Use it as

        cache = ZipVLStaticCache(policy, config=model.config, max_new_tokens=200)
        model.generate(**inputs, **cache.generate_arguments())

    with the model's attention ours (`enable`). `generate()` compiles the decode step by itself on a GPU; elsewhere, or
    with settings of your own, give it a `compile_config`. Tokens are reselected between steps, outside the graph.
    policy: a ZipVLPolicy that drops tokens. config: the model's. max_new_tokens: the most that will be generated.
    Raises TypeError or ValueError for what is not supported.
    """

    layers: list[ZipVLStaticLayer]  # type: ignore[assignment]

    def __init__(self, policy: ZipVLPolicy, config: PreTrainedConfig, max_new_tokens: int) -> None:
        if not isinstance(policy, ZipVLPolicy):
            raise TypeError(f"policy: expected a ZipVLPolicy, got {type(policy).__name__}; others take a ZipVLCache")
        if policy.keeps_all:
            raise ValueError(
                'policy: expected one that drops tokens; to keep all, use generate(cache_implementation="static")'
            )
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer of at least 1, got {max_new_tokens!r}")
        super().__init__(policy, config)
        Cache.__init__(self, layers=[ZipVLStaticLayer(policy, layer.index) for layer in self.layers])
        self.policy: ZipVLPolicy = policy
        self.max_new_tokens = max_new_tokens

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate()`: this cache, its length, and what has to happen between steps.

        Stopping criteria of your own are added to the list under `stopping_criteria`.
        """
        between = StoppingCriteriaList([_BetweenSteps(self)])
        return {"past_key_values": self, "max_new_tokens": self.max_new_tokens, "stopping_criteria": between}

    def freeze(self) -> None:
        """All layers take on one capacity. Raises ValueError where a layer holds padding, because of a mask."""
        if any(layer.is_empty for layer in self.layers):  # older transformers ask about drafts before the prompt
            raise NotImplementedError(NO_DRAFTS)
        if any(layer.lens is None for layer in self.layers):
            raise ValueError(
                "attention_mask: a ZipVLStaticCache takes padding masks without holes; use a ZipVLCache for others"
            )
        most = max(layer.used for layer in self.layers) + self.max_new_tokens
        shared: dict[torch.device, Tensor] = {}
        for layer in self.layers:
            layer.freeze(-(-most // ROUND) * ROUND, shared)


class _BetweenSteps(StoppingCriteria):
    """Called by `generate()` after the prefill and after every step, outside the compiled graph; stops nothing."""

    def __init__(self, cache: ZipVLStaticCache) -> None:
        self.cache = cache
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        cache, interval = self.cache, self.cache.policy.recompress_interval
        if not self.calls:
            cache.freeze()
        elif interval and self.calls % interval == 0:
            for layer in cache.layers:
                layer.recompress(cache.policy)
        self.calls += 1
        if self.calls > cache.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: this ZipVLStaticCache was made for {cache.max_new_tokens}; make it for more"
            )
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
