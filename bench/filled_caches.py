"""Caches of a long context for decoding, filled without a prefill, and how many sequences of them fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from transformers import StaticCache
from whole_models import (
    DEVICE,
    KEEP_RATIO,
    available_bytes,
    head_dim,
    largest_batch,
    out_of_memory,
    peak_bytes,
    release,
    synchronize,
)
from zipvl_adapters import ZipVLPolicy, ZipVLStaticCache, enable
from zipvl_adapters.policy import Step

CACHES = {"static": 1.0, "full": 1.0, "zipvl": KEEP_RATIO}  # share of the context that each holds
ROOM = 256  # tokens that a cache has room for beyond the context
MARGIN = 0.97  # of the memory: what the largest batch may take, the rest is for CUDA graphs and the compiler


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    model: str
    cache: str
    batch: int
    context: int

    @property
    def kept(self) -> int:
        """Tokens of the context that each layer holds."""
        return ceil(self.context * CACHES[self.cache])


def filled(model: Any, case: Case) -> Any:
    """A cache that has seen the context, random keys and values in place of its own; the model takes it from now on.

    Ours gets them by the method that a prefill stores its tokens with, and is then made ready as `generate()` does.
    """
    cache = (_static if case.cache == "static" else _ours)(model, case)
    draw = torch.Generator(DEVICE).manual_seed(1)
    for layer in cache.layers:
        layer.keys.normal_(generator=draw)  # the rows that are not in use, too
        layer.values.normal_(generator=draw)
    return cache


def _ours(model: Any, case: Case) -> ZipVLStaticCache:
    enable(model)
    cache = ZipVLStaticCache(
        ZipVLPolicy(keep_ratio=KEEP_RATIO, recompress_interval=None), config=model.config, max_new_tokens=ROOM
    )
    indices = torch.full((case.batch, 1, case.context), -1, dtype=torch.int32, device=DEVICE)
    indices[:, :, : case.kept] = torch.arange(case.kept, device=DEVICE) * case.context // case.kept
    counts = torch.full((case.batch, 1), case.kept, dtype=torch.int32, device=DEVICE)
    heads, width = (model.config.num_attention_heads, model.config.num_key_value_heads), head_dim(model.config)
    zero = torch.zeros((), dtype=model.dtype, device=DEVICE)
    q, k = zero.expand(case.batch, heads[0], case.context, width), zero.expand(case.batch, heads[1], case.kept, width)
    for layer, block in zip(cache.layers, model.get_decoder().layers, strict=True):
        attention = block.self_attn
        layer.begin(attention, case.context)
        layer.note(Step(attention, q, k, k, None, None, attention.scaling), indices, counts)
        layer.fill(k, k, indices, counts)
    cache.freeze()
    return cache


def _static(model: Any, case: Case) -> StaticCache:
    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=model.config, max_cache_len=case.context + ROOM)
    heads, width = model.config.num_key_value_heads, head_dim(model.config)
    cache.early_initialization(case.batch, heads, width, model.dtype, DEVICE)
    for layer in cache.layers:
        layer.cumulative_length.fill_(case.context)
    return cache


def bytes_of_a_row(model: Any) -> int:
    """Of the keys and values of one token in all layers."""
    config = model.config
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * model.dtype.itemsize)


def held_bytes(model: Any, case: Case) -> tuple[int, int]:
    """Of the weights, and of the keys and values of one sequence."""
    return sum(x.nbytes for x in model.parameters()), bytes_of_a_row(model) * (case.kept + ROOM)


def largest(model: Any, case: Case, step: Callable[[int, Any], object], seconds: float) -> int:
    """The most sequences whose cache, and an eager `step` of so many over it, fit into the memory; 0 for none."""
    weights, sequence = held_bytes(model, case)
    room = MARGIN * available_bytes()

    def fits(batch: int) -> bool:
        if weights + batch * sequence > room:
            return False
        try:
            step(batch, filled(model, replace(case, batch=batch)))
            synchronize()
            does_fit = peak_bytes() <= room
        except Exception as error:
            if not out_of_memory(error):
                raise
            does_fit = False
        release()  # not in the handler, where the error still holds on to everything
        return does_fit

    return largest_batch(fits, int((room - weights) / sequence), seconds=seconds)[0]
