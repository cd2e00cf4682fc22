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
_ADDRESSES, _NUMBERS = struct.Struct("=QI"), struct.Struct("=6I4x")  # an address, and the key that a seed makes

seed_key = lru_cache(maxsize=1024)(_seed_key)


def lacks(num_rows: int, *, cu_seqlens: Tensor | None = None, **options: object) -> str:
    """What keeps this kernel from these arguments, "" where nothing does."""
    return "" if cu_seqlens is None else "cu_seqlens: expected None, got packed sequences"


def probe_rows(
    num_rows: int,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Ascending, distinct row numbers: the last `num_recent`, and `num_random` of the rest. int32 `[P]`."""
    P = min(num_rows, num_recent + num_random)
    rows = torch.empty(P, dtype=torch.int32, device=device)
    if P:
        common.launch(prepared(rows.device, num_rows, num_recent, num_random), rows.data_ptr(), seed_key(seed))
    return rows


@lru_cache(maxsize=256)
def prepared(device: torch.device, num_rows: int, num_recent: int, num_random: int) -> common.Launch:
    """All of a launch but the address of the rows and the key."""
    recent, random = sizes(num_rows, num_recent, num_random)
    rest = num_rows - recent
    numbers = _NUMBERS.pack(*halves(rest), rest, random, recent)
    blocks = -(-random // THREADS) + -(-recent // THREADS)
    return common.Launch(_kernel(device), device, blocks, THREADS, _ADDRESSES, numbers)


@cache
def _kernel(device: torch.device) -> Function:
    return common.load("probe_rows", "sm_{}{}".format(*common.capability(device)), device, THREADS=THREADS)
