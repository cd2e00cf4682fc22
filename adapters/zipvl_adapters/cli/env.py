"""`zipvl env`: what a bug report needs. Every probe is guarded: a broken installation is what it is for."""

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zipvl_adapters.cli.assets import checkout, find_assets

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "zipvl-kernels", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "cupy", "transformers", "tokenizers",
    "safetensors", "torchvision", "accelerate", "numpy", "pillow", "matplotlib", "rich", "typer",
)  # fmt: skip
# Version numbers say little about an installation that is broken: these are imported as well.
_IMPORTED = ("torch", "triton", "cupy", "transformers", "torchvision")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Print versions, GPU and backends: the block for a bug report."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for section, content in facts.items():
        if not isinstance(content, dict):
            print(f"{section}: {content}")
            continue
        print(f"{section}:")
        for name, value in content.items():
            print(f"  {name}: {value}")


def environment() -> dict[str, Any]:
    """Everything `zipvl env` prints, as JSON-ready sections."""
    return {
        "system": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "os": _guarded(platform.platform),
            "cpu": _guarded(_cpu),
            "commit": _guarded(commit),
        },
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "imports": {name: _guarded(partial(_import, name)) for name in _IMPORTED},
        "gpu": _guarded(_gpu),
        "backends": _guarded(_backends),
        "models": _guarded(_models),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name in _VARIABLES or name.startswith("ZIPVL_")
        },
    }


def versions() -> dict[str, str | None]:
    """The versions that results are recorded with."""
    names = ("zipvl-kernels", "torch", "transformers", "triton")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with '+' after it when files differ; None if unknown."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def device_name(device: "torch.device") -> str:
    """The model name of the processor that results were measured on."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(_guarded(_cpu)) if device.type == "cpu" else device.type


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except BaseException as error:  # a broken extension may raise anything
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return "not installed"
        raise
    return f"ok ({module.__version__})"


def _cpu() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {usable} cores usable"


def _gpu() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch built for CUDA": torch.version.cuda, "available": torch.cuda.is_available()}
    if not torch.cuda.is_available():
        facts["mps"] = torch.backends.mps.is_available()
        return facts
    facts["driver"] = _guarded(
        lambda: _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    )
    facts["CUDA runtime loaded"] = _guarded(_cuda_runtime)
    facts["cuDNN"] = _guarded(torch.backends.cudnn.version)
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = found.total_memory / 2**30
        facts[f"cuda:{i}"] = f"{found.name}, capability {found.major}.{found.minor}, {memory:.0f} GiB"
    return facts


def _cuda_runtime() -> str:
    """Version and file of the CUDA runtime that this process has loaded, which need not be the one installed."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
    found = []
    for path in sorted(mapped):
        version = ctypes.c_int()
        ctypes.CDLL(path).cudaRuntimeGetVersion(ctypes.byref(version))
        found.append(f"{version.value // 1000}.{version.value % 1000 // 10} ({path})")
    return ", ".join(found) or "none"


def _backends() -> dict[str, str]:
    import zipvl_kernels

    return dict(zipvl_kernels.backends())


def _models() -> str:
    found = find_assets()
    questions = sum(len(asked) for asked in found.tasks.values())
    return f"{found.folder} ({', '.join(found.models)}; {questions} held-out questions)"
