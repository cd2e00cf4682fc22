"""`compact_paged_kv_` in CUDA C, for all that the operator takes. The .cu says how."""

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from zipvl_reference.compact_kv import Layers

from zipvl_kernels._cuda import common, moving
from zipvl_kernels._cuda.moving import MOST_LAYERS, Config
from zipvl_kernels._tickets import tickets

_ADDRESSES, _MANY_ADDRESSES = struct.Struct("=10Q"), struct.Struct(f"={6 * MOST_LAYERS + 4}Q")
_NUMBERS = struct.Struct("=15q7iI")


def compact_paged_kv_(
    k_cache: Layers,  # "NHD": [num_blocks, block_size, Hkv, D], "HND": [num_blocks, Hkv, block_size, D]
    v_cache: Layers,
    indices: Layers,  # int32 [B, G, W]
    counts: Layers,  # int32 [B, G]
    block_table: Layers,  # int32 [B, max_blocks]
    seqused_k: Layers,  # int32 [B] or [B, G]
    *,
    layout: str = "NHD",
    first_writable: Tensor | None = None,  # int32 [B]
) -> tuple[Tensor, Tensor]:
    """In place: row `indices[b, g, i]` of a sequence moves to row `i`. Returns new lengths and freed blocks.

    Lists have a tensor of each layer, and what is returned then has a row of each.
    """
    given = k_cache, v_cache, indices, counts, block_table, seqused_k
    first, listed = (counts, ()) if isinstance(counts, Tensor) else (counts[0], (len(counts),))
    B, G = first.shape
    seqused = torch.empty((*listed, B) if G == 1 else (*listed, B, G), dtype=torch.int32, device=first.device)
    freed = torch.empty((*listed, B), dtype=torch.int32, device=first.device)
    options: dict[str, Any] = {"layout": layout, "first_writable": first_writable}
    if not listed:
        launch(*given, seqused, freed, **options)
        return seqused, freed
    for at in range(0, len(counts), MOST_LAYERS):
        some = slice(at, at + MOST_LAYERS)
        launch(*(x[some] for x in (*given, seqused, freed)), **options)
    return seqused, freed


def launch(
    k_cache: Layers,
    v_cache: Layers,
    indices: Layers,
    counts: Layers,
    block_table: Layers,
    seqused_k: Layers,
    seqused: Any,
    freed: Any,
    *,
    layout: str,
    first_writable: Tensor | None,
    **config: int,
) -> None:
    """The operator with one configuration, for one layer or up to `MOST_LAYERS`, into `seqused` and `freed`."""
    first, addresses, layers = moving.of_layers(k_cache, v_cache, indices, counts, block_table, seqused_k)
    k, v, sets, sizes, table, used = first
    if not sizes.numel():
        return
    misaligned = 0
    for i in range(0, len(addresses), 6):
        misaligned |= addresses[i] | addresses[i + 1]
    used_stride = used.stride() if used.dim() == 2 else (*used.stride(), 0)
    strided = k.shape, k.stride(), v.stride(), sets.shape, sets.stride(), sizes.stride()
    paged = table.shape[1], table.stride(), used_stride, layout == "NHD", layers
    held = default(k.device) if not config else Config(**config)
    step, counters = prepared(k.device, k.element_size(), misaligned % 16, *strided, *paged, held)
    start = None if first_writable is None else first_writable.contiguous()
    common.launch(
        step,
        *addresses,
        common.address(start),
        seqused.data_ptr(),
        freed.data_ptr(),
        tickets(k.device, counters).data_ptr(),
    )


def default(device: torch.device) -> Config:
    """Three blocks on Hopper; elsewhere the compiler needs more registers than these leave to a thread, so two."""
    return Config() if common.capability(device)[0] == 9 else Config(blocks_per_sm=2)


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    size: int,
    misaligned: int,
    shape: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    sets: tuple[int, ...],
    indices_stride: tuple[int, ...],
    counts_stride: tuple[int, ...],
    max_blocks: int,
    table_stride: tuple[int, ...],
    used_stride: tuple[int, ...],
    heads_last: bool,
    layers: int,
    config: Config,
) -> tuple[common.Launch, int]:
    """All of a launch but its addresses, and how many counters it takes; `layers` is 0 for one that is not listed."""
    order = (0, 2, 1) if heads_last else (0, 1, 2)  # pages, heads, rows
    (num_blocks, Hkv, page), (B, G, W) = (shape[i] for i in order), sets
    strides = [size * stride[i] for stride in (k_stride, v_stride) for i in order]  # in bytes
    row_bytes, listed = shape[3] * size, max(1, layers)
    row = moving.Row.of(row_bytes, misaligned, strides, 2 * (num_blocks, Hkv, page), config.threads)
    room = MOST_LAYERS if layers else 1
    kernel = moving.kernel("compact_paged_kv", device, row, room, config, PAGE=page)
    capacity = min(max_blocks * page, 2**31 - 1 - config.threads * config.items)  # places of rows are 32 bits wide
    most = listed * 2 * row.pieces * B * Hkv * row.tiles(min(W, capacity), config)  # tickets, whatever there is to move
    blocks = max(1, min(most, config.blocks_per_sm * common.multiprocessors(device)))
    strides += [*indices_stride, *counts_stride, *table_stride, *used_stride]
    numbers = _NUMBERS.pack(*strides, B, Hkv, G, W, capacity, num_blocks, listed, most)
    addresses = _MANY_ADDRESSES if layers else _ADDRESSES
    return common.Launch(kernel, device, blocks, config.threads, addresses, numbers), 2 + most
