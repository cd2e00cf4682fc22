"""Put a policy into a model: for a `with` block, or for good."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from zipvl_adapters import ranks
from zipvl_adapters.attention import ATTENTION
from zipvl_adapters.cache import ZipVLCache
from zipvl_adapters.families import check_model
from zipvl_adapters.parts import mlps_in_parts
from zipvl_adapters.policy import Policy, ZipVLPolicy
from zipvl_adapters.stats import Stats
from zipvl_kernels._checking import enabled as checking

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def enable(model: PreTrainedModel) -> None:
    """Makes the text attention of `model` ours, for good: it then takes a `ZipVLCache` as `past_key_values`.

    With any other cache, and without one, it stays dense and computes what it did before; vision towers stay as they
    are. `model.set_attn_implementation("sdpa")` undoes it. Raises ValueError for a model that is not supported.
    """
    _set_attention(model)
    if checking():
        model.register_forward_pre_hook(_compare_ranks, with_kwargs=True)


def _set_attention(model: PreTrainedModel) -> None:
    text = check_model(model)
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    ranks.check_heads(decoder, text)
    model.set_attn_implementation(ATTENTION if text is model.config else {"text_config": ATTENTION})


def _compare_ranks(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    policy = cache.policy if isinstance(cache, ZipVLCache) else None
    ranks.compare(model.get_decoder(), policy, _named(args, kwargs))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {f"argument {i}": x for i, x in enumerate(args)} | kwargs


@contextmanager
def attach(model: PreTrainedModel, policy: Policy | None = None, *, mlp_rows: int | None = None) -> Iterator[Session]:
    """Within the block every `generate()` and `forward()` of `model` runs under `policy` (ZipVLPolicy() by default).

    mlp_rows: the most tokens that an MLP takes at a time, None for all of a prompt. An MLP of a long prompt then holds
    less in between; only the last bits of results change.

    Yields a `Session` with the cache and the statistics of what ran last. The model is as before afterwards, whatever
    happened. Raises ValueError or TypeError for a model or policy that is not supported, RuntimeError if the model is
    attached already.
    """
    policy = ZipVLPolicy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected a Policy such as ZipVLPolicy(), got {type(policy).__name__}")
    check_model(model)
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if decoder in _attached:
        raise RuntimeError(
            "model: attached already; leave the other attach() block first, one policy a model at a time"
        )
    session = Session(policy)
    with ExitStack() as undo:
        _attached.add(decoder)
        undo.callback(_attached.discard, decoder)
        undo.callback(_restore, _attention_settings(model))
        _set_attention(model)
        for module, hook in ((model, session.before_model), (decoder, session.before_decoder)):
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for handle in policy.hooks(decoder):
            undo.callback(handle.remove)
        if mlp_rows is not None:
            undo.callback(mlps_in_parts(decoder, mlp_rows))
        yield session


class Session:
    """What `attach` yields: the cache that ran last, and its statistics."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: ZipVLCache | None = None  # of the last prompt; None before the first
        self._rows = 1  # rows whose logits the caller reads

    @property
    def stats(self) -> Stats:
        """Of `cache`, read from the device now; raises RuntimeError before the first prompt."""
        if self.cache is None:
            raise RuntimeError("stats: nothing has run under this attach() yet; call model.generate() inside the block")
        return self.cache.stats

    def before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes how many rows the caller will read: more than one are drafts that a decoder verifies."""
        if checking():
            ranks.compare(module.get_decoder(), self.policy, _named(args, kwargs))
        rows = kwargs.get("logits_to_keep", 0)
        self._rows = rows if isinstance(rows, int) else 1

    def before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Puts our cache in the place of none, or of an empty DynamicCache."""
        if module.training and torch.is_grad_enabled():
            raise RuntimeError("training is not supported: call model.eval(), or run under torch.no_grad()")
        if len(args) > 3:
            raise TypeError("past_key_values: expected by keyword, got it by position")
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        config: Any = module.config
        if cache is None and not (config.use_cache if use_cache is None else use_cache):
            return None  # dense: without a cache nothing could be read again
        if isinstance(cache, ZipVLCache):
            self._adopt(cache)
        elif cache is None or _is_plain(cache):
            if cache is not None and cache.get_seq_length():
                return None  # somebody's dense conversation goes on as it began
            cache = ZipVLCache(self.policy, config=config)
            self._adopt(cache)
            kwargs = {**kwargs, "past_key_values": cache}
        elif not isinstance(cache, StaticCache):
            raise ValueError(
                f"past_key_values: {_describe(cache)} is not supported; pass none, a ZipVLCache or a DynamicCache"
            )
        if self._rows > 1 and isinstance(cache, ZipVLCache):
            cache.activate_past_recording()
        return args, kwargs

    def _adopt(self, cache: ZipVLCache) -> None:
        """This session serves the cache from now on."""
        other = None if cache.session is None else cache.session()
        if cache.session is not None and other is not self:
            raise ValueError(
                "past_key_values: this ZipVLCache is attached elsewhere; make another, or reset() it first"
            )
        cache.session = weakref.ref(self)
        if not cache.layers[0].has_past:
            self.cache = cache


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and not cache.offloading


def _describe(cache: Any) -> str:
    return (
        f"an offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
    )


def _attention_settings(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, Any]]:
    """Every configuration of the model and its parts, with the attention implementation that it names."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        for name in config.sub_configs:
            part = getattr(config, name, None)
            if part is not None:
                configs[id(part)] = part
    return [(config, config._attn_implementation) for config in configs.values()]


def _restore(settings: list[tuple[PreTrainedConfig, Any]]) -> None:
    for config, implementation in settings:
        # The public setter would also set the parts of a configuration, which are restored one by one.
        config._attn_implementation_internal = implementation
