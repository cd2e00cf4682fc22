"""`compact_kv_` in CUDA C: in place and parallel, one launch of blocks that draw their work. The .cu says how."""

import math
import struct
from functools import cache
from typing import Any

import torch
from cupy.cuda import driver
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._tickets import tickets

THREADS = 256
TILE_BYTES = 16384
BLOCKS = 8  # a multiprocessor, at most
_HEADER = 32  # integers before the flags
_MOST_LOADS = 16  # of a thread, held in registers
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
    tile_bytes: int = TILE_BYTES,
    blocks: int = BLOCKS,
) -> None:
    """The operator with one configuration."""
    B, Hkv, N, D = k.shape
    if not k.numel():
        return
    device, size = k.device, k.element_size()
    strides = [size * x for x in (*k.stride()[:3], *v.stride()[:3])]
    width = math.gcd(16, D * size, k.data_ptr(), v.data_ptr(), *strides)
    kernel, rows, resident = _kernel(device, width, D * size // width, threads, tile_bytes)
    chains, steps = 2 * B * Hkv, -(-N // rows)
    words = -(-steps // 32)
    state = tickets(device, _HEADER + chains * words)
    start = None if dst_start is None else dst_start.contiguous()
    parameters = _PARAMETERS.pack(
        k.data_ptr(),
        v.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        0 if start is None else start.data_ptr(),
        state.data_ptr(),
        *strides,
        *indices.stride(),
        *counts.stride(),
        B,
        Hkv,
        indices.shape[1],
        words,
    )
    most = common.multiprocessors(device) * min(blocks, resident)
    stream = common.current_stream(device)
    common.launch(kernel, device, stream, min(most, chains * steps), threads, parameters)


def tile_rows(vectors: int, width: int, threads: int, tile_bytes: int) -> int:
    """Rows of a tile: a power of two, within `tile_bytes` and the loads that a thread may hold."""
    most = min(tile_bytes // (vectors * width), threads * _MOST_LOADS // vectors, 256)
    return 1 << max(most, 1).bit_length() - 1


@cache
def _kernel(device: torch.device, width: int, vectors: int, threads: int, tile_bytes: int) -> tuple[Any, int, int]:
    """The kernel, rows of its tile, and how many blocks a multiprocessor has registers and threads for."""
    rows = tile_rows(vectors, width, threads, tile_bytes)
    architecture = "sm_{}{}".format(*common.capability(device))
    macros = {"THREADS": threads, "WIDTH": width, "VECTORS": vectors, "ROWS": rows}
    kernel = common.load("compact_kv", architecture, device, **macros)
    registers = 8 * -(-driver.funcGetAttribute(4, kernel.ptr) // 8)  # CU_FUNC_ATTRIBUTE_NUM_REGS
    properties = torch.cuda.get_device_properties(device)
    fit = min(65536 // (registers * threads), properties.max_threads_per_multi_processor // threads)
    return kernel, rows, max(fit, 1)
