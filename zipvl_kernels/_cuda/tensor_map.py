"""Descriptors of `[B, H, N, D]` for Hopper's copies of tiles, or of parts of them, into shared memory (TMA)."""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from zipvl_kernels._cuda.common import libcuda


def lacks(name: str, x: Tensor) -> str:
    """What keeps `x` from a descriptor, and its rows from copies of 16 bytes; "" where nothing does."""
    strides = x.stride()[:-1]
    if any(stride % 8 for stride in strides) or x.data_ptr() % 16:
        return f"{name}: expected rows that start at multiples of 16 bytes, got strides {x.stride()}"
    if not all(strides):
        return f"{name}: expected memory of its own for every row, got strides {x.stride()}"
    return ""


def tensor_map(x: Tensor, rows: int = 128) -> bytes:
    """Descriptor of fp16 or bf16 `x` for copies of so many rows and 64 columns into swizzled shared memory."""
    return encoded(x.data_ptr(), x.dtype == torch.float16, x.shape, x.stride(), rows)


@lru_cache(maxsize=1024)
def encoded(address: int, half: bool, shape: torch.Size, stride: tuple[int, ...], rows: int = 128) -> bytes:
    """`tensor_map` of a tensor of this kind."""
    buffer = ctypes.create_string_buffer(128 + 64)
    at = -ctypes.addressof(buffer) % 64  # the driver wants it aligned
    float_type, swizzle_128, promote_256 = 6 if half else 9, 3, 3  # values of the driver's enumerations
    status = libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(buffer) + at),
        float_type,
        4,
        ctypes.c_void_p(address),
        *_extents(shape, stride, rows),
        0,
        swizzle_128,
        promote_256,
        0,
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with {status} for shape {list(shape)} and strides {stride}")
    return buffer.raw[at : at + 128]


@lru_cache(maxsize=256)
def _extents(shape: torch.Size, stride: tuple[int, ...], rows: int) -> tuple[object, ...]:
    """Sizes, strides in bytes, box and steps of a descriptor: the same for all layers, whose addresses differ."""
    (B, H, N, D), (b, h, n, _) = shape, stride
    sizes = (ctypes.c_uint64 * 4)(D, N, H, B)
    strides = (ctypes.c_uint64 * 3)(*(2 * (x if size > 1 else D) for x, size in ((n, N), (h, H), (b, B))))
    return sizes, strides, (ctypes.c_uint32 * 4)(64, rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
