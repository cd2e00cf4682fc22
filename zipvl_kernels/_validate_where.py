"""Checks of arguments that say where rows are: packed sequences, pages of a pool, lists of layers; see `_validate`."""

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from zipvl_kernels._validate import _heads, _same_as_k, _shape, _tensor, _type, int32, not_negative

LAYOUTS = {"NHD": "[num_blocks, block_size, Hkv, D]", "HND": "[num_blocks, Hkv, block_size, D]"}


def sequence_bounds(cu_seqlens: Tensor, device: torch.device | None) -> torch.device:
    """int32 `[B + 1]` on `device`, or on any; returns on which."""
    _tensor("cu_seqlens", cu_seqlens)
    bounds = cu_seqlens.shape[0] if cu_seqlens.dim() == 1 else 0
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    int32("cu_seqlens", cu_seqlens, device or cu_seqlens.device, (max(bounds, 1),), meaning="[B + 1]")
    return cu_seqlens.device


def sequences(
    cu_seqlens: Tensor | None, max_seqlen: int | None, T: int | None, device: torch.device, **padded: Tensor | None
) -> int | None:
    """`max_seqlen`, at most `T`, for int32 `cu_seqlens [B + 1]` on `device`; None where both are None.

    `padded` are the arguments that only sequences of one length have, and packed ones leave None.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen!r}")
        return None
    sequence_bounds(cu_seqlens, device)
    if max_seqlen is None:
        raise ValueError("max_seqlen: expected a whole number with cu_seqlens, got None")
    not_negative(max_seqlen=max_seqlen)
    for name, x in padded.items():
        if x is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens, which says where sequences are, got {_type(x)}")
    return max_seqlen if T is None else min(max_seqlen, T)


def packed_selection(indices: Tensor, counts: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    """`indices [G, T]` and `counts [B, G]` for `k [T, Hkv, D]` and `cu_seqlens [B + 1]`."""
    T, Hkv = k.shape[:2]
    int32("indices", indices, k.device, (1, T), (Hkv, T), meaning="[G, T] with G = 1 or Hkv")
    int32("counts", counts, k.device, (cu_seqlens.shape[0] - 1, indices.shape[0]), meaning="[B, G]")


def layout(x: str) -> None:
    """ "NHD" or "HND"."""
    if x not in LAYOUTS:
        raise ValueError(f"layout: expected 'NHD' or 'HND', got {x!r}")


def pools(k: Tensor, v: Tensor | EllipsisType, layout: str, *, q: Tensor | None = None, suffix: str = "") -> int:
    """Pools of pages, arguments `k` and, if not `...`, `v` with `suffix`, that fit `q [B, Hq, M, D]`; returns `Hkv`."""
    name, shape = f"k{suffix}", LAYOUTS[layout]
    if q is None:
        _heads(name, k, name, k, shape)
    else:
        _heads("q", q, "q", q)
        _heads(name, k, "q", q, shape)
    if 0 in k.shape:
        raise ValueError(f"{name}: expected {shape} of at least one block, row and head, got shape {_shape(k)}")
    if not isinstance(v, EllipsisType):
        _same_as_k(v, k, suffix, shape)
    Hkv = k.shape[2 if layout == "NHD" else 1]
    if q is not None and (k.shape[3] != q.shape[3] or q.shape[1] % Hkv):
        raise ValueError(
            f"{name}: expected {shape} with D = {q.shape[3]} as in q and a number of heads that divides the "
            f"{q.shape[1]} heads of q, got shape {_shape(k)}"
        )
    return Hkv


def block_table(x: Tensor, device: torch.device, B: int | None = None) -> int:
    """int32 `[B, max_blocks]`, for any number of sequences where `B` is None; returns `B`."""
    _tensor("block_table", x)
    height, width = tuple(x.shape) if x.dim() == 2 else (0, 0)
    B = height if B is None else B
    int32("block_table", x, device, (B, width), meaning="[B, max_blocks]")
    return B


def paged(
    q: Tensor,
    table: Tensor,
    seqused_k: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
    *,
    k: Tensor,
    v: Tensor | EllipsisType = ...,
) -> int:
    """Pools `k, v` in `layout` that fit `q [B, Hq, M, D]`, with a block table and used lengths; returns `Hkv`."""
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: expected None with a block_table, got {_type(cu_seqlens)}")
    Hkv = pools(k, v, layout, q=q)
    block_table(table, q.device, q.shape[0])
    if seqused_k is None:
        raise ValueError("seqused_k: expected int32 [B] with a block_table, got None")
    return Hkv


def paged_selection(indices: Tensor, counts: Tensor, B: int, Hkv: int, device: torch.device) -> int:
    """`indices [B, G, W]` and `counts [B, G]` with `G` = 1 or `Hkv`, any `W`; returns `G`."""
    _tensor("indices", indices)
    W = indices.shape[-1] if indices.dim() else 0
    int32("indices", indices, device, (B, 1, W), (B, Hkv, W), meaning="[B, G, W] with G = 1 or Hkv")
    G = indices.shape[1]
    int32("counts", counts, device, (B, G), meaning="[B, G]")
    return G


def layers(shared: Mapping[str, Any] | None = None, **given: Any) -> tuple[list[Tensor], ...]:
    """One tensor for each of as many layers in each of `given`; alike in shape, strides, dtype and device.

    A tensor in `shared` stands for one of every layer.
    """
    (first, some), *_ = given.items()
    alone = {first, *(shared or ())}
    for name, x in (shared or {}).items():
        given[name] = [x] * len(some) if isinstance(x, Tensor) and isinstance(some, Sequence) else x
    for name, tensors in given.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            wanted = "a tensor or a sequence of tensors" if name in alone else f"a sequence of tensors like {first}"
            raise TypeError(f"{name}: expected {wanted}, got {_type(tensors)}")
        if not tensors:
            raise ValueError(f"{name}: expected a tensor of each layer, at least one, got 0")
        if len(tensors) != len(some):
            raise ValueError(f"{name}: expected a tensor of each layer, as many as {first} has, got {len(tensors)}")
        _tensor(f"{name}[0]", tensors[0])
        like = tensors[0]
        alike = like.shape, like.stride(), like.dtype, like.device
        for i, x in enumerate(tensors):
            if x is like:
                continue
            _tensor(f"{name}[{i}]", x)
            if (x.shape, x.stride(), x.dtype, x.device) != alike:
                raise ValueError(
                    f"{name}[{i}]: expected shape, strides, dtype and device of {name}[0], {_shape(like)}, "
                    f"{like.stride()}, {like.dtype} and {like.device}, got {_shape(x)}, {x.stride()}, {x.dtype} "
                    f"and {x.device}"
                )
    return tuple(list(tensors) for tensors in given.values())


def own_memory_of_layers(suffix: str = "", **given: list[Tensor]) -> None:
    """No tensor of `given`, whose names get `suffix`, twice."""
    seen: dict[int, str] = {}
    for name, tensors in given.items():
        for i, x in enumerate(tensors):
            here = f"{name}{suffix}[{i}]"
            if seen.setdefault(id(x), here) != here:
                raise ValueError(f"{here}: expected a buffer of its own, got the same tensor as {seen[id(x)]}")
