"""`decode_attention` in CUDA C for Hopper: fp16, bf16, head dims 64 and 128, few rows a KV head. The .cu says how."""

import math
import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._cuda.pages import lacks as no_pages
from zipvl_kernels._cuda.tensor_map import lacks as no_copies
from zipvl_kernels._cuda.tensor_map import tensor_map

SPLIT = 512  # rows of the cache
KEYS = 64  # rows of a tile
MAX_ROWS = 16  # that share a KV head
THREADS, GROUPS = 160, 4  # of the first launch; of the second, each as many as the head dim
HEAD_DIMS = (64, 128)
_ADDRESSES, _NUMBERS = struct.Struct("=128s128s7Q"), struct.Struct("=7q6if52x")


def lacks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> str:
    """What keeps this kernel from these arguments, "" where nothing does."""
    heads = 1  # dimension of the keys
    if block_table is not None:
        heads = 2 if layout == "NHD" else 1
        if why := no_pages(k, seqused_k, block_table, layout):
            return why
    if q.dtype == torch.float32:
        return "q: expected float16 or bfloat16, got torch.float32"
    if q.shape[3] not in HEAD_DIMS:
        return f"q: expected a head dim of 64 or 128, got shape {list(q.shape)}"
    if q.shape[1] // k.shape[heads] * q.shape[2] > MAX_ROWS:
        return f"q: expected at most {MAX_ROWS} rows (heads times M) for each KV head, got shape {list(q.shape)}"
    b, h, m, _ = q.stride()
    if (b | h | m) % 2 or q.data_ptr() % 4:
        return f"q: expected rows that start at multiples of 4 bytes, got strides {q.stride()}"
    for name, x in (("k", k), ("v", v)):
        if why := no_copies(name, x):
            return why
    if common.capability(q.device) != (9, 0):
        return f"expected a GPU of compute capability 9.0, got {common.capability(q.device)}"
    return ""


def decode_attention(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D], or a pool of pages
    v: Tensor,
    seqused_k: Tensor,  # int32 [B] or [B, Hkv]
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,  # int32 [B, max_blocks]
    layout: str = "NHD",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, the last query row at the last used row, as `q`; log-sum-exp of the scores, `[B, Hq, M]`."""
    table = None
    if block_table is not None:
        if layout == "NHD":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        table = block_table.shape[1], *block_table.stride()
    device, q_shape, k_shape, used_stride = q.device, q.shape, k.shape, seqused_k.stride()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q_shape[:3], dtype=torch.float32, device=device) if return_lse else None
    if not out.numel() or not k_shape[2] or (table and not table[0]):
        out.zero_()
        return out if lse is None else (out, lse.fill_(-math.inf))
    steps, sizes = prepared(device, q.dtype == torch.float16, q_shape, k_shape, q.stride(), used_stride, scale, table)
    scratch = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    at = scratch.data_ptr()
    rows = KEYS if table is None else min(KEYS, k_shape[2])  # of a copy
    addresses = (
        tensor_map(k, rows),
        tensor_map(v, rows),
        q.data_ptr(),
        out.data_ptr(),
        common.address(lse),
        at,
        at + 4 * sizes[0],
        seqused_k.data_ptr(),
        common.address(block_table),
    )
    for step in steps:
        common.launch(step, *addresses)
    return out if lse is None else (out, lse)


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    half: bool,
    q_shape: torch.Size,
    k_shape: torch.Size,
    q_stride: tuple[int, ...],
    used_stride: tuple[int, ...],
    scale: float | None,
    table: tuple[int, int, int] | None,  # width and strides of the block table
) -> tuple[tuple[common.Launch, common.Launch], tuple[int, int]]:
    """The launches but for their addresses, and their scratch in floats: weighted values, and maxima and sums."""
    (B, Hq, M, D), (num_blocks, Hkv, N, _), page = q_shape, k_shape, 0
    if table is not None:
        N, page = N * table[0], N
    rows, splits = Hq // Hkv * M, -(-N // SPLIT)
    used_h = used_stride[1] if len(used_stride) == 2 else 0
    log2_scale = (D**-0.5 if scale is None else scale) * math.log2(math.e)
    strides = *q_stride[:3], used_stride[0], used_h, *((0, 0) if table is None else table[1:])
    numbers = _NUMBERS.pack(*strides, num_blocks, Hkv, M, N, rows, splits, log2_scale)
    shared = 1024 + 3 * 2 * KEYS * D * 2 + 1024  # alignment, the ring, the rest
    attend, merge = _kernels(device, D, half, page, shared)
    sizes = B * Hkv * splits * rows * D, 2 * B * Hkv * splits * rows
    attend_step = common.Launch(attend, device, B * Hkv * splits, THREADS, _ADDRESSES, numbers, shared)
    merge_step = common.Launch(merge, device, B * Hkv * rows, GROUPS * D, _ADDRESSES, numbers)
    return (attend_step, merge_step), sizes


@cache
def _kernels(device: torch.device, D: int, half: bool, page: int, shared: int) -> tuple[Function, Function]:
    """The two kernels, compiled and loaded on `device`."""
    macros = {"HEAD_DIM": D, "HALF": int(half), "SPLIT": SPLIT, "PAGE": page}
    module = common.load_module("decode_attention", "sm_90a", device, **macros)
    attend_splits, merge_splits = module.get_function("attend_splits"), module.get_function("merge_splits")
    common.allow_shared(attend_splits, device, shared)
    return attend_splits, merge_splits
