"""Which implementations of the operators exist on this machine, and why the others do not."""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import zipvl_reference

NAMES = ("reference", "triton", "cuda")
_DISTRIBUTIONS = {"triton": ("triton",), "cuda": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}

# The GPU backends of each operator, best first; "auto" takes the first that this machine can run. An implementation is
# the function of the operator's name in `zipvl_kernels._BACKEND.STEM`, with the signature of its twin in
# `zipvl_reference`.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "sparse_attention": ("triton",),
}


def backends() -> dict[str, str]:
    """Every backend's name and either "available" or "not available: " and what is missing.

    Looks at installed distributions and at the GPU; imports neither Triton nor CuPy. Never raises.
    """
    missing = {name: _missing(name) for name in NAMES}
    return {name: f"not available: {why}" if why else "available" for name, why in missing.items()}


@cache
def resolve(operator: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The function behind `operator` for tensors on `device_type`.

    "auto" takes the fastest that exists; an explicit backend never falls back. Raises ValueError for an unknown name or
    tensors that the backend cannot take, RuntimeError for a backend that is not available.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend: expected one of {('auto', *NAMES)}, got {backend!r}")
    implemented = _IMPLEMENTED.get(operator, ())
    if backend == "auto":
        usable = implemented if device_type == "cuda" else ()
        backend = next((name for name in usable if not _missing(name)), "reference")
    if backend == "reference":
        implementation: Callable[..., Any] = getattr(zipvl_reference, operator)
        return implementation
    why = f"there is no {backend} kernel of this operator" if backend not in implemented else _missing(backend)
    if why:
        raise RuntimeError(f"backend={backend!r} is not available for {operator}: {why}; use 'auto' or 'reference'")
    if device_type != "cuda" and not (backend == "triton" and _interpreting()):
        raise ValueError(f"backend={backend!r}: expected CUDA tensors for {operator}, got tensors on {device_type}")
    stem = operator.removesuffix("_")
    implementation = getattr(import_module(f"zipvl_kernels._{backend}.{stem}"), operator)
    return implementation


def _missing(backend: str) -> str:
    """What this machine lacks to run `backend`, "" where nothing is lacking."""
    if backend == "reference":
        return ""
    reasons = []
    if not any(_version(name) for name in _DISTRIBUTIONS[backend]):
        reasons.append(f"{_DISTRIBUTIONS[backend][0]} is not installed")
    if not torch.cuda.is_available() and not (backend == "triton" and _interpreting()):
        reasons.append("torch sees no GPU")
    return ", ".join(reasons)


def _interpreting() -> bool:
    """Triton's interpreter runs the kernels on the CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
