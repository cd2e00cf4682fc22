"""The attention and mask functions that transformers calls in place of its own, under the name "zipvl"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zipvl_adapters.cache import ZipVLLayer
from zipvl_adapters.dense import append_and_attend, dense_attention
from zipvl_adapters.policy import Padding, Step

ATTENTION = "zipvl"


def zipvl_mask(
    batch_size: int,
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The 2-D padding mask where the operators understand it, else a 4-D mask, over which attention is dense.

    A prefill with padding reads the mask on the host once, as stock transformers does.
    """
    if mask_function is causal_mask_function and isinstance(q_offset, Tensor) and kv_length == q_length == 1:
        return None  # a step of a ZipVLStaticCache: padding is not in it, and what is in it the token sees
    static = isinstance(q_offset, Tensor) or q_offset + q_length != kv_length
    if mask_function is causal_mask_function and not static:
        if attention_mask is None:
            return None
        mask = attention_mask[:, :kv_length].to(torch.bool)
        if q_length == 1 and q_offset:
            return mask
        padding = Padding.of(mask, q_length)
        if padding is None or padding.is_regular:
            mask._zipvl_padding = padding  # type: ignore[attr-defined]
            return mask
    return sdpa_mask(
        batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


def zipvl_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, n, D]
    key: Tensor,  # [B, Hkv, m, D]
    value: Tensor,  # [B, Hkv, m, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: by the policy of the ZipVLCache that handed over `key`, dense with any other cache."""
    if kwargs.get("cache") is not None:
        raise ValueError("cache: paged caches (generate_batch, continuous batching) are not supported; use generate()")
    layer: ZipVLLayer | None = getattr(key, "_zipvl_layer", None)
    if layer is None:
        if is_causal if is_causal is not None else getattr(module, "is_causal", True):
            return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs), None
        kwargs["is_causal"] = is_causal
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layer.policy.keeps_all:  # stock computation, gradients included
        return _attend(module, query, key, value, attention_mask, scaling, layer), None
    if module.training and torch.is_grad_enabled():
        layer.pending = False
        raise RuntimeError("training is not supported: call model.eval(), or run under torch.no_grad()")
    with torch.no_grad():
        out = _attend(module, query.detach(), key.detach(), value.detach(), attention_mask, scaling, layer)
    if query.requires_grad and torch.is_grad_enabled():
        out = _NoBackward.apply(out, query)  # type: ignore[no-untyped-call]
    return out, None


class _NoBackward(torch.autograd.Function):
    """Says so when somebody asks for gradients, instead of leaving them out in silence."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        raise RuntimeError("zipvl attention has no backward: use ZipVLPolicy(tau=1.0), or leave attach() first")


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, layer: ZipVLLayer
) -> Tensor:
    """The policy's prefill or decode; dense where a 4-D mask or a draft asks for it."""
    n, past = q.shape[2], layer.has_past
    layer.begin(module, n)
    prefill = n > 1 or not past
    step = Step(module, q, k, v, mask, _padding(mask, n) if prefill else None, scale)
    layer.by_mask |= mask is not None and mask.ndim == 4
    if layer.by_mask or (past and prefill and layer.record_past):
        return append_and_attend(layer, step)
    if prefill:
        out = layer.policy.prefill(layer, step)
        layer.policy.after_prefill(layer, step)
        return out
    out = layer.policy.decode(layer, step)
    if not layer.record_past:
        layer.policy.after_decode(layer, step)
    return out


def _padding(mask: Tensor | None, n: int) -> Padding | None:
    """Padding of a prefill, as the mask function left it on the mask; computed again where the mask was copied."""
    if mask is None or mask.ndim == 4:
        return None
    if not hasattr(mask, "_zipvl_padding"):
        mask._zipvl_padding = Padding.of(mask, n)  # type: ignore[attr-defined]
    return mask._zipvl_padding  # type: ignore[attr-defined, no-any-return]


# Registered once for the process; a model uses them only when its configuration names them.
AttentionInterface.register(ATTENTION, zipvl_attention)
AttentionMaskInterface.register(ATTENTION, zipvl_mask)
