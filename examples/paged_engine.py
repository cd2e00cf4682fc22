"""A small serving engine: continuous batching over a paged KV cache, dense or with ZipVL, on a transformers model.

What is here is what an engine does with the operators: a scheduler that admits by free pages and preempts where there
are too few, a prefill that writes pages, compacts them in place and gives the freed ones back, and a decode step over
block tables. What it leaves out: chunked prefill, prefix caching (docs/integration.md says how both go together with
compaction), sampling, and reselecting tokens while decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from paged_pool import PagedCache
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from zipvl_adapters import ZipVLPolicy

import zipvl_kernels as zk

ATTENTION = "paged_engine"


@dataclass(eq=False)
class Request:
    """A prompt, and what the engine knows about it."""

    inputs: dict[str, Any]  # what the processor made of one prompt
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)  # the answer so far
    tables: list[list[int]] = field(default_factory=list)  # its pages: one table, or one for each layer
    lengths: list[int] = field(default_factory=list)  # rows that each layer holds
    position: int = 0  # rotary position of the next token: it counts dropped tokens too
    kept: float = 1.0  # share of the prompt's rows that stayed, mean over layers
    preemptions: int = 0
    is_done: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, visual ones included."""
        return int(self.inputs["input_ids"].shape[1])


@dataclass
class Prefill:
    """Attention of one prompt in every layer; what it drops is gone from the layer's pages afterwards."""

    cache: PagedCache
    policy: ZipVLPolicy | None
    tables: Tensor  # int32 [num_layers, 1, max_blocks]
    counts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of each layer: rows used, pages freed

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        n = q.shape[2]
        table = self.tables[layer]
        self.cache.write(layer, table, torch.arange(n, dtype=torch.int32, device=q.device)[None], k, v)
        if self.policy is None or self.policy.keeps_all:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out, indices, counts = zk.zipvl_prefill_(
            q,
            k,
            v,
            tau=self.policy.tau,
            keep_ratio=self.policy.keep_ratio,
            num_recent=self.policy.num_recent,
            num_random=self.policy.num_random,
            seed=self.policy.layer_seed(layer),
            keep_first=self.policy.keep_first,
            keep_recent=self.policy.keep_recent,
            scale=scale,
        )
        used = torch.full((1,), n, dtype=torch.int32, device=q.device)
        self.counts.append(zk.compact_paged_kv_(*self.cache.layer(layer), indices, counts, table, used))
        return out


@dataclass
class Decode:
    """Attention of one new token of each running request in every layer."""

    cache: PagedCache
    tables: Tensor  # int32 [num_layers, B, max_blocks]
    lengths: Tensor  # int32 [num_layers, B], without the new token

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        table, length = self.tables[layer], self.lengths[layer]
        self.cache.write(layer, table, length[:, None], k, v)
        return zk.decode_attention(q, *self.cache.layer(layer), length + 1, scale=scale, block_table=table)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, engine: Prefill | Decode, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, with what the engine passes to the model's forward as `engine`."""
    return engine(module.layer_idx, q, k, v, kwargs.get("scaling")).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # nothing is padded


class Engine:
    """Serves requests, first come first served, from a pool of `num_blocks` pages a layer.

    model: a supported model, whose text attention becomes the engine's. policy: None is dense attention; sets of each
    KV head (`pool="kv_head"`) and reselection (`recompress_interval`) are not in this engine. stop_tokens: end an
    answer. table_per_layer: see PagedCache. Raises ValueError for a policy that the engine cannot follow.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: ZipVLPolicy | None,
        *,
        num_blocks: int,
        block_size: int = 16,
        table_per_layer: bool = False,
        stop_tokens: Iterable[int] = (),
    ) -> None:
        if policy is not None and (policy.pool != "layer" or policy.recompress_interval):
            raise ValueError(f'policy: expected pool="layer" and recompress_interval=None, got {policy}')
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        model.set_attn_implementation(ATTENTION if text is config else {"text_config": ATTENTION})
        self.model = model
        self.policy = policy
        self.stop_tokens = frozenset(stop_tokens)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.cache = PagedCache(
            config,
            num_blocks=num_blocks,
            block_size=block_size,
            table_per_layer=table_per_layer,
            dtype=model.dtype,
            device=model.device,
        )

    def submit(self, inputs: dict[str, Any], max_new_tokens: int) -> Request:
        """Queues one prompt. Raises ValueError where it would not fit even if it were alone."""
        ids = inputs["input_ids"]
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1] or max_new_tokens < 1:
            shape = tuple(ids.shape)
            raise ValueError(f"inputs: expected one prompt and at least one new token, got {shape}, {max_new_tokens}")
        # The last token is never written: nothing comes after it that could read it.
        pages = self.cache.num_tables * self.cache.pages_for(ids.shape[1] + max_new_tokens - 1)
        if pages > self.cache.allocator.capacity:
            raise ValueError(
                f"inputs: {ids.shape[1]} + {max_new_tokens} tokens may need {pages} pages, "
                f"the pool has {self.cache.allocator.capacity}"
            )
        request = Request(inputs, max_new_tokens)
        self.waiting.append(request)
        return request

    @property
    def has_work(self) -> bool:
        """Requests wait or run."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for each running request; then new requests start, with their first token, while pages last."""
        preempted = self._make_room()
        if self.running:
            self._decode()
        if not preempted:  # else the pages just taken away would be given out again
            self._admit()

    def _make_room(self) -> bool:
        """A row for each request's next token in every layer. Where pages are short the youngest requests give up
        theirs and start anew later, so that the oldest always comes to its end. Returns whether one had to."""
        allocator, before = self.cache.allocator, len(self.running)
        for request in self.running.copy():
            if request not in self.running:
                break  # it gave way, and so did all that are younger
            full = self._full_tables(request)
            while len(full) > allocator.num_free:
                if self._preempt_youngest() is request:
                    full = []
            for table in full:
                table += allocator.allocate(1)
        return len(self.running) < before

    def _full_tables(self, request: Request) -> list[list[int]]:
        """Tables of a request whose longest layer has no row left."""
        return [
            table
            for t, table in enumerate(request.tables)
            if max(request.lengths[t :: self.cache.num_tables]) == len(table) * self.cache.block_size
        ]

    def _preempt_youngest(self) -> Request:
        request = self.running.pop()
        self._release(request)
        request.tokens.clear()  # decoding is greedy: they will be the same
        request.preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _admit(self) -> None:
        """Starts requests while the whole prompt fits in all layers: what it will keep is not known before."""
        allocator, tables = self.cache.allocator, self.cache.num_tables
        while self.waiting:
            pages = self.cache.pages_for(self.waiting[0].prompt_length)
            if pages * tables > allocator.num_free:
                return
            request = self.waiting.popleft()
            request.tables = [allocator.allocate(pages) for _ in range(tables)]
            self.running.append(request)
            self._prefill(request)

    def _prefill(self, request: Request) -> None:
        n, layers = request.prompt_length, self.cache.num_layers
        prefill = Prefill(self.cache, self.policy, self.cache.block_tables([request.tables]))
        inputs = {name: x for name, x in request.inputs.items() if name != "attention_mask"}
        # Qwen-VL counts a picture by its rows and columns: text after it goes on at fewer positions than there are
        # tokens. The model leaves the difference here, for prompts without a picture that of an earlier one.
        base: Any = self.model.base_model
        base.rope_deltas = None
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1, engine=prefill).logits
        delta = base.rope_deltas
        request.position = n + (0 if delta is None else int(delta))
        request.lengths = [n] * layers
        if prefill.counts:
            # Here the host waits for all layers at once: only it can give pages to others.
            both = torch.stack([torch.cat(x) for x in zip(*prefill.counts, strict=True)])
            request.lengths, freed = both.tolist()
            for t, table in enumerate(request.tables):
                kept = len(table) - min(freed[t :: self.cache.num_tables])
                self.cache.allocator.free(table[kept:])
                del table[kept:]
        request.kept = sum(request.lengths) / (n * layers)
        self._add_tokens([request], logits)

    def _decode(self) -> None:
        requests, device = self.running.copy(), self.model.device
        lengths = torch.tensor([r.lengths for r in requests], dtype=torch.int32, device=device)
        decode = Decode(self.cache, self.cache.block_tables([r.tables for r in requests]), lengths.T.contiguous())
        newest = torch.tensor([r.tokens[-1:] for r in requests], device=device)
        positions = torch.tensor([[r.position] for r in requests], device=device)
        logits = self.model(input_ids=newest, position_ids=positions, use_cache=False, engine=decode).logits
        for request in requests:
            request.lengths = [rows + 1 for rows in request.lengths]
            request.position += 1
        self._add_tokens(requests, logits)

    def _add_tokens(self, requests: list[Request], logits: Tensor) -> None:
        """The most likely tokens; requests that end with them give their pages back."""
        for request, token in zip(requests, logits[:, -1].argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
            if token in self.stop_tokens or len(request.tokens) == request.max_new_tokens:
                request.is_done = True
                self.running.remove(request)
                self._release(request)

    def _release(self, request: Request) -> None:
        for table in request.tables:
            self.cache.allocator.free(table)
        request.tables = []
