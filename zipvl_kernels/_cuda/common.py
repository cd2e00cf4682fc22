"""What all CUDA C kernels need: compiling and loading them, and launching on torch's current stream."""

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from cupy.cuda import driver, nvrtc, runtime
from cupy.cuda.function import Function, Module

from zipvl_kernels._streams import current_device, current_stream

__all__ = [
    "allow_shared",
    "capability",
    "current_stream",
    "launch",
    "libcuda",
    "load",
    "load_module",
    "multiprocessors",
]
HERE = Path(__file__).parent
INVALID_CONTEXT = 201  # the driver's answer in a thread that has not used CUDA yet
# The driver's: sizes, stream and attributes of a launch, and the one attribute in use (dependent.cuh says for what).
_CONFIG = struct.Struct("=7I4xQQI4x")
_ATTRIBUTE = ctypes.create_string_buffer(struct.pack("=i4xi60x", 6, 1), 72)  # programmatic stream serialization: on


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def load(name: str, architecture: str, device: torch.device, **defined: int) -> Function:
    """The kernel `name` of NAME.cu, compiled with these macros and loaded on `device`."""
    return load_module(name, architecture, device, **defined).get_function(name)


def load_module(name: str, architecture: str, device: torch.device, **defined: int) -> Module:
    """NAME.cu with all its kernels, compiled with these macros and loaded on `device`."""
    # CuPy's own compiler wrapper builds for sm_90, which lacks the tensor cores' asynchronous instructions.
    headers = {path.name.encode(): path.read_bytes() for path in HERE.glob("*.cuh")}
    source = HERE.joinpath(f"{name}.cu").read_text()
    program = nvrtc.createProgram(source, f"{name}.cu", [*headers.values()], [*headers])
    macros = (f"-D{macro}={value}" for macro, value in defined.items())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", "-default-device", f"-arch={architecture}", *macros))
        binary = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name}.cu does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    with torch.cuda.device(device):
        module = Module()
        module.load(binary)
    return module


def allow_shared(kernel: Function, device: torch.device, size: int) -> None:
    """Lets `kernel` have so many bytes of dynamic shared memory, beyond the 48 kB that all have."""
    with torch.cuda.device(device):
        driver.funcSetAttribute(kernel.ptr, 8, size)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def launch(
    kernel: Function, device: torch.device, stream: int, blocks: int, threads: int, parameters: bytes, shared: int = 0
) -> None:
    """Starts `kernel` with `parameters` as its one argument, by value; on Hopper under the end of the one before it."""
    if device.index != current_device():  # a handle of 0 names the current device's stream
        with torch.cuda.device(device):
            return launch(kernel, device, stream, blocks, threads, parameters, shared)
    # The driver wants an array of pointers to the arguments: this object's own memory is that array, of one.
    pointer = ctypes.c_char_p(parameters)
    overlaps = capability(device) >= (9, 0)
    config = _CONFIG.pack(blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(_ATTRIBUTE), overlaps)
    call = config, kernel.ptr, ctypes.addressof(pointer), None
    start = _start()  # CuPy's call takes several times as long, and cannot overlap kernels
    status = start(*call)
    if status == INVALID_CONTEXT:
        runtime.free(0)  # makes the device's context the thread's
        status = start(*call)
    if status:
        raise driver.CUDADriverError(status)


@cache
def libcuda() -> ctypes.CDLL:
    """The driver itself, for what CuPy does not offer."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _start() -> Callable[..., int]:
    function = libcuda().cuLaunchKernelEx
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return function
