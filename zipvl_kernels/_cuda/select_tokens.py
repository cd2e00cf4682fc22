"""`select_tokens` in CUDA C: radix selection by a cluster of blocks a set. The .cu says how."""

import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common

MOST_COLUMNS = 1 << 22  # sums of 10 bits stay within 32
COLUMNS = 1024  # that one block takes before the set is worth another
MOST_BLOCKS, LARGE = 8, 16  # of a cluster: on every GPU that has clusters, and on those with room for more
HELD = 4  # columns that a thread keeps in registers, where there are no more for it
THREADS, MOST_THREADS = 512, 1024  # of a block: the former where they hold all columns
_ADDRESSES, _NUMBERS = struct.Struct("=7Q"), struct.Struct("=6qd6i")


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
    if max_seqlen is not None and max_seqlen > MOST_COLUMNS:
        return f"max_seqlen: expected at most {MOST_COLUMNS}, got {max_seqlen}"
    if max_seqlen is None and accumulated.shape[2] > MOST_COLUMNS:
        return f"accumulated: expected at most {MOST_COLUMNS} columns, got shape {list(accumulated.shape)}"
    if common.capability(accumulated.device) < (8, 0):
        return f"expected a GPU of compute capability 8.0 or more, got {common.capability(accumulated.device)}"
    return ""


def select_tokens(
    accumulated: Tensor,  # fp32 [B, G, N], or [G, T] with `cu_seqlens`
    normalized: Tensor,  # fp32 [B, G, N], or [G, T]
    *,
    tau: float | None = None,
    keep_ratio: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 1,
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascending columns of the kept set, then -1, int32 as the scores; how many there are, int32 `[B, G]`."""
    sequences = leftpad_k, seqused_k, cu_seqlens, max_seqlen
    return launch(accumulated, normalized, tau, keep_ratio, keep_first, keep_recent, *sequences)


def launch(
    accumulated: Tensor,
    normalized: Tensor,
    tau: float | None,
    keep_ratio: float | None,
    keep_first: int,
    keep_recent: int,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    threads: int | None = None,
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator with one configuration: `blocks` of `threads` (a power of two from 32 to 1024) a set."""
    shape, device = accumulated.shape, accumulated.device
    indices = torch.empty_like(accumulated, dtype=torch.int32, memory_format=torch.contiguous_format)
    packed = None
    if cu_seqlens is not None and max_seqlen is not None:
        packed = cu_seqlens.shape[0] - 1, max_seqlen
    counts = indices.new_empty((packed or shape)[0], shape[-2])
    if not indices.numel() or (packed and not min(packed)):
        return indices, counts.zero_()
    layout = shape, accumulated.stride(), normalized.stride()
    step = prepared(device, *layout, tau, keep_ratio, keep_first, keep_recent, packed, threads, blocks)
    given = leftpad_k, seqused_k, cu_seqlens
    leftpad, seqused, cu_seqlens = (None if x is None else x.contiguous() for x in given)
    common.launch(
        step,
        accumulated.data_ptr(),
        normalized.data_ptr(),
        common.address(leftpad),
        common.address(seqused),
        indices.data_ptr(),
        counts.data_ptr(),
        common.address(cu_seqlens),
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
    packed: tuple[int, int] | None = None,
    threads: int | None = None,
    blocks: int | None = None,
) -> common.Launch:
    """All of a launch but its addresses; `packed` is how many sequences `[G, T]` holds, and the longest length."""
    *batch, G, T = shape
    B, N = packed or (*batch, T)
    whole = (0,) if packed else ()  # the stride of a batch
    wanted, blocks = threads, blocks or _blocks(device, B * G, N)
    threads = wanted or (MOST_THREADS if HELD * THREADS * blocks < N else THREADS)
    share = tau if keep_ratio is None else keep_ratio
    firsts = min(keep_first, N), min(keep_recent, N)
    numbers = _NUMBERS.pack(*whole, *accumulated_stride, *whole, *normalized_stride, share, G, N, *firsts, B, T)
    held = 0 if HELD * threads * blocks < N else HELD
    kernel = _kernel(device, threads, blocks, held, keep_ratio is not None, packed is not None)
    step = common.Launch(kernel, device, B * G * blocks, threads, _ADDRESSES, numbers)
    if blocks > MOST_BLOCKS and not common.clusters_at_once(step):
        given = tau, keep_ratio, keep_first, keep_recent, packed, wanted, MOST_BLOCKS
        return prepared(device, shape, accumulated_stride, normalized_stride, *given)
    return step


def _blocks(device: torch.device, sets: int, N: int) -> int:
    """Blocks of the cluster that works on a set: more for more columns, as long as all sets run at once."""
    if common.capability(device) < (9, 0):
        return 1
    blocks, most = 1, LARGE if common.capability(device) == (9, 0) else MOST_BLOCKS
    while blocks < most and blocks * COLUMNS < N and 2 * blocks * sets <= common.multiprocessors(device):
        blocks *= 2
    return blocks


@cache
def _kernel(device: torch.device, threads: int, blocks: int, held: int, by_ratio: bool, packed: bool) -> Function:
    architecture = "sm_{}{}".format(*common.capability(device))
    defined = {"THREADS": threads, "CLUSTER": blocks, "HELD": held, "BY_RATIO": int(by_ratio), "PACKED": int(packed)}
    kernel = common.load("select_tokens", architecture, device, **defined)
    if blocks > MOST_BLOCKS:
        common.allow_large_cluster(kernel, device)
    return kernel
