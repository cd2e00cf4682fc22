"""The MLPs of a long prompt, some rows at a time: in between they hold several times as much as the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def mlps_in_parts(decoder: nn.Module, rows: int) -> Callable[[], None]:
    """Every MLP of the decoder takes at most `rows` tokens, of all sequences together, at a time. Returns the undoing.

    A batch of more sequences than `rows` takes one token of each. No token's MLP depends on another token, so nothing
    changes but the last bits of products, which may depend on how many rows they have. Raises ValueError for a number
    below 1.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"mlp_rows: expected an integer of at least 1, or None, got {rows!r}")
    layers: Any = decoder.layers
    before = [(layer.mlp, vars(layer.mlp).get("forward")) for layer in layers]
    for mlp, _ in before:
        mlp.forward = partial(_in_parts, mlp.forward, rows)

    def undo() -> None:
        for mlp, forward in before:
            if forward is None:
                del mlp.forward  # the class's own shows again
            else:
                mlp.forward = forward

    return undo


def _in_parts(forward: Callable[[Tensor], Tensor], rows: int, hidden: Tensor) -> Tensor:
    B, n, _ = hidden.shape
    if B * n <= rows:
        return forward(hidden)
    return torch.cat([forward(part) for part in torch.split(hidden, max(1, rows // B), 1)], 1)
