"""`sparse_attention` in CUDA C for Hopper: compacted keys, fp16 and bf16, head dims 64 and 128. The .cu says how."""

import math
import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._cuda.packed import as_batch
from zipvl_kernels._cuda.pages import lacks as no_pages
from zipvl_kernels._cuda.tensor_map import lacks as no_copies
from zipvl_kernels._cuda.tensor_map import tensor_map
from zipvl_kernels._tickets import tickets

THREADS = 384
TILE = 128  # rows
MAX_SETS = 512  # B * G
STAGES = {64: 4, 128: 2}  # tiles of K, and of V, in shared memory
CONSUMER_REGISTERS, PRODUCER_REGISTERS, TAKE_TURNS = 232, 40, True
SECTION_BYTES = 24 << 20  # of K and V that heads worked on at a time may take, so that they stay in L2
_ADDRESSES, _NUMBERS = struct.Struct("=128s128s9Q"), struct.Struct("=10q10ifi56x")


def lacks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,
    kv_compacted: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> str:
    """What keeps this kernel from these arguments, "" where nothing does."""
    if block_table is not None and (why := no_pages(k, seqused_k, block_table, layout)):
        return why
    if q.dtype == torch.float32:
        return "q: expected float16 or bfloat16, got torch.float32"
    if q.shape[-1] not in STAGES:
        return f"q: expected a head dim of 64 or 128, got shape {list(q.shape)}"
    if not kv_compacted:
        return "kv_compacted: expected True, got False"
    if scale is not None and scale <= 0:
        return f"scale: expected more than 0, got {scale!r}"
    if counts.shape[0] * counts.shape[1] > MAX_SETS:
        return f"counts: expected at most {MAX_SETS} sets, got shape {list(counts.shape)}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if why := no_copies(name, x):
            return why
    if common.capability(q.device) != (9, 0):
        return f"expected a GPU of compute capability 9.0, got {common.capability(q.device)}"
    return ""


def sparse_attention(
    q: Tensor,  # [B, Hq, M, D], or [T, Hq, D] with `cu_seqlens`
    k: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
    v: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
    indices: Tensor,  # int32 [B, G, C], or [G, T]
    counts: Tensor,  # int32 [B, G]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    kv_compacted: bool = False,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> Tensor:
    """Softmax attention of the query rows in the set over the set's columns at or before them, as `q`; 0 elsewhere."""
    where = cu_seqlens, max_seqlen, seqused_k, block_table, layout
    return launch(q, k, v, indices, counts, scale, q_start, *where)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
    *,
    stages: int | None = None,
    consumer_registers: int = CONSUMER_REGISTERS,
    producer_registers: int = PRODUCER_REGISTERS,
    take_turns: bool = TAKE_TURNS,
    section_bytes: int = SECTION_BYTES,
) -> Tensor:
    """The operator on arguments that it can take, with one configuration."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    packed = table = None
    if cu_seqlens is not None and max_seqlen is not None:
        packed = counts.shape[0], max_seqlen
        q, k, v, indices = as_batch(q), as_batch(k), as_batch(v), indices[None]
    if block_table is not None:
        if layout == "NHD":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        table = block_table.shape[1], *block_table.stride()
    q_shape, k_shape, indices_shape = q.shape, k.shape, indices.shape
    if not out.numel() or not min(k_shape[2], indices_shape[2], *(packed or ()), *(table or ())[:1]):
        return out.zero_()
    device, half = q.device, q.dtype == torch.float16
    shapes = q_shape, k_shape, indices_shape, q.stride(), indices.stride(), counts.stride()
    config = stages, consumer_registers, producer_registers, take_turns, section_bytes
    step = prepared(device, half, *shapes, scale, q_start is None, packed, table, *config)
    given = (None if x is None else x.contiguous() for x in (q_start, cu_seqlens, seqused_k))
    start, cu_seqlens, seqused_k = given
    rows = TILE if table is None else min(TILE, k_shape[2])  # of a copy
    common.launch(
        step,
        tensor_map(k, rows),
        tensor_map(v, rows),
        q.data_ptr(),
        out.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        common.address(start),
        tickets(device, 1).data_ptr(),
        common.address(cu_seqlens),
        common.address(seqused_k),
        common.address(block_table),
    )
    return out


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    half: bool,
    q_shape: torch.Size,
    k_shape: torch.Size,
    indices_shape: torch.Size,
    q_stride: tuple[int, ...],
    indices_stride: tuple[int, ...],
    counts_stride: tuple[int, ...],
    scale: float | None,
    default_start: bool,
    packed: tuple[int, int] | None = None,
    table: tuple[int, int, int] | None = None,
    stages: int | None = None,
    consumer_registers: int = CONSUMER_REGISTERS,
    producer_registers: int = PRODUCER_REGISTERS,
    take_turns: bool = TAKE_TURNS,
    section_bytes: int = SECTION_BYTES,
) -> common.Launch:
    """All of a launch but its addresses.

    `packed` is how many sequences one batch of all holds, and the longest; `table` a block table's width and strides.
    """
    (B, Hq, M, D), (num_blocks, Hkv, N, _), (_, G, C), page = q_shape, k_shape, indices_shape, 0
    if table is not None:
        N, page = N * table[0], N
    start, whole = C - M, default_start and C == M and table is None
    if packed:
        (B, M), q_stride, indices_stride = packed, (0, *q_stride[1:]), (0, *indices_stride[1:])
    config = stages or STAGES[D], consumer_registers, producer_registers, take_turns, packed is not None, page
    kernel, shared, blocks = _kernel(device, D, half, *config)
    numbers = _NUMBERS.pack(
        *q_stride[:3],
        *indices_stride,
        *counts_stride,
        *((0, 0) if table is None else table[1:]),
        B,
        Hq,
        Hkv,
        G,
        M,
        N,
        min(C, N),
        start,
        whole,
        section_bytes,
        (D**-0.5 if scale is None else scale) * math.log2(math.e),
        num_blocks,
    )
    return common.Launch(kernel, device, blocks, THREADS, _ADDRESSES, numbers, shared)


@cache
def _kernel(
    device: torch.device,
    D: int,
    half: bool,
    stages: int,
    consumer_registers: int,
    producer_registers: int,
    take_turns: bool,
    packed: bool,
    page: int,
) -> tuple[Function, int, int]:
    """The kernel compiled and loaded on `device`, its bytes of dynamic shared memory, and its number of blocks."""
    kernel = common.load(
        "sparse_attention",
        "sm_90a",
        device,
        HEAD_DIM=D,
        HALF=int(half),
        STAGES=stages,
        CONSUMER_REGISTERS=consumer_registers,
        PRODUCER_REGISTERS=producer_registers,
        TAKE_TURNS=int(take_turns),
        PACKED=int(packed),
        PAGE=page,
    )
    shared = 1024 + 4 * 64 * D * 2 + 2 * stages * 128 * D * 2 + 8192  # alignment, queries, K and V, the rest
    common.allow_shared(kernel, device, shared)
    return kernel, shared, common.multiprocessors(device)
