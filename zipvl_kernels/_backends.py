"""Which implementations of the operators exist on this machine, and why the others do not."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import zipvl_reference

NAMES = ("reference", "triton", "cuda")
_DISTRIBUTIONS = {"triton": ("triton",), "cuda": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}


def backends() -> dict[str, str]:
    """Every backend's name and either "available" or "not available: " and what is missing.

    Looks at installed distributions and at the GPU; imports neither Triton nor CuPy. Never raises.
    """
    missing = {name: _missing(name) for name in NAMES}
    return {name: f"not available: {why}" if why else "available" for name, why in missing.items()}


@cache
def resolve(operator: str, backend: str) -> Callable[..., Any]:
    """The function behind `operator`. "auto" takes the fastest that exists; an explicit backend never falls back.

    Raises ValueError for an unknown name and RuntimeError for one that is not available.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend: expected one of {('auto', *NAMES)}, got {backend!r}")
    if why := backend != "auto" and _missing(backend):
        raise RuntimeError(f"backend={backend!r} is not available for {operator}: {why}; use 'auto' or 'reference'")
    implementation: Callable[..., Any] = getattr(zipvl_reference, operator)
    return implementation


def _missing(backend: str) -> str:
    """What this machine lacks to run `backend`, "" where nothing is lacking."""
    if backend == "reference":
        return ""
    found = [f"{name} {v}" for name in _DISTRIBUTIONS[backend] if (v := _version(name))]
    reasons = [f"this version has no {backend} kernels"]
    if not found:
        reasons.append(f"{_DISTRIBUTIONS[backend][0]} is not installed")
    if not torch.cuda.is_available():
        reasons.append("torch sees no GPU")
    return ", ".join(reasons)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
