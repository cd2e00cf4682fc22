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

    A product with few tokens takes as long as reading its weights, and small matrices are read slower than large ones.
    The weights of a group move next to each other in memory. They stay the parameters that they were, with the same
    values and as many bytes; eager code, and code that gradients are wanted of, computes what it did. For good.

    Raises TypeError or ValueError, and changes nothing, where a projection is not a plain `nn.Linear` with its values
    there: quantised, tensor-parallel, offloaded, or wrapped by an adapter.
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
        _Group(list(group.values()))


def _check(group: dict[str, Any]) -> None:
    for name, module in group.items():
        if type(module) is not nn.Linear:
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(module).__name__}")
        if type(module.weight) is not nn.Parameter or module.weight.is_meta:
            found = "one on the meta device" if module.weight.is_meta else type(module.weight).__name__
            raise TypeError(f"{name}.weight: expected a plain parameter with its values, got {found}")
        if "forward" in vars(module):
            raise ValueError(f"{name}: its forward is replaced already, by a hook or by fuse_projections")
    for (name, module), (other, another) in pairwise(group.items()):
        if _kind(module) != _kind(another):
            raise ValueError(f"{name} and {other}: expected one dtype, device and width, and both or none with a bias")


def _kind(module: nn.Linear) -> tuple[Any, ...]:
    return module.weight.dtype, module.weight.device, module.in_features, module.bias is None


class _Group:
    """Modules that are given the same input."""

    def __init__(self, modules: list[nn.Linear]) -> None:
        self.modules = modules
        self.sizes = [module.out_features for module in modules]
        first: Any = modules[0]
        for name in ("weight", "bias"):
            parts = self._parts(name)
            # Of the module, since compiled code takes what it holds as inputs that keep their place.
            first.register_buffer(f"fused_{name}", torch.cat(parts).detach() if parts else None, persistent=False)
        self.lay_together()
        for i, module in enumerate(modules):
            module.forward = _Part(self, i)  # type: ignore[method-assign, assignment]

    def _parts(self, name: str) -> list[Tensor]:
        parts = [getattr(module, name) for module in self.modules]
        return [] if parts[0] is None else parts

    def _places(self, name: str) -> tuple[Tensor, ...]:
        fused: Tensor | None = getattr(self.modules[0], f"fused_{name}")
        return () if fused is None else torch.split(fused, self.sizes)

    def lie_together(self) -> bool:
        """Not so once the model was moved, or a weight replaced."""
        return all(
            part.data_ptr() == place.data_ptr()
            for name in ("weight", "bias")
            for part, place in zip(self._parts(name), self._places(name), strict=True)
        )

    @torch.no_grad()
    def lay_together(self) -> None:
        """Every weight and bias becomes a part of the fused one."""
        for name in ("weight", "bias"):
            for part, place in zip(self._parts(name), self._places(name), strict=True):
                place.copy_(part)
                part.data = place

    def product(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of all modules, computed once for an input: it stays with the input."""
        first: Any = self.modules[0]
        found = getattr(x, "_zipvl_fused", None)
        if found is None or found[0] is not first:
            product = nn.functional.linear(x, first.fused_weight, first.fused_bias)
            parts = torch.split(product, self.sizes, -1)
            found = x._zipvl_fused = first, parts  # type: ignore[attr-defined]
        return found[1]


class _Part:
    """The forward of one module of a group."""

    def __init__(self, group: _Group, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled():  # the fused weight passes no gradients on to its parts
                return self.group.product(x)[self.index]
        elif self.index == 0 and not self.group.lie_together():  # compiled code would go on with weights of before
            self.group.lay_together()
        module = self.group.modules[self.index]
        return nn.functional.linear(x, module.weight, module.bias)
