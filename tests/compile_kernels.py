"""Compiles the Triton kernels without a GPU, exactly as a launch on it would, and prints what they take, in JSON.

Operators are called with tensors that have no memory, for a driver that only says which GPU it stands for; so every
kernel comes out with the tiles that the package's tables choose, and with the specialisations of a real launch.

    python tests/compile_kernels.py [--all] [--record] [TARGET...]    # in a process without TRITON_INTERPRET

`--record` writes what they take to tests/compile_bounds.json, which tests/test_compile_targets.py holds them to.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Each target, and how many kilobytes of shared memory a block may have there.
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
BOUNDS = Path(__file__).with_name("compile_bounds.json")
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGES = ((16, "NHD"), (64, "HND"))
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return list(TARGETS).index(next(name for name, (target, _) in TARGETS.items() if target == self.target))

    def get_current_stream(self, device):
        return 0


def qkv(dtype, D, M=2880, N=2880, B=1, Hq=28, Hkv=4):
    """As a model hands them over: views of `[B, N, H, D]`, here without memory."""
    q = torch.empty(B, M, Hq, D, dtype=dtype, device="meta").transpose(1, 2)
    return q, *(torch.empty(B, N, Hkv, D, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))


def packed(dtype, D, T=32768, Hq=28, Hkv=4):
    """Views of a fused projection's `[T, Hq + 2 * Hkv, D]`."""
    return torch.empty(T, Hq + 2 * Hkv, D, dtype=dtype, device="meta").split((Hq, Hkv, Hkv), 1)


def ints(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def floats(*shape):
    return torch.empty(shape, dtype=torch.float32, device="meta")


def score_tokens(fn, dtype, D):
    q, k, _ = qkv(dtype, D)
    yield "", lambda: fn(q, k, ints(128))
    yield (
        "padded, by head",
        lambda: fn(q, k, ints(1, 128), leftpad_k=ints(1), seqused_k=ints(1), q_start=ints(1), pool="kv_head"),
    )
    q, k, _ = qkv(dtype, D, M=32768, N=32768)
    yield "32768", lambda: fn(q, k, ints(128))
    for page, layout in PAGES:
        q, *_ = qkv(dtype, D, M=1024)
        k, _ = pools(dtype, D, page, layout)
        paged = {"seqused_k": ints(1), "block_table": ints(1, 2880 // page), "layout": layout}
        yield f"pages of {page}", lambda x=(q, k), paged=paged: fn(*x, ints(128), **paged)
    q, k, _ = packed(dtype, D)
    yield "packed", lambda: fn(q, k, ints(8, 128), cu_seqlens=ints(9), max_seqlen=4096)


def select_tokens(fn, dtype, D):
    for N in (2880, 32768, 131072):
        scores = floats(1, 1, N), floats(1, 1, N)
        yield f"tau {N}", lambda scores=scores: fn(*scores, tau=0.975)
        yield f"ratio {N}", lambda scores=scores: fn(*scores, keep_ratio=0.4)
    scores = floats(2, 4, 2880), floats(2, 4, 2880)
    yield "padded", lambda: fn(*scores, tau=0.975, leftpad_k=ints(2), seqused_k=ints(2))
    scores = floats(1, 32768), floats(1, 32768)
    yield "packed", lambda: fn(*scores, tau=0.975, cu_seqlens=ints(9), max_seqlen=4096)


def compact_kv_(fn, dtype, D):
    _, k, v = qkv(dtype, D)
    yield "", lambda: fn(k, v, ints(1, 1, 2880), ints(1, 1))
    yield "from a start", lambda: fn(k, v, ints(1, 1, 2880), ints(1, 1), dst_start=ints(1))
    rows = k[0].transpose(0, 1), v[0].transpose(0, 1)
    yield "packed", lambda: fn(*rows, ints(1, 2880), ints(3, 1), cu_seqlens=ints(4), max_seqlen=2880)


def pools(dtype, D, page, layout="NHD", Hkv=4):
    """Keys and values of a cache of 4096 pages, the halves of one buffer."""
    rows = (page, Hkv) if layout == "NHD" else (Hkv, page)
    return torch.empty(2, 4096, *rows, D, dtype=dtype, device="meta").unbind()


def compact_paged_kv_(fn, dtype, D):
    arguments = ints(8, 1, 2880), ints(8, 1), ints(8, 180), ints(8)
    yield "", lambda: fn(*pools(dtype, D, 16), *arguments)
    yield "shared", lambda: fn(*pools(dtype, D, 16), *arguments, first_writable=ints(8))
    yield "rows", lambda: fn(*pools(dtype, D, 1, "HND"), *arguments, layout="HND")


def sparse_attention(fn, dtype, D):
    q, k, v = qkv(dtype, D)
    yield "compacted", lambda: fn(q, k, v, ints(1, 1, 2880), ints(1, 1), kv_compacted=True)
    yield "in place", lambda: fn(q, k, v, ints(1, 1, 2880), ints(1, 1))
    yield "a chunk", lambda: fn(q, k, v, ints(1, 1, 2880), ints(1, 1), kv_compacted=True, q_start=ints(1))
    for page, layout in PAGES:
        q, *_ = qkv(dtype, D, M=1024)
        k, v = pools(dtype, D, page, layout)
        arguments = q, k, v, ints(1, 1, 2880), ints(1, 1)
        paged = {"seqused_k": ints(1), "block_table": ints(1, 2880 // page), "layout": layout}
        yield f"pages of {page}", lambda x=arguments, paged=paged: fn(*x, **paged)
        yield f"compacted pages of {page}", lambda x=arguments, paged=paged: fn(*x, kv_compacted=True, **paged)
    q, k, v = packed(dtype, D)
    sets = ints(1, 32768), ints(8, 1)
    yield "packed", lambda: fn(q, k, v, *sets, kv_compacted=True, cu_seqlens=ints(9), max_seqlen=4096)
    yield "packed, in place", lambda: fn(q, k, v, *sets, cu_seqlens=ints(9), max_seqlen=4096)


def decode_attention(fn, dtype, D):
    for B in (1, 8):
        q, k, v = qkv(dtype, D, M=1, N=32768, B=B)
        yield f"batch {B}", lambda x=(q, k, v), B=B: fn(*x, ints(B), return_lse=B > 1)
    q, k, v = qkv(dtype, D, M=16, N=2880, Hq=8, Hkv=8)
    yield "16 rows", lambda x=(q, k, v): fn(*x, ints(1))
    for page, layout in PAGES:
        q, *_ = qkv(dtype, D, M=1, B=8)
        k, v = pools(dtype, D, page, layout)
        yield (
            f"pages of {page}",
            lambda x=(q, k, v), n=2880 // page, layout=layout: fn(*x, ints(8), block_table=ints(8, n), layout=layout),
        )


def probe_rows(fn, dtype, D):
    yield "", lambda: fn(2880, device="meta")
    yield "packed", lambda: fn(4096, device="meta", cu_seqlens=ints(9))


CALLS = (score_tokens, select_tokens, compact_kv_, compact_paged_kv_, sparse_attention, decode_attention, probe_rows)


def shapes(operator, target, everything):
    """The dtypes and head dims to compile for: all, or a few, or on a target other than sm_90 the most common alone."""
    if operator in ("select_tokens", "probe_rows"):
        return [(torch.bfloat16, 128)]
    if everything:
        return [(dtype, D) for dtype in (torch.bfloat16, torch.float32) for D in HEAD_DIMS]
    if target != "sm_90":
        return [(torch.bfloat16, 128)]
    return [*((torch.bfloat16, D) for D in (64, 128, 256)), (torch.float32, 128)]


def compiled(operators, target, everything):
    """Yields a name and the compiled kernel of every launch."""
    gpu, kilobytes = TARGETS[target]
    launched = []
    run = JITFunction.run

    def warmup(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(Driver(gpu))
    with mock.patch.object(JITFunction, "run", warmup):
        for calls in operators:
            stem = calls.__name__.removesuffix("_")
            try:
                module = importlib.import_module(f"zipvl_kernels._triton.{stem}")
            except ModuleNotFoundError as error:
                if error.name != f"zipvl_kernels._triton.{stem}":
                    raise
                continue
            if hasattr(module, "shared_kilobytes"):
                module.shared_kilobytes = lambda device: kilobytes
            for dtype, D in shapes(calls.__name__, target, everything):
                for n, (what, call) in enumerate(calls(getattr(module, calls.__name__), dtype, D)):
                    if n and target != "sm_90" and not everything:
                        break
                    launched.clear()
                    call()
                    assert launched, f"{stem} {what}: launched nothing"
                    kind = str(dtype).removeprefix("torch.")
                    for i, (kernel, binary) in enumerate(launched):
                        name = f"{stem} {kernel}{i if i else ''}"
                        yield " ".join(filter(None, (target, name, f"{kind} {D}", what))), binary


def resources(binary):
    """Registers a thread, bytes of stack a thread (spilled registers are there), bytes of shared memory a block."""
    found = {"shared": binary.metadata.shared}
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [BINARIES / "cuobjdump", "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= {
            name: int(re.search(rf"{key}:(\d+)", said)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))
        }
    return found


def main(arguments):
    targets = [x for x in arguments if not x.startswith("--")] or list(TARGETS)
    kernels = {}
    for target in targets:
        for name, binary in compiled(CALLS, target, "--all" in arguments):
            kernels[name] = resources(binary)
    if "--record" not in arguments:
        print(json.dumps({"triton": triton.__version__, "kernels": kernels}))
        return
    record = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {"kernels": {}}
    kept = {} if record.get("triton") != triton.__version__ else record["kernels"]
    kept = {name: found for name, found in kept.items() if name.split()[0] not in targets} | kernels
    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(kept.items())]
    text = f'{{"triton": "{triton.__version__}", "kernels": {{\n{("," + chr(10)).join(lines)}\n}}}}\n'
    BOUNDS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
