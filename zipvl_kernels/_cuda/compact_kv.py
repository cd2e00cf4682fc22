"""`compact_kv_` in CUDA C, for all that the operator takes. The .cu says how."""

import struct
from functools import cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._tickets import tickets

# Of one block, by which up to 32 KB are in flight, and blocks that a multiprocessor holds.
THREADS, ITEMS, BLOCKS_PER_SM = 256, 8, 3
_PARAMETERS = struct.Struct("=6Q11q4i")


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
    B, Hkv, N, D = k.shape
    if not k.numel():
        return
    size = k.element_size()
    width, strides = _width(k, v, size)
    chunks = D * size // width
    lanes = 1 << (chunks - 1).bit_length()
    tiles = -(-N // (threads // lanes * items))
    chains = 2 * B * Hkv
    device = k.device
    kernel = _kernel(device, width, chunks, lanes, threads, items, blocks_per_sm)
    start = None if dst_start is None else dst_start.contiguous()
    blocks = min(tiles * chains, blocks_per_sm * common.multiprocessors(device))
    parameters = _PARAMETERS.pack(
        k.data_ptr(),
        v.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        0 if start is None else start.data_ptr(),
        tickets(device, 2 + tiles * chains).data_ptr(),
        *strides,
        *indices.stride(),
        *counts.stride(),
        B,
        Hkv,
        indices.shape[1],
        N,
    )
    common.launch(kernel, device, common.current_stream(device), blocks, threads, parameters)


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


def _width(k: Tensor, v: Tensor, size: int) -> tuple[int, list[int]]:
    """The widest load that every row allows, in bytes: 16, 8, 4 or 2. The strides of `k` and `v` in bytes."""
    strides = [size * x for x in (*k.stride()[:3], *v.stride()[:3])]
    addresses = k.data_ptr() | v.data_ptr() | k.shape[3] * size | 16
    for stride, extent in zip(strides, 2 * k.shape[:3], strict=True):
        if extent > 1:
            addresses |= stride
    return addresses & -addresses, strides
