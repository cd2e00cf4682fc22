"""What all CUDA C kernels need: compiling and loading them, and launching on torch's current stream."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cupy
import numpy
import torch
from cupy.cuda import driver, nvrtc
from cupy.cuda.function import Function, Module

HERE = Path(__file__).parent


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


def current_stream(device: torch.device) -> int:
    """Handle of torch's current stream on `device`."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def launch(
    kernel: Function, device: torch.device, stream: int, blocks: int, threads: int, parameters: bytes, shared: int = 0
) -> None:
    """Starts `kernel` with `parameters` as its one argument, by value."""
    if device.index != torch.cuda.current_device():  # a handle of 0 names the current device's stream
        with torch.cuda.device(device):
            return launch(kernel, device, stream, blocks, threads, parameters, shared)
    by_value = numpy.frombuffer(parameters, f"V{len(parameters)}")
    kernel((blocks,), (threads,), (by_value,), shared, _stream(stream))


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    return cupy.cuda.ExternalStream(handle)
