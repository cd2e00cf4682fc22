"""`compact_kv_` in CUDA C, for all that the operator takes. The .cu says how."""

import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._tickets import tickets

# Of one block, by which up to 32 KB are in flight, and blocks that a multiprocessor holds.
THREADS, ITEMS, BLOCKS_PER_SM = 256, 8, 3
_ADDRESSES, _NUMBERS = struct.Struct("=6Q"), struct.Struct("=11q4i")


def compact_kv_(
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    indices: Tensor,  # int32 [B, G, N]
    counts: Tensor,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`."""
    launch(k, v, indices, counts, dst_start)


def launch(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    dst_start: Tensor | None,
    *,
    threads: int = THREADS,
    items: int = ITEMS,
    blocks_per_sm: int = BLOCKS_PER_SM,
) -> None:
    """The operator with one configuration."""
    if not k.numel():
        return
    device, k_at, v_at = k.device, k.data_ptr(), v.data_ptr()
    layout = k.shape, k.stride(), v.stride(), indices.shape[1], indices.stride(), counts.stride()
    step, counters = prepared(device, k.element_size(), (k_at | v_at) % 16, *layout, threads, items, blocks_per_sm)
    start = None if dst_start is None else dst_start.contiguous()
    common.launch(
        step,
        k_at,
        v_at,
        indices.data_ptr(),
        counts.data_ptr(),
        0 if start is None else start.data_ptr(),
        tickets(device, counters).data_ptr(),
    )


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    size: int,
    misaligned: int,
    shape: torch.Size,
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    G: int,
    indices_stride: tuple[int, ...],
    counts_stride: tuple[int, ...],
    threads: int = THREADS,
    items: int = ITEMS,
    blocks_per_sm: int = BLOCKS_PER_SM,
) -> tuple[common.Launch, int]:
    """All of a launch but its addresses, and how many counters it takes."""
    B, Hkv, N, D = shape
    strides = [size * x for x in (*k_stride[:3], *v_stride[:3])]  # in bytes
    multiples = misaligned | D * size | 16
    for stride, extent in zip(strides, 2 * shape[:3], strict=True):
        if extent > 1:
            multiples |= stride
    width = multiples & -multiples  # the widest load that every row allows: 16, 8, 4 or 2
    chunks = D * size // width
    lanes = 1 << (chunks - 1).bit_length()
    tiles = -(-N // (threads // lanes * items))
    chains = 2 * B * Hkv
    kernel = _kernel(device, width, chunks, lanes, threads, items, blocks_per_sm)
    blocks = min(tiles * chains, blocks_per_sm * common.multiprocessors(device))
    numbers = _NUMBERS.pack(*strides, *indices_stride, *counts_stride, B, Hkv, G, N)
    return common.Launch(kernel, device, blocks, threads, _ADDRESSES, numbers), 2 + tiles * chains


@cache
def _kernel(
    device: torch.device, width: int, chunks: int, lanes: int, threads: int, items: int, blocks_per_sm: int
) -> Function:
    return common.load(
        "compact_kv",
        "sm_{}{}".format(*common.capability(device)),
        device,
        CHUNK_BYTES=width,
        CHUNKS=chunks,
        LANES=lanes,
        THREADS=threads,
        ITEMS=items,
        BLOCKS_PER_SM=blocks_per_sm,
    )
