"""What all CUDA C kernels need: compiling and loading them, and launching on torch's current stream."""

import ctypes
import struct
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from threading import Lock

import torch
from cupy.cuda import driver, nvrtc, runtime
from cupy.cuda.function import Function, Module
from torch import Tensor

from zipvl_kernels._streams import current_device, current_stream

__all__ = [
    "Launch",
    "address",
    "allow_large_cluster",
    "allow_shared",
    "capability",
    "check",
    "clusters_at_once",
    "current_device",
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
_CONFIG, _STREAM_AT = struct.Struct("=7I4xQQI4x"), 32
_ATTRIBUTE = ctypes.create_string_buffer(struct.pack("=i4xi60x", 6, 1), 72)  # programmatic stream serialization: on


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def address(x: Tensor | None) -> int:
    """Where `x` lies, 0 for None."""
    return 0 if x is None else x.data_ptr()


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


def allow_large_cluster(kernel: Function, device: torch.device) -> None:
    """Lets `kernel` have clusters of more than 8 blocks, which not every GPU has room for."""
    with torch.cuda.device(device):
        driver.funcSetAttribute(kernel.ptr, 14, 1)  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


class Launch:
    """A launch of a kernel that takes one struct by value: numbers that stay the same, after addresses that do not.

    The driver copies what it is given, so that any number of them can be under way. One thread at a time, which holds
    `lock`, gives the addresses to `fill`, sets the stream's `value`, and calls `start`, which returns the status.
    """

    def __init__(
        self,
        kernel: Function,
        device: torch.device,
        blocks: int,
        threads: int,
        addresses: struct.Struct,
        numbers: bytes,
        shared: int = 0,
    ) -> None:
        self.kernel, self.device, self.lock = kernel, device, _lock(device)
        self.parameters = ctypes.create_string_buffer(bytes(addresses.size) + numbers, addresses.size + len(numbers))
        self.fill = partial(addresses.pack_into, self.parameters, 0)
        # The driver wants an array of pointers to the arguments, here of one.
        self.pointer = ctypes.c_void_p(ctypes.addressof(self.parameters))
        overlaps = capability(device) >= (9, 0)
        config = _CONFIG.pack(blocks, 1, 1, threads, 1, 1, shared, 0, ctypes.addressof(_ATTRIBUTE), overlaps)
        self.config = ctypes.create_string_buffer(config, len(config))
        self.stream = ctypes.c_uint64.from_buffer(self.config, _STREAM_AT)
        # CuPy's call takes several times as long, and cannot overlap kernels.
        at = ctypes.addressof
        self.start: Callable[[], int] = partial(_start(), at(self.config), kernel.ptr, at(self.pointer), None)

    def __call__(self, stream: int, *addresses: int | bytes) -> None:
        """Starts it on a stream of the current device; on Hopper under the end of the kernel before it."""
        with self.lock:
            self.fill(*addresses)
            self.stream.value = stream
            status = self.begin()
        check(status)

    def begin(self) -> int:
        """`start`, in a thread that may not have used CUDA yet."""
        status = self.start()
        if status == INVALID_CONTEXT:
            runtime.free(0)  # makes the device's context the thread's
            status = self.start()
        return status


def clusters_at_once(step: Launch) -> int:
    """How many clusters of this launch the device has room for at a time; 0 where it cannot have one so large."""
    found = ctypes.c_int()
    with torch.cuda.device(step.device):
        kernel, config = ctypes.c_void_p(step.kernel.ptr), ctypes.c_void_p(ctypes.addressof(step.config))
        status = libcuda().cuOccupancyMaxActiveClusters(ctypes.byref(found), kernel, config)
    return 0 if status else found.value


def check(status: int) -> None:
    """Raises the driver's error, if there is one."""
    if status:
        raise driver.CUDADriverError(status)


@cache
def _lock(device: torch.device) -> Lock:
    """Of the device, since a launch waits for room in its queue."""
    return Lock()


def launch(step: Launch, *addresses: int | bytes) -> None:
    """Starts `step` on torch's current stream of its device."""
    if step.device.index != current_device():  # a handle of 0 names the current device's stream
        with torch.cuda.device(step.device):
            return launch(step, *addresses)
    step(current_stream(step.device), *addresses)


@cache
def libcuda() -> ctypes.CDLL:
    """The driver itself, for what CuPy does not offer."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _start() -> Callable[..., int]:
    function = libcuda().cuLaunchKernelEx
    function.argtypes = 4 * (ctypes.c_void_p,)
    return function
