"""The Hopper attention kernel: against float64 first, then its speed and that of its variants beside cuDNN's.

Run on a GPU of compute capability 9.0 with CuPy: PYTHONPATH=.:reference python bench/hopper_attention.py [check|time]
A kernel that hangs never returns: give it a time limit.
"""

import sys
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from zipvl_reference.testing.budget import assert_within, atom

from zipvl_kernels._cuda import sparse_attention as hopper
from zipvl_kernels._triton import sparse_attention as portable

VARIANTS = {
    "table": {},
    "no turns": {"take_turns": False},
    "240/24 registers": {"consumer_registers": 240, "producer_registers": 24},
    "sections of 12 MB": {"section_bytes": 12 << 20},
    "sections of 40 MB": {"section_bytes": 40 << 20},
    "one section": {"section_bytes": (1 << 31) - 1},
}
SETS = 3  # of inputs, used in turn


def random_set(N: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`indices [B, 1, N]` and `counts [B, 1]` of random members."""
    indices = torch.full((len(counts), 1, N), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        indices[b, 0, :count] = torch.randperm(N)[:count].sort().values
    return indices.cuda(), torch.tensor(counts, dtype=torch.int32)[:, None].cuda()


def qkv(B: int, Hq: int, Hkv: int, M: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As a model hands them over: views of `[B, N, H, D]`."""
    q = torch.randn(B, M, Hq, D, device="cuda", dtype=dtype).transpose(1, 2)
    return q, *(torch.randn(B, N, Hkv, D, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))


def exact(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: list[int], start: int, dtype: torch.dtype
) -> Tensor:
    """By matrix products in `dtype`, a sequence at a time."""
    out = torch.zeros(q.shape, dtype=dtype, device="cuda")
    group = q.shape[1] // k.shape[1]
    for b, count in enumerate(counts):
        if not count:
            continue
        row = indices[b, 0, :count].long() - start
        here = (row >= 0) & (row < q.shape[2])
        Q, K, V = q[b][:, row[here]].to(dtype), k[b, :, :count].to(dtype), v[b, :, :count].to(dtype)
        K, V = K.repeat_interleave(group, 0), V.repeat_interleave(group, 0)
        later = torch.ones(count, count, dtype=torch.bool, device="cuda").triu(1)[here]
        scores = (Q @ K.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        out[b, :, row[here]] = scores.softmax(-1) @ V
    return out


def check() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for D in (128, 64):
            for heads, counts, N, M in [
                ((1, 1), [1], 200, 200),
                ((2, 2), [64], 200, 200),
                ((2, 1), [100], 300, 300),
                ((2, 2), [128], 300, 300),
                ((2, 2), [129, 0, 640, 1], 700, 700),
                ((4, 1), [1057], 2880, 2880),
                ((7, 1), [1057, 300, 77], 2880, 2880),
                ((28, 4), [4096, 1000], 6000, 6000),
                ((8, 8), [2048], 6000, 6000),
                ((8, 2), [2000, 900], 6000, 1500),  # a chunk of queries
            ]:
                torch.manual_seed(0)
                q, k, v = qkv(len(counts), *heads, M, N, D, dtype)
                indices, device_counts = random_set(N, counts)
                for b, count in enumerate(counts):
                    k[b, :, count:] = v[b, :, count:] = torch.nan
                clean_v = v.nan_to_num()
                wanted, plain = (exact(q, k, clean_v, indices, counts, N - M, t) for t in (torch.float64, dtype))
                allowed = atom(q, k.nan_to_num(), D**-0.5, clean_v.abs().max().item(), dtype)
                junk = torch.full_like(q, torch.nan)  # so that `empty` returns NaN
                del junk
                out = hopper.launch(q, k, v, indices, device_counts, None, None)
                torch.cuda.synchronize()
                assert_within(f"{heads} {counts}", out, wanted, plain, allowed)
                assert not out[wanted == 0].any(), "rows outside the set"
                for _ in range(5):
                    assert torch.equal(out, hopper.launch(q, k, v, indices, device_counts, None, None)), "reruns differ"
                error = (out.double() - wanted).abs().max().item()
                print(f"ok {dtype} D={D} heads={heads} kept={counts} M={M}: error {error:.2e}", flush=True)


def milliseconds(call: Callable[[int], object]) -> float:
    """Of one call, in a replayed graph of `4 * SETS`; `call(i)` uses input set `i`."""
    for i in range(SETS):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(4 * SETS):
            call(i % SETS)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (4 * SETS))
    return median(times[2:])


def time() -> None:
    D, dtype = 128, torch.bfloat16
    print(torch.cuda.get_device_name())
    for Hq, Hkv in ((40, 40), (28, 4), (32, 8)):
        for N, kept in ((2880, 1057), (8192, 3006), (32768, 12026)):
            inputs = [(*qkv(1, Hq, Hkv, N, N, D, dtype), *random_set(N, [kept])) for _ in range(SETS)]
            flops = 2 * D * Hq * kept * (kept + 1)
            dense = [tuple(x[:, :, :kept].contiguous() for x in one[:3]) for one in inputs]

            def cudnn(i: int, dense: list[tuple[Tensor, ...]] = dense) -> Tensor:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return F.scaled_dot_product_attention(*dense[i], is_causal=True, enable_gqa=True)

            rows = {"cuDNN, dense of as many": milliseconds(cudnn)}
            for name, options in VARIANTS.items():
                rows[name] = milliseconds(
                    lambda i, options=options, inputs=inputs: hopper.launch(*inputs[i], None, None, **options)
                )
            for tiles in ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)):
                rows[f"Triton {tiles}"] = milliseconds(
                    lambda i, tiles=tiles, inputs=inputs: portable.launch(*inputs[i], None, None, True, *tiles)
                )
            for name, ms in rows.items():
                print(f"{Hq}/{Hkv} kept {kept:6} {name:28} {ms:8.4f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ["check", "time"]:
        {"check": check, "time": time}[part]()
