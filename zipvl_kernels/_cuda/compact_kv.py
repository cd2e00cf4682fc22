"""`compact_kv_` in CUDA C, for all that the operator takes. The .cu says how."""

import struct
from functools import lru_cache

import torch
from torch import Tensor
from zipvl_reference.compact_kv import Layers

from zipvl_kernels._cuda import common, moving
from zipvl_kernels._cuda.moving import MOST_LAYERS, Config
from zipvl_kernels._tickets import tickets

_ADDRESSES, _MANY_ADDRESSES = struct.Struct("=7Q"), struct.Struct(f"={4 * MOST_LAYERS + 3}Q")
_NUMBERS = struct.Struct("=11q6iI4x")


def compact_kv_(
    k: Layers,  # [B, Hkv, N, D]; packed: [T, Hkv, D]
    v: Layers,  # the same
    indices: Layers,  # int32 [B, G, N]; packed: [G, T]
    counts: Layers,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]: packed
    max_seqlen: int | None = None,
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`; of every layer, where they are lists."""
    if isinstance(k, Tensor):
        launch(k, v, indices, counts, dst_start, cu_seqlens, max_seqlen)
        return
    for at in range(0, len(k), MOST_LAYERS):
        some = slice(at, at + MOST_LAYERS)
        launch(k[some], v[some], indices[some], counts[some], dst_start, cu_seqlens, max_seqlen)


def launch(
    k: Layers,
    v: Layers,
    indices: Layers,
    counts: Layers,
    dst_start: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **config: int,
) -> None:
    """The operator with one configuration, for one layer or up to `MOST_LAYERS`."""
    (k, v, indices, counts), addresses, layers = moving.of_layers(k, v, indices, counts)
    if not k.numel() or not counts.numel():
        return
    misaligned = 0
    for i in range(0, len(addresses), 4):
        misaligned |= addresses[i] | addresses[i + 1]
    device = k.device
    strided: tuple[tuple[int, ...], ...] = k.shape, k.stride(), v.stride(), indices.stride()
    if cu_seqlens is not None:
        strided = packed(len(counts), *strided)
    layout = *strided[:3], counts.shape[1], strided[3], counts.stride()
    step, counters = prepared(
        device, k.element_size(), misaligned % 16, *layout, max_seqlen, layers, Config(**config) if config else Config()
    )
    start, sequences = (None if x is None else x.contiguous() for x in (dst_start, cu_seqlens))
    common.launch(
        step,
        *addresses,
        common.address(start),
        common.address(sequences),
        tickets(device, counters).data_ptr(),
    )


def packed(B: int, shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shape `[T, Hkv, D]`, its strides in `k` and `v`, and those of `indices [G, T]`, as they are in a batch.

    All sequences begin with row 0 there: `cu_seqlens` has what comes before.
    """
    (T, Hkv, D), (k, v, indices) = shape, strides
    return (B, Hkv, T, D), (0, k[1], k[0], 1), (0, v[1], v[0], 1), (0, *indices)


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    size: int,
    misaligned: int,
    shape: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    G: int,
    indices_stride: tuple[int, ...],
    counts_stride: tuple[int, ...],
    longest: int | None = None,
    layers: int = 0,
    config: Config = Config(),  # noqa: B008
) -> tuple[common.Launch, int]:
    """All of a launch but its addresses, and how many counters it takes.

    `shape` and strides are those of a batch `[B, Hkv, N, D]`, or as `packed` gives them; `longest` is how many rows a
    packed sequence has at most, else None; `layers` how many are listed, 0 for one by itself.
    """
    (B, Hkv, N, D), listed, many = shape, max(1, layers), layers > 0
    strides = [size * x for x in (*k_stride[:3], *v_stride[:3])]  # in bytes
    row = moving.Row.of(D * size, misaligned, strides, 2 * shape[:3], config.threads)
    kernel = moving.kernel("compact_kv", device, row, MOST_LAYERS if many else 1, config)
    if longest is None:
        longest, tiles = N, B * row.tiles(N, config)
    else:  # of packed sequences, each has one at most that is not full
        longest = min(longest, N)
        tiles = min(B * row.tiles(longest, config), B + row.tiles(N, config))
    most = listed * 2 * row.pieces * Hkv * tiles
    blocks = max(1, min(most, config.blocks_per_sm * common.multiprocessors(device)))
    numbers = _NUMBERS.pack(*strides, *indices_stride, *counts_stride, B, Hkv, G, N, longest, listed, most)
    addresses = _MANY_ADDRESSES if many else _ADDRESSES
    return common.Launch(kernel, device, blocks, config.threads, addresses, numbers), 2 + most
