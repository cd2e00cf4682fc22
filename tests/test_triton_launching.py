"""Launching Triton kernels without its host time: the right binary, the right arguments. Needs no GPU."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

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
