"""Which implementations of the operators exist on this machine, and why the others do not."""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import zipvl_reference

NAMES = ("reference", "triton", "cuda")
_DISTRIBUTIONS = {"triton": ("triton",), "cuda": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}

# The GPU backends of each operator, best first; "auto" takes the first that this machine can run. An implementation is
# the function of the operator's name in `zipvl_kernels._BACKEND.STEM`, with the signature of its twin in
# `zipvl_reference`. Where it takes some arguments only, `lacks` beside it, with the same signature, says why not. It is
# asked once, here: "auto" goes on to the next implementation, an explicit backend raises.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "probe_rows": ("cuda", "triton"),
    "score_tokens": ("cuda", "triton"),
    "select_tokens": ("cuda", "triton"),
    "compact_kv_": ("cuda", "triton"),
    "compact_paged_kv_": ("cuda", "triton"),
    "sparse_attention": ("cuda", "triton"),
    "decode_attention": ("cuda", "triton"),
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
        usable = [name for name in implemented if not _missing(name)] if device_type == "cuda" else []
        found = [_load(operator, name) for name in usable]
        return _first_that_can([*found, (_reference(operator, device_type), None)])
    if backend == "reference":
        return _reference(operator, device_type)
    why = f"there is no {backend} kernel of this operator" if backend not in implemented else _missing(backend)
    if why:
        raise RuntimeError(f"backend={backend!r} is not available for {operator}: {why}; use 'auto' or 'reference'")
    if device_type != "cuda" and not (backend == "triton" and _interpreting()):
        raise ValueError(f"backend={backend!r}: expected CUDA tensors for {operator}, got tensors on {device_type}")
    return _or_raise(backend, *_load(operator, backend))


_Function = Callable[..., Any]
_Lacks = Callable[..., str] | None


def _load(operator: str, backend: str) -> tuple[_Function, _Lacks]:
    """A kernel, and its `lacks` if it takes some arguments only."""
    module = import_module(f"zipvl_kernels._{backend}.{operator.removesuffix('_')}")
    return getattr(module, operator), getattr(module, "lacks", None)


@cache
def _reference(operator: str, device_type: str) -> _Function:
    """The twin in plain PyTorch as it is meant: without gradients, and in its own dtypes under autocast.

    Kernels know of neither.
    """
    fn = getattr(zipvl_reference, operator)

    @wraps(fn)
    def run(*args: Any, **options: Any) -> Any:
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                return fn(*args, **options)
        with torch.no_grad():
            return fn(*args, **options)

    return run


def _first_that_can(found: list[tuple[_Function, _Lacks]]) -> _Function:
    """The first implementation that takes the arguments of a call; the last one takes all."""
    fn, lacks = found[0]
    if lacks is None:
        return fn
    others = _first_that_can(found[1:])

    def run(*args: Any, **options: Any) -> Any:
        return others(*args, **options) if lacks(*args, **options) else fn(*args, **options)

    return run


def _or_raise(backend: str, fn: _Function, lacks: _Lacks) -> _Function:
    """`fn`, which refuses arguments that it cannot take."""
    if lacks is None:
        return fn

    def run(*args: Any, **options: Any) -> Any:
        why = lacks(*args, **options)
        if why:
            raise ValueError(f"backend={backend!r}: {why}")
        return fn(*args, **options)

    return run


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
