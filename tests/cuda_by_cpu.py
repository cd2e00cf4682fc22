"""Fixtures that run CUDA C kernels on the CPU: the launchers as they are, over a driver that cuda_on_cpu/ is."""

import ctypes
import functools
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zipvl_kernels as zk

KERNELS, STANDINS = Path(zk.__file__).parent / "_cuda", Path(__file__).with_name("cuda_on_cpu")
ENTRIES = {"score_tokens": ("row_sums", "column_sums"), "decode_attention": ("attend_splits", "merge_splits")}
PLAIN = {
    'asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory")': "*flag = 1",
    'asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory")': "x = *flag",
}
CONTIGUOUS = torch.Tensor.contiguous


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for source in (*KERNELS.glob("*.cuh"), *STANDINS.iterdir()):  # stand-ins last: one takes the place of a header
        text = source.read_text()
        for assembly, plain in PLAIN.items():
            text = text.replace(assembly, plain)
        (folder / source.name).write_text(text)

    @functools.cache
    def library(name, defined, text=""):
        stem = "_".join([name, *(str(value) for _, value in defined)])
        source, program = folder / f"{stem}.cpp", folder / f"{stem}.so"
        runs = " ".join(f"RUN({entry})" for entry in ENTRIES.get(name, (name,)))
        text = text or (KERNELS / f"{name}.cu").read_text()
        source.write_text(f"{text.replace('extern __shared__', 'extern')}\n{runs}\n")
        macros = [f"-D{macro}={value}" for macro, value in defined] + ["-D__shared__=static"]
        flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-w", "-Wno-psabi", "-fPIC", "-shared"]
        flags += ["-include", folder / "cuda_on_cpu.h"]
        subprocess.run(["g++", *flags, *macros, source, "-o", program], check=True)
        return ctypes.CDLL(str(program))

    return library


@pytest.fixture
def on_cpu(cuda, compiled, monkeypatch):
    """`zipvl_kernels._cuda`, whose launches run."""
    kernels = []

    def load_module(name, *_, **defined):
        library = compiled(name, tuple(sorted(defined.items())))

        def get_function(entry):
            kernels.append(getattr(library, f"run_{entry}"))
            return SimpleNamespace(ptr=len(kernels) - 1)

        return SimpleNamespace(get_function=get_function)

    def load(name, *_, **defined):
        return load_module(name, **defined).get_function(name)

    def start(config, kernel, pointers, extra):
        blocks, *_, threads, _, _, _ = struct.unpack("=7I", ctypes.string_at(config, 28))
        kernels[kernel](blocks, threads, ctypes.c_void_p(ctypes.c_void_p.from_address(pointers).value))
        return 0

    def encode(to, kind, rank, address, sizes, strides, box, *rest):
        fields = struct.pack("=9Q", address.value, *sizes, *strides, box[1])
        ctypes.memmove(to.value, fields, len(fields))
        return 0

    monkeypatch.setattr(torch.Tensor, "contiguous", CONTIGUOUS)  # of which `cuda` keeps the results
    monkeypatch.setattr(cuda.common, "load_module", load_module)
    monkeypatch.setattr(cuda.common, "load", load)
    monkeypatch.setattr(cuda.common, "_start", lambda: start)
    monkeypatch.setattr(cuda.common, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(cuda.tensor_map, "libcuda", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    return cuda
