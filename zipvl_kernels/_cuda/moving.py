"""What the launchers of `compact_kv_` and `compact_paged_kv_` share, as moving.cuh is what their kernels share."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from cupy.cuda.function import Function
from torch import Tensor
from zipvl_reference.compact_kv import Layers

from zipvl_kernels._cuda import common

MOST_LAYERS = 64  # of a launch: their addresses are among its parameters, of which there may be 4 KB


class Config(NamedTuple):
    """Of one block, by which up to 32 KB are in flight, and blocks that a multiprocessor holds."""

    threads: int = 256
    items: int = 8
    blocks_per_sm: int = 3


class Row(NamedTuple):
    """How a row is read: bytes of a load, loads of a piece, threads to one, a power of two, and pieces."""

    width: int
    chunks: int
    lanes: int
    pieces: int

    @classmethod
    def of(cls, num_bytes: int, misaligned: int, strides: Iterable[int], extents: Iterable[int], threads: int) -> "Row":
        """The widest loads, 16, 8, 4 or 2 bytes, that start and strides (in bytes) of all rows allow."""
        multiples = misaligned | num_bytes | 16
        for stride, extent in zip(strides, extents, strict=True):
            if extent > 1:
                multiples |= stride
        width = multiples & -multiples
        loads = num_bytes // width
        pieces = next(n for n in range(1, loads + 1) if loads % n == 0 and loads // n <= threads)
        return cls(width, loads // pieces, 1 << (loads // pieces - 1).bit_length(), pieces)

    def tiles(self, rows: int, config: Config) -> int:
        """How many tiles of a block's rows cover `rows`."""
        return -(-rows // (config.threads // self.lanes * config.items))


def of_layers(*given: Layers) -> tuple[list[Tensor], list[int], int]:
    """The tensors of the first layer, the addresses of all layers', layer by layer, and how many layers were listed.

    A tensor by itself, 0 layers listed, goes with one kernel; for lists, addresses fill the room of `MOST_LAYERS`.
    """
    if isinstance(given[0], Tensor):
        return list(given), [x.data_ptr() for x in given], 0  # type: ignore[arg-type, union-attr]
    addresses = [x.data_ptr() for layer in zip(*given, strict=True) for x in layer]
    addresses += [0] * (len(given) * MOST_LAYERS - len(addresses))
    return [x[0] for x in given], addresses, len(given[0])


@cache
def kernel(name: str, device: torch.device, row: Row, room: int, config: Config, **defined: int) -> Function:
    """The kernel of NAME.cu with room for so many layers."""
    architecture = "sm_{}{}".format(*common.capability(device))
    shape = {"CHUNK_BYTES": row.width, "CHUNKS": row.chunks, "LANES": row.lanes, "PIECES": row.pieces}
    block = {"THREADS": config.threads, "ITEMS": config.items, "BLOCKS_PER_SM": config.blocks_per_sm}
    return common.load(name, architecture, device, **shape, **block, LAYERS=room, **defined)
