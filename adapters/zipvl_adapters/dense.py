"""Dense attention: what the models compute without a policy, over a stock cache or over a layer of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import zipvl_kernels as zk

if TYPE_CHECKING:
    from zipvl_adapters.cache import ZipVLLayer
    from zipvl_adapters.policy import Step

DECODE_ROWS = 16  # the most query rows that zk.decode_attention takes


def dense_attention(
    module: nn.Module,
    q: Tensor,  # [B, Hq, n, D]
    k: Tensor,  # [B, Hkv, m, D]
    v: Tensor,  # [B, Hkv, m, D]
    mask: Tensor | None,  # None, padding [B, m] or [B, 1 or Hq, n, m]
    **kwargs: Any,
) -> Tensor:
    """Causal attention of the last `n` of `m` columns as transformers' own "sdpa" computes it, `[B, n, Hq, D]`."""
    if mask is None or mask.ndim == 2:
        mask = _causal_mask(q, k, mask)
    out, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
    return out


def _causal_mask(q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor | None:
    """The mask that stock transformers builds once a forward; remembered on the padding mask that all layers share."""
    made = getattr(padding, "_zipvl_causal", None)
    if made is not None and made[0].shape[-1] == k.shape[2]:
        return made[0]  # type: ignore[no-any-return]
    n, m = q.shape[2], k.shape[2]
    mask: Tensor | None = sdpa_mask(
        q.shape[0], q_length=n, kv_length=m, q_offset=m - n, attention_mask=padding, device=q.device
    )
    if padding is not None and mask is not None:
        padding._zipvl_causal = (mask,)  # type: ignore[attr-defined]
    return mask


def append_and_attend(layer: ZipVLLayer, step: Step) -> Tensor:
    """Every new token is kept, every row attends to all that the layer holds and its mask allows, `[B, n, Hq, D]`."""
    layer.note(step)
    if layer.is_empty or layer.is_complete:
        keys, values = layer.extend(step.k, step.v)
        return dense_attention(step.module, step.q, keys, values, step.mask, scaling=step.scale)
    n = step.q.shape[2]
    layer.append(step.k, step.v)
    layer.mark()
    layer.by_mask |= step.padding is not None  # padding is stored too: only the mask tells it from tokens
    if not layer.by_mask and n <= DECODE_ROWS:
        out = zk.decode_attention(step.q, layer.keys, layer.values, layer.seqused_k, scale=step.scale)
        return out.transpose(1, 2).contiguous()
    keys, values = layer.keys[:, :, : layer.used], layer.values[:, :, : layer.used]
    return dense_attention(step.module, step.q, keys, values, _mask_by_position(layer, step), scaling=step.scale)


def _mask_by_position(layer: ZipVLLayer, step: Step) -> Tensor:
    """The mask's columns of the tokens that the layer still holds, looked up by their true positions."""
    heads, n = step.q.shape[1], step.q.shape[2]
    positions = layer.positions[:, :, : layer.used].long()  # [B, G, used]
    held = torch.arange(layer.used, device=positions.device) < layer.lens[:, :, None]
    if layer.groups > 1:
        positions, held = (x.repeat_interleave(heads // layer.groups, 1) for x in (positions, held))
    positions, held = positions.masked_fill(~held, 0)[:, :, None], held[:, :, None]  # [B, 1 or Hq, 1, used]
    mask = step.mask
    if mask is not None and mask.ndim == 4:
        if mask.shape[-1] != layer.seen:
            raise ValueError(
                f"attention_mask: expected {layer.seen} columns, one for each token seen so far; got {mask.shape[-1]}"
            )
        h = max(positions.shape[1], mask.shape[1])
        columns = mask.expand(step.q.shape[0], h, n, -1).gather(-1, positions.expand(-1, h, n, -1))
        return columns & held if mask.dtype == torch.bool else columns.masked_fill(~held, -torch.inf)
    rows = torch.arange(layer.seen - n, layer.seen, device=positions.device)[:, None]
    allowed: Tensor = held & (positions <= rows)
    if mask is not None:
        allowed = allowed & mask[:, None, None].expand(-1, *positions.shape[1:3], -1).gather(-1, positions)
    return allowed
