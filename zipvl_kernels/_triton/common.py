"""What the Triton launchers share."""

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from zipvl_kernels._streams import current_device, current_stream

AMD = torch.version.hip is not None  # there Triton looks at the sizes of tensors, too
Numbers = tuple[int | float, ...]
_known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: Numbers, **constants: Any
) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`, at a fraction of its host time. The first tensor is not None.

    At every launch Triton finds out anew which binary of the kernel the arguments need. Here what it found is kept, for
    arguments that are alike in all that it looks at, and started as Triton itself would start it.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type != "cuda" or AMD or _watched():
        kernel[grid](*tensors, *numbers, **constants)
        return
    if device.index != current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, **constants)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    dtypes = [None if x is None else x.dtype for x in tensors]
    offsets = [address % 16 for address in addresses]
    key = (kernel.fn, device.index, *dtypes, *offsets, *constants.values(), _alike(kernel.fn, numbers))
    known = _known.get(key)
    if known:
        compiled, rest = known
        x, y, z = (*grid, 1, 1)[:3]
        start = (current_stream(device), compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(x, y, z, *start, *addresses, *numbers, *rest)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if isinstance(compiled, CompiledKernel):  # not where it is still being compiled
        given = len(tensors) + len(numbers)
        _known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[given:])


@lru_cache(maxsize=4096)
def _alike(fn: object, numbers: Numbers) -> str:
    """The same for numbers that need the same binary: Triton looks which are 1, which 16 divides, and their widths.

    The cache takes 1 for 1.0. `fn` keeps kernels apart, in each of which a place always has the same type.
    """
    return str([float if isinstance(x, float) else (x == 1, x % 16 == 0, x >> 31) for x in numbers])


def _watched() -> bool:
    """A profiler wants to know of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def shared_kilobytes(device: torch.device) -> int:
    """How much shared memory a block may have."""
    if device.type != "cuda":
        return 227
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)) // 1024


def pieces(n: int, size: int) -> int:
    """How many pieces of `size` cover `n`. (Triton's `cdiv` takes a microsecond on the host.)"""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def interpreting() -> bool:
    """Kernels run on the CPU. Arithmetic in bf16 is wrong there, so they upcast first."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def of_each(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed `x [T, heads, D]` as `[B, heads, T, D]`: all rows to each sequence, whose first one kernels add."""
    return x.transpose(0, 1).expand(cu_seqlens.shape[0] - 1, -1, -1, -1)


@triton.jit
def sequence(cu_seqlens, b, T, N):  # type: ignore[no-untyped-def]
    """First row of packed sequence `b` among `T`, and how many it has, `N` at most; 0 and `N` where none are packed.

    Whatever the bounds are, the rows exist.
    """
    if cu_seqlens is None:
        return 0, N
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), start), T)
        return start.to(tl.int64), tl.minimum(end - start, N)


def dense(x: Tensor | None) -> Tensor | None:
    """`x` with stride 1, as kernels read what there is one of a sequence; a copy where it has another stride."""
    return None if x is None else x.contiguous()
