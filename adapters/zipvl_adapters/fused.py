"""Projections of one input as one product in compiled code: a decode step then reads their weights faster."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zipvl_adapters.families import check_model

GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def fuse_projections(model: PreTrainedModel) -> None:
    """In code that `torch.compile` makes, q, k and v of a text layer become one product, and so do gate and up.

    For a few tokens at a time such a product takes the time of reading its weights, and a small matrix is read slower
    than a large one. The weights of a group move next to each other and stay the parameters that they were, with the
    same values and no more memory; eager code computes what it did. For good; call it when the model is where it
    stays, since moving it apart from that (`to`) gives each group its memory twice.

    Raises TypeError or ValueError, and changes nothing, where a projection is not a plain `nn.Linear` with its values on
    one device: quantised, tensor-parallel, offloaded, or with an adapter.
    """
    check_model(model)
    layers: Any = model.get_decoder().layers  # type: ignore[no-untyped-call]
    groups = [
        {f"layers.{i}.{block}.{name}": getattr(getattr(layer, block), name) for name in names}
        for i, layer in enumerate(layers)
        for block, names in GROUPS
    ]
    for group in groups:
        _check(group)
    for group in groups:
        _fuse(list(group.values()))


def _check(group: dict[str, Any]) -> None:
    for name, module in group.items():
        if type(module) is not nn.Linear:
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(module).__name__}")
        if "forward" in vars(module):
            raise ValueError(f"{name}: its forward has been replaced already, by fuse_projections or by a hook")
        if type(module.weight) is not nn.Parameter or module.weight.is_meta:
            raise TypeError(f"{name}.weight: expected a plain parameter with its values, got {_describe(module.weight)}")
    for (a, one), (b, other) in pairwise(group.items()):
        if _kind(one) != _kind(other):
            raise ValueError(f"{a} and {b}: expected one dtype, device and input width, and a bias for both or neither")


def _describe(weight: Tensor) -> str:
    return "a meta tensor" if weight.is_meta else f"a {type(weight).__name__}"


def _kind(module: nn.Linear) -> tuple[Any, ...]:
    return module.weight.dtype, module.weight.device, module.in_features, module.bias is None


@torch.no_grad()
def _fuse(modules: list[nn.Linear]) -> None:
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        if parts[0] is None:
            together = None
        else:
            together = torch.cat(parts)
            for part, place in zip(parts, together.split([len(x) for x in parts]), strict=True):
                part.data = place
        # A buffer, since compiled code takes those as inputs that keep their place.
        modules[0].register_buffer(f"fused_{name}", together, persistent=False)
    for i, module in enumerate(modules):
        module.forward = _Part(modules, i)  # type: ignore[method-assign]


class _Part:
    """The forward of one module of a group."""

    def __init__(self, modules: list[nn.Linear], index: int) -> None:
        self.modules, self.index = modules, index

    def __call__(self, x: Tensor) -> Tensor:
        module = self.modules[self.index]
        if not torch.compiler.is_compiling():
            return nn.functional.linear(x, module.weight, module.bias)
        first: Any = self.modules[0]
        found = getattr(x, "_zipvl_fused", None)  # left by the module that was called first
        if found is None or found[0] is not first:
            product = nn.functional.linear(x, first.fused_weight, first.fused_bias)
            found = x._zipvl_fused = first, product.split([m.out_features for m in self.modules], -1)  # type: ignore[attr-defined]
        return found[1][self.index]
