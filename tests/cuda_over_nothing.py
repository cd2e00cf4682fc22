"""The launchers of the CUDA C kernels where there is neither CuPy nor a GPU: what the tests of launches share."""

import ctypes
import importlib
import struct
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

KERNELS = ("probe_rows", "row_sums", "column_sums", "select_tokens", "compact_kv", "sparse_attention")


@pytest.fixture
def cuda(monkeypatch):
    """The modules of `zipvl_kernels._cuda` over no CuPy, and a driver that notes grids and parameters, by kernel.

    What they allocate, on the CPU, stays, so that no two tensors have one address; a tensor is copied once.
    """
    cupy = ("cupy", "cupy.cuda", "cupy.cuda.function")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in cupy}):
        for name in [name for name in sys.modules if name.startswith("zipvl_kernels._cuda")]:
            del sys.modules[name]
        operators = ("probe_rows", "score_tokens", "select_tokens", "compact_kv", "sparse_attention", "zipvl_prefill")
        stems = ("common", "tensor_map", "compact_paged_kv", "decode_attention", *operators)
        found = {stem: importlib.import_module(f"zipvl_kernels._cuda.{stem}") for stem in stems}
    modules = SimpleNamespace(**found, launched=[])
    sizes = [56, 384, 384, 136, 176, 512]  # of the parameters, as the sources of the kernels assert

    def start(config, kernel, pointers, extra):
        parameters = ctypes.string_at(ctypes.c_void_p.from_address(pointers).value, sizes[kernel])
        modules.launched.append((KERNELS[kernel], ctypes.string_at(config, 56), parameters))
        return 0

    def encode(to, kind, rank, address, *rest):
        ctypes.memmove(to.value, struct.pack("=QQ", 1 << 63, address.value), 16)
        return 0

    def load(name, *_, **defined):
        return SimpleNamespace(ptr=KERNELS.index(name))

    module = SimpleNamespace(get_function=load)
    monkeypatch.setattr(modules.common, "load", load)
    monkeypatch.setattr(modules.common, "load_module", lambda *_, **defined: module)
    monkeypatch.setattr(modules.common, "allow_shared", lambda *_: None)
    monkeypatch.setattr(modules.common, "allow_large_cluster", lambda *_: None)
    monkeypatch.setattr(modules.common, "clusters_at_once", lambda step: 1)
    monkeypatch.setattr(modules.common, "capability", lambda device: (9, 0))
    monkeypatch.setattr(modules.common, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(modules.common, "current_device", lambda: None)
    monkeypatch.setattr(modules.common, "current_stream", lambda device: 7)
    monkeypatch.setattr(modules.common, "_start", lambda: start)
    monkeypatch.setattr(modules.tensor_map, "libcuda", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    counters = torch.zeros(1 << 16, dtype=torch.int32)
    for user in (modules.compact_kv, modules.compact_paged_kv, modules.sparse_attention, modules.zipvl_prefill):
        monkeypatch.setattr(user, "tickets", lambda device, count: counters)
    kept, copies, contiguous = [], {}, torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copies.setdefault(id(x), contiguous(x)))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def keep(*args, make=make, **options):
            kept.append(make(*args, **options))
            return kept[-1]

        monkeypatch.setattr(owner, name, keep)
    return modules


def qkv(B, Hq, Hkv, M, N, D, dtype=torch.bfloat16):
    shapes = ((B, M, Hq, D), (B, N, Hkv, D), (B, N, Hkv, D))
    return [torch.zeros(shape, dtype=dtype).transpose(1, 2) for shape in shapes]


OPTIONS = {
    "tau": 0.975, "keep_ratio": None, "num_recent": 64, "num_random": 64, "seed": 0, "keep_first": 0, "keep_recent": 1,
    "scale": None, "q_start": None, "leftpad_k": None, "seqused_k": None, "pool": "layer",
}  # fmt: skip
