"""Launching without the host time that Triton and CuPy take: the right binary, the right arguments. Needs no GPU."""

import ctypes
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import zipvl_kernels as zk
from zipvl_kernels import _backends

GPU = torch.device("cuda", 0)
SCALE = 0.25


def tensor(address=4096, dtype=torch.float16, device=GPU):
    """What a launch asks of a tensor."""
    return SimpleNamespace(device=device, dtype=dtype, data_ptr=lambda: address)


class Binary:
    """What a launch asks of a kernel that Triton has compiled; notes how it was started."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, started):
        self.run = lambda *args: started.append(args)


class Kernel:
    """A kernel with parameters `x, y, n, m, scale, BLOCK`, whose ordinary launches are noted."""

    arg_names = ("x", "y", "n", "m", "scale", "BLOCK")

    def __init__(self):
        self.fn = object()
        self.ordinary, self.direct = [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.ordinary.append((grid, args, constants))
            return Binary(self.direct)

        return launch


@pytest.fixture
def common(monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module("zipvl_kernels._triton.common")
    monkeypatch.setattr(module, "CompiledKernel", Binary)
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "current_stream", lambda device: 7)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "AMD", False)
    return module


def launch(common, kernel, x=None, y=None, numbers=(48, 3, SCALE), grid=(5, 2), **constants):
    common.launch(kernel, grid, (x or tensor(), y), numbers, **{"BLOCK": 64, "num_warps": 4, **constants})


def test_second_launch_is_direct(common):
    kernel = Kernel()
    launch(common, kernel)
    launch(common, kernel, x=tensor(address=8192), numbers=(96, 5, 0.5), grid=(9,))
    assert len(kernel.ordinary) == 1
    grid_and_stream, binary, no_hooks = (9, 1, 1, 7), (11, (4, 1, 0)), (None, None, None)
    assert kernel.direct == [(*grid_and_stream, *binary, *no_hooks, 8192, 0, 96, 5, 0.5, 64)]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": tensor(address=4104)},
        {"x": tensor(dtype=torch.bfloat16)},
        {"y": tensor()},
        {"numbers": (47, 3, SCALE)},
        {"numbers": (48, 1, SCALE)},
        {"numbers": (48, 16, SCALE)},
        {"numbers": (2**31, 3, SCALE)},
        {"numbers": (48, -(2**31) - 1, SCALE)},
        {"BLOCK": 128},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_needs_another_binary_is_launched_by_triton(common, changed):
    kernel = Kernel()
    for _ in range(2):
        launch(common, kernel)
        launch(common, kernel, **changed)
    assert len(kernel.ordinary) == len(kernel.direct) == 2


def test_kernels_and_devices_have_binaries_of_their_own(common, monkeypatch):
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launch(common, kernel)
    monkeypatch.setattr(common, "current_device", lambda: 1)
    launch(common, kernels[0], x=tensor(device=torch.device("cuda", 1)))
    assert [len(kernel.ordinary) for kernel in kernels] == [2, 1]
    assert not kernels[0].direct


def test_a_profiler_sees_every_launch(common, monkeypatch):
    kernel = Kernel()
    launch(common, kernel)
    monkeypatch.setattr(common.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(common, kernel)
    assert len(kernel.ordinary) == 2


def test_numbers_alike_are_alike_to_triton(common):
    specialize = importlib.import_module("triton._C.libtriton").native_specialize_impl
    backend = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
    edges = [sign * 2**bits + more for bits in (31, 32, 62) for sign in (1, -1) for more in (-16, -1, 0, 1, 16)]
    found = {}
    for x in [*range(-33, 50), *edges, 2**63 - 1, 0.0, 1.0, 16.0, 0.3]:
        found.setdefault(common._alike(type(x), (x,)), set()).add(specialize(backend, x, False, True, True))
    assert all(len(kinds) == 1 for kinds in found.values())
    assert len(found) < 30


@pytest.fixture
def cuda_common(monkeypatch):
    """`zipvl_kernels._cuda.common` over a CuPy that only notes what reaches the driver."""

    class DriverError(RuntimeError):
        def __init__(self, status):
            self.status = status

    names = ("cupy", "cupy.cuda", "cupy.cuda.driver", "cupy.cuda.function", "cupy.cuda.nvrtc", "cupy.cuda.runtime")
    fakes = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        setattr(fakes[name.rpartition(".")[0]], name.rpartition(".")[2], fakes[name])
    launched, errors, freed = [], [], []

    def start(config, function, pointers, extra):
        if errors:
            return errors.pop()
        *sizes, stream, _, attributes = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        parameters = ctypes.string_at(ctypes.c_void_p.from_address(pointers).value, 5)
        launched.append((function, *sizes, stream, attributes, parameters, extra))
        return 0

    fakes["cupy.cuda.driver"].CUDADriverError = DriverError
    fakes["cupy.cuda.runtime"].free = freed.append
    fakes["cupy.cuda.function"].Function = fakes["cupy.cuda.function"].Module = object
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    source = Path(zk.__file__).parent / "_cuda" / "common.py"
    spec = importlib.util.spec_from_file_location("cuda_common_over_nothing", source)  # beside the real one, if any
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "_start", lambda: start)
    return module, launched, errors, freed


def test_cuda_launch_passes_the_bytes(cuda_common, monkeypatch):
    module, launched, _, _ = cuda_common
    fixed = SimpleNamespace(ptr=23), GPU, 40, 256, struct.Struct("=2s"), b"b\0c"
    step = module.Launch(*fixed, shared=1024)
    step(7, b"a\0")
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))  # kernels do not overlap there
    module.Launch(*fixed)(7, b"a\0")
    step(9, b"xy")
    monkeypatch.setattr(module, "current_stream", lambda device: 5)
    module.launch(step, b"xz")
    sizes = 40, 1, 1, 256, 1, 1
    expected = [(1024, 7, 1, b"a\0"), (0, 7, 0, b"a\0"), (1024, 9, 1, b"xy"), (1024, 5, 1, b"xz")]
    assert launched == [(23, *sizes, x, stream, n, at + b"b\0c", None) for x, stream, n, at in expected]
    assert struct.unpack("=i4xi60x", module._ATTRIBUTE.raw) == (6, 1)


def test_cuda_launch_in_a_thread_without_a_context(cuda_common):
    module, launched, errors, freed = cuda_common
    step = module.Launch(SimpleNamespace(ptr=23), GPU, 40, 256, struct.Struct("=2s"), b"cde")
    errors.append(module.INVALID_CONTEXT)
    step(7, b"ab")
    assert (len(launched), freed) == (1, [0])
    errors.append(700)
    with pytest.raises(RuntimeError):
        step(7, b"ab")
    assert len(launched) == 1


def test_what_a_kernel_lacks_is_asked_once():
    asked = []

    def lacks(x):
        asked.append(x)
        return "" if x > 0 else f"x: expected more than 0, got {x}"

    auto = _backends._first_that_can([(lambda x: "kernel", lacks), (lambda x: "reference", None)])
    assert [auto(1), auto(-1), asked] == ["kernel", "reference", [1, -1]]
    explicit = _backends._or_raise("cuda", lambda x: "kernel", lacks)
    assert explicit(2) == "kernel"
    with pytest.raises(ValueError, match=r"^backend='cuda': x: expected more than 0, got -2$"):
        explicit(-2)
    assert asked == [1, -1, 2, -2]
