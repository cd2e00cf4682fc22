"""What the GPU checks share: implementations to check, inputs of every operator, and what a call is compared by.

Without a GPU the same checks run in miniature under Triton's interpreter, as a rehearsal.
"""

import os
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import torch

import zipvl_kernels as zk
from zipvl_kernels._backends import resolve

REAL = torch.cuda.is_available()
DEVICE = "cuda" if REAL else "cpu"
DTYPE = torch.bfloat16 if REAL else torch.float32  # bf16 arithmetic is wrong in the interpreter
EXAMPLES = int(os.environ.get("ZIPVL_GPU_EXAMPLES", "12" if REAL else "2"))
HEADS = (28, 4) if REAL else (4, 2)
D = 128 if REAL else 16
LENGTHS = (2880, 32768) if REAL else (70,)
OPERATORS = (
    "probe_rows",
    "score_tokens",
    "select_tokens",
    "compact_kv_",
    "sparse_attention",
    "decode_attention",
    "zipvl_prefill_",
)
needs_gpu = pytest.mark.skipif(not REAL, reason="needs a GPU")


@contextmanager
def never_waiting():
    """Within the block a call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def available(operator):
    """The backends with a kernel of `operator` that run here."""

    def has(backend):
        try:
            resolve(operator, backend, DEVICE)
        except (RuntimeError, ValueError):
            return False
        return True

    return [backend for backend in ("cuda", "triton") if has(backend)]


def chosen(operator):
    """The backends to check: each kernel; "auto" where a kernel leaves some arguments to others."""
    if operator == "probe_rows":  # takes no backend
        return ["auto"]
    if operator == "zipvl_prefill_":
        return ["auto", *(["triton"] if all("triton" in available(step) for step in OPERATORS[1:5]) else [])]
    found = available(operator)
    stem = operator.removesuffix("_")
    partly = [x for x in found if hasattr(import_module(f"zipvl_kernels._{x}.{stem}"), "lacks")]
    if partly:
        return ["auto", *(backend for backend in found if backend not in partly)]
    return found


PAIRS = [(operator, backend) for operator in OPERATORS for backend in chosen(operator)]
every = pytest.mark.parametrize(("operator", "backend"), PAIRS, ids=lambda x: x)
# The drawing of probes has no tensors to batch, pad or poison.
every_on_tensors = pytest.mark.parametrize(
    ("operator", "backend"), [pair for pair in PAIRS if pair[0] != "probe_rows"], ids=lambda x: x
)


def function(operator, backend):
    """The public function with its backend fixed."""
    fn = getattr(zk, operator)
    return fn if operator == "probe_rows" else partial(fn, backend=backend)


def inputs(operator, lengths, *, seed=0, dtype=DTYPE, heads=HEADS, padded=True):
    """Arguments and options of `operator` for sequences of these lengths, left-padded to the longest."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    (Hq, Hkv), B, N = heads, len(lengths), max(lengths)

    def draw(*shape):
        return torch.randn(shape, generator=random, device=DEVICE).to(dtype)

    def rows_of(n):
        return draw(B, n, Hq, D).transpose(1, 2), *(draw(B, N, Hkv, D).transpose(1, 2) for _ in range(2))

    leftpad = torch.tensor([N - n for n in lengths], dtype=torch.int32, device=DEVICE) if padded else None
    options = {"leftpad_k": leftpad}
    if operator == "select_tokens":
        scores = torch.randn(B, 1, N, generator=random, device=DEVICE).mul(2).exp()
        return [scores, scores / torch.arange(N, 0, -1, device=DEVICE)], {"tau": 0.9, **options}
    q, k, v = rows_of(2 if operator == "decode_attention" else N)
    if operator == "score_tokens":
        rows = zk.probe_rows(N, num_recent=min(64, N // 2), num_random=min(64, N // 2), device=DEVICE)
        return [q, k, rows.expand(B, -1).contiguous()], options
    if operator == "zipvl_prefill_":
        return [q, k, v], {"tau": 0.8, **options}
    if operator == "decode_attention":
        return [q, k, v, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)], {}
    indices = torch.full((B, 1, N), -1, dtype=torch.int32, device=DEVICE)
    counts = []
    for b, n in enumerate(lengths):
        members = torch.rand(n, generator=random, device=DEVICE).argsort()[: max(1, n * 3 // 8)].sort().values + N - n
        indices[b, 0, : len(members)] = members
        counts.append([len(members)])
    counts = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    if operator == "compact_kv_":
        return [k, v, indices, counts], {}
    return [q, k, v, indices, counts], {"kv_compacted": True}


def results(operator, fn, arguments, options):
    """Everything that a call returns and, on copies, writes; rows past a set, which are unspecified, as zeros."""
    if operator not in ("compact_kv_", "zipvl_prefill_"):
        out = fn(*arguments, **options)
        return list(out) if isinstance(out, tuple) else [out]
    written = slice(0, 2) if operator == "compact_kv_" else slice(1, 3)
    arguments = list(arguments)
    arguments[written] = [x.clone() for x in arguments[written]]
    out = fn(*arguments, **options)
    counts = arguments[3] if operator == "compact_kv_" else out[2]
    unspecified = torch.arange(arguments[1].shape[2], device=DEVICE) >= counts[..., None]  # [B, 1, N]
    moved = [x.masked_fill(unspecified[..., None], 0) for x in arguments[written]]
    return [*(out or ()), *moved]


def one(b, arguments, options):
    """Sequence `b` of them alone."""

    def cut(x):
        return x[b : b + 1].clone() if isinstance(x, torch.Tensor) else x

    return [cut(x) for x in arguments], {name: cut(x) for name, x in options.items()}
