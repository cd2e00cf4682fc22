"""Projections of one input as one product in compiled code: a decode step then reads their weights faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zipvl_adapters.families import check_model

GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


@contextmanager
def fused_projections(model: PreTrainedModel) -> Iterator[None]:
    """Within the block compiled code computes q, k and v of a text layer as one product, and gate and up as another.

    A product with few tokens takes as long as reading its weights, and small matrices are read slower than large ones.
    The weights of a group move next to each other in memory, and stay the same parameters with the same values. Eager
    code, and code that gradients of the weights are wanted of, computes what it did.

    Weights may be changed in place within the block, but not be moved or replaced: compiled code would go on with what
    they were. Raises TypeError or ValueError, with nothing changed, where a projection is not a plain `nn.Linear` with
    values of its own: quantised, tensor-parallel, offloaded, tied, hooked, or wrapped by an adapter.
    """
    check_model(model)
    layers: Any = model.get_decoder().layers  # type: ignore[no-untyped-call]
    groups = [
        {f"layers.{i}.{block}.{name}": getattr(getattr(layer, block), name) for name in names}
        for i, layer in enumerate(layers)
        for block, names in GROUPS
    ]
    owners: dict[int, str] = {}
    for group in groups:
        _check(group, owners)
    with ExitStack() as undo:
        for group in groups:
            undo.callback(_part, list(group.values()))
            _join(list(group.values()))
        yield


def _check(group: dict[str, Any], owners: dict[int, str]) -> None:
    for name, module in group.items():
        if type(module) is _Fused:
            raise ValueError(f"{name}: fused already; leave the other fused_projections() block first")
        if type(module) is not nn.Linear:
            raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(module).__name__}")
        if type(module.weight) is not nn.Parameter or module.weight.is_meta:
            found = "one on the meta device" if module.weight.is_meta else type(module.weight).__name__
            raise TypeError(f"{name}.weight: expected a plain parameter with its values, got {found}")
        if "forward" in vars(module):
            raise ValueError(f"{name}: expected the forward of its class, got one that replaces it, such as a hook's")
        other = owners.setdefault(id(module.weight), name)
        if other != name:
            raise ValueError(f"{name}.weight: expected a parameter of its own, got that of {other}")
    for (name, module), (other, another) in pairwise(group.items()):
        if _kind(module) != _kind(another):
            raise ValueError(f"{name} and {other}: expected one dtype, device and width, and both or none with a bias")


def _kind(module: nn.Linear) -> tuple[Any, ...]:
    width, bias = module.in_features, module.bias
    return width, *((None, None) if x is None else (x.dtype, x.device) for x in (module.weight, bias))


@torch.no_grad()
def _join(modules: list[nn.Linear]) -> None:
    """Lays the weights of a group into one tensor, and has the modules use it."""
    first: Any = modules[0]
    sizes = [module.out_features for module in modules]
    for name in ("weight", "bias"):
        parts = [getattr(module, name) for module in modules]
        together = None if parts[0] is None else torch.cat(parts)
        if together is not None:
            for part, place in zip(parts, torch.split(together, sizes), strict=True):
                part.data = place
        first.register_buffer(f"fused_{name}", together, persistent=False)  # compiled code takes it where it lies
    for index, module in enumerate(modules):
        module.__class__ = _Fused
        vars(module).update(index=index, sizes=sizes, first=() if index == 0 else (first,))


def _part(modules: list[nn.Linear]) -> None:
    """Makes them plain again, whatever became of the group. Their weights stay where they are."""
    for module in modules:
        module.__class__ = nn.Linear
        for name in ("index", "sizes", "first"):
            vars(module).pop(name, None)
        for name in ("fused_weight", "fused_bias"):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)


class _Fused(nn.Linear):
    """One of the modules that are given the same input. The first one holds the weights of all."""

    index: int
    sizes: list[int]  # the output features of each
    first: tuple[_Fused, ...]  # not of the first itself: a cycle would keep weights alive
    fused_weight: Tensor
    fused_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The first module leaves the product of all with the input, and the last takes it away."""
        # The fused weight hands no gradients on to its parts.
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and self.weight.requires_grad):
            if self.index == 0:
                product = nn.functional.linear(input, self.fused_weight, self.fused_bias)
                parts = torch.split(product, self.sizes, -1)
                input._zipvl_fused = self, parts  # type: ignore[attr-defined]
                return parts[0]
            found = getattr(input, "_zipvl_fused", None)
            if found is not None and found[0] is self.first[0]:
                part: Tensor = found[1][self.index]
                if self.index == len(self.sizes) - 1:
                    input._zipvl_fused = None  # type: ignore[attr-defined]
                return part
        return super().forward(input)
