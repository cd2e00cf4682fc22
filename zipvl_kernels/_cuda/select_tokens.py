"""`select_tokens` in CUDA C: radix selection by a cluster of blocks a set. The .cu says how."""

import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common

MOST_COLUMNS = 1 << 22  # sums of 10 bits stay within 32
THREADS = 1024
COLUMNS = 4096  # that one block takes before the set is worth another
MOST_BLOCKS = 8  # of a cluster, on every GPU that has clusters
_ADDRESSES, _NUMBERS = struct.Struct("=6Q"), struct.Struct("=6qd4i")


def lacks(
    accumulated: Tensor,
    normalized: Tensor,
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 1,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> str:
    """What keeps this kernel from these arguments, "" where nothing does."""
    if cu_seqlens is not None:
        return "cu_seqlens: expected None, got packed sequences"
    if accumulated.shape[2] > MOST_COLUMNS:
        return f"accumulated: expected at most {MOST_COLUMNS} columns, got shape {list(accumulated.shape)}"
    if common.capability(accumulated.device) < (8, 0):
        return f"expected a GPU of compute capability 8.0 or more, got {common.capability(accumulated.device)}"
    return ""


def select_tokens(
    accumulated: Tensor,  # fp32 [B, G, N]
    normalized: Tensor,  # fp32 [B, G, N]
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 1,
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascending columns of the kept set, then -1, int32 `[B, G, N]`; how many there are, int32 `[B, G]`."""
    return launch(accumulated, normalized, tau, keep_ratio, keep_first, keep_recent, leftpad_k, seqused_k)


def launch(
    accumulated: Tensor,
    normalized: Tensor,
    tau: float | None,
    keep_ratio: float | None,
    keep_first: int,
    keep_recent: int,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    *,
    threads: int = THREADS,
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator with one configuration: `blocks` of `threads` (a power of two from 32 to 1024) a set."""
    shape, device = accumulated.shape, accumulated.device
    indices = torch.empty_like(accumulated, dtype=torch.int32, memory_format=torch.contiguous_format)
    counts = indices.new_empty(shape[0], shape[1])
    if not indices.numel():
        return indices, counts.zero_()
    layout = shape, accumulated.stride(), normalized.stride()
    step = prepared(device, *layout, tau, keep_ratio, keep_first, keep_recent, threads, blocks)
    leftpad, seqused = (None if x is None else x.contiguous() for x in (leftpad_k, seqused_k))
    common.launch(
        step,
        accumulated.data_ptr(),
        normalized.data_ptr(),
        0 if leftpad is None else leftpad.data_ptr(),
        0 if seqused is None else seqused.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
    )
    return indices, counts


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    shape: torch.Size,
    accumulated_stride: tuple[int, ...],
    normalized_stride: tuple[int, ...],
    tau: float | None,
    keep_ratio: float | None,
    keep_first: int,
    keep_recent: int,
    threads: int = THREADS,
    blocks: int | None = None,
) -> common.Launch:
    """All of a launch but its addresses."""
    B, G, N = shape
    blocks = blocks or _blocks(device, B * G, N)
    share = tau if keep_ratio is None else keep_ratio
    firsts = min(keep_first, N), min(keep_recent, N)
    numbers = _NUMBERS.pack(*accumulated_stride, *normalized_stride, share, G, N, *firsts)
    kernel = _kernel(device, threads, blocks, keep_ratio is not None)
    return common.Launch(kernel, device, B * G * blocks, threads, _ADDRESSES, numbers)


def _blocks(device: torch.device, sets: int, N: int) -> int:
    """Blocks of the cluster that works on a set: more for more columns, as long as all sets run at once."""
    if common.capability(device) < (9, 0):
        return 1
    blocks = 1
    while blocks < MOST_BLOCKS and blocks * COLUMNS < N and 2 * blocks * sets <= common.multiprocessors(device):
        blocks *= 2
    return blocks


@cache
def _kernel(device: torch.device, threads: int, blocks: int, by_ratio: bool) -> Function:
    architecture = "sm_{}{}".format(*common.capability(device))
    return common.load("select_tokens", architecture, device, THREADS=threads, CLUSTER=blocks, BY_RATIO=int(by_ratio))
