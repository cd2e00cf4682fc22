"""`probe_rows` in CUDA C. The .cu says how."""

import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor
from zipvl_reference.probe_rows import halves, sizes
from zipvl_reference.probe_rows import seed_key as _seed_key

from zipvl_kernels._cuda import common

THREADS = 64
MOST = 2**31 - 1
_ADDRESSES, _NUMBERS = struct.Struct("=2QI"), struct.Struct("=9I")  # addresses, and the key that a seed makes

seed_key = lru_cache(maxsize=1024)(_seed_key)


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`.

    With `cu_seqlens`, those of each sequence, then -1: int32 `[B, P]`, as wide as `num_rows` rows would need.
    """
    P = min(num_rows, num_recent + num_random)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (P,) if sequences is None else (sequences, P)
    rows = torch.empty(shape, dtype=torch.int32, device=device if cu_seqlens is None else cu_seqlens.device)
    if rows.numel():
        step = prepared(rows.device, num_rows, num_recent, num_random, sequences)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        common.launch(step, rows.data_ptr(), common.address(cu_seqlens), seed_key(seed))
    return rows


@lru_cache(maxsize=256)
def prepared(
    device: torch.device, num_rows: int, num_recent: int, num_random: int, sequences: int | None = None
) -> common.Launch:
    """All of a launch but the addresses and the key; with so many sequences, `num_rows` is the longest length."""
    recent, random = sizes(num_rows, num_recent, num_random)
    rest = num_rows - recent
    packed, B = sequences is not None, sequences or 1
    numbers = _NUMBERS.pack(*halves(rest), rest, random, recent, B, MOST, num_rows)
    blocks = B * (-(-random // THREADS) + -(-recent // THREADS))
    return common.Launch(_kernel(device, packed), device, blocks, THREADS, _ADDRESSES, numbers)


@cache
def _kernel(device: torch.device, packed: bool) -> Function:
    architecture = "sm_{}{}".format(*common.capability(device))
    return common.load("probe_rows", architecture, device, THREADS=THREADS, PACKED=int(packed))
