"""Host time of an eager call of every operator: `python bench/host_time.py`. Needs a GPU.

How long Python, torch, Triton and CuPy take until a call has put its work into the GPU's queue. The queue is emptied
every few calls, outside the measured time, so that no call waits for a place in it. Two calls of torch's own stand
beside: what one tensor costs, and one tensor with one launch. `--profile` prints which functions the time goes to.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import torch
from records import default_path, origin, write
from zipvl_adapters.cli.env import device_name

import zipvl_kernels as zk

Hq, Hkv, N, D, LAYERS = 28, 4, 2880, 128, 40
ROUNDS, CALLS = 100, 20  # the queue is emptied after each round of calls
Calls = dict[str, Callable[[], object]]


def calls() -> Calls:
    """Every operator on the tensors that it would get in a prefill, and torch's own for comparison."""
    q, k, v = (
        torch.randn(1, N, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (Hq, Hkv, Hkv)
    )
    rows = zk.probe_rows(N, device=q.device)
    scores = zk.score_tokens(q, k, rows)
    indices, counts = zk.select_tokens(*scores, tau=0.975)
    used = torch.full((1,), N, dtype=torch.int32, device="cuda")
    pools = torch.randn(2, N // 16, 16, Hkv, D, device="cuda", dtype=torch.bfloat16).unbind()
    table = torch.randperm(N // 16, device="cuda").int()[None]
    lists = [[x.clone() for _ in range(LAYERS)] for x in (k, v, indices, counts)]
    many = [[x.clone() for _ in range(LAYERS)] for x in (*pools, indices, counts)]
    rows_of_all = [x[0].transpose(0, 1) for x in (q, k, v)]
    bounds = torch.tensor([0, N // 3, N], dtype=torch.int32, device="cuda")
    packed = {"keep_ratio": 0.367, "cu_seqlens": bounds, "max_seqlen": N}
    # In place, again and again: what is compacted holds other tokens each time, which changes nothing on the host.
    return {
        "zipvl_prefill_": lambda: zk.zipvl_prefill_(q, k, v, keep_ratio=0.367),
        "zipvl_prefill_ of packed sequences": lambda: zk.zipvl_prefill_(*rows_of_all, **packed),
        "probe_rows": lambda: zk.probe_rows(N, device=q.device),
        "score_tokens": lambda: zk.score_tokens(q, k, rows),
        "select_tokens": lambda: zk.select_tokens(*scores, tau=0.975),
        "compact_kv_": lambda: zk.compact_kv_(k, v, indices, counts),
        "sparse_attention": lambda: zk.sparse_attention(q, k, v, indices, counts, kv_compacted=True),
        "decode_attention": lambda: zk.decode_attention(q[:, :, -1:], k, v, used),
        "compact_kv_, 40 layers": lambda: zk.compact_kv_(*lists),
        "compact_paged_kv_, 40 layers": lambda: zk.compact_paged_kv_(*many, table, used),
        "compact_paged_kv_": lambda: zk.compact_paged_kv_(*pools, indices, counts, table, used),
        "decode_attention over pages": lambda: zk.decode_attention(q[:, :, -1:], *pools, used, block_table=table),
        "torch.empty": lambda: torch.empty(1, 1, N, dtype=torch.int32, device="cuda"),
        "torch.zeros": lambda: torch.zeros(1, 1, N, dtype=torch.int32, device="cuda"),
    }


def microseconds(call: Callable[[], object]) -> dict[str, float]:
    """The median and the 20th and 80th percentile over single calls."""
    samples = []
    for _ in range(ROUNDS + 5):
        torch.cuda.synchronize()
        for _ in range(CALLS):
            begin = perf_counter()
            call()
            samples.append(1e6 * (perf_counter() - begin))
    torch.cuda.synchronize()
    tenths = quantiles(samples[5 * CALLS :], n=10, method="inclusive")  # the first rounds compile and warm up
    return {name: round(tenths[i], 1) for name, i in (("p20", 1), ("p50", 4), ("p80", 7))}


def print_profile(call: Callable[[], object], lines: int) -> None:
    """Where the time of a call goes; the profiler itself makes short functions look longer than they are."""
    profile = cProfile.Profile()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        profile.enable()
        for _ in range(CALLS):
            call()
        profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest, by operator")
    parser.add_argument("--only", nargs="+", help="these operators")
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/host_time.json")
    args = parser.parse_args()
    times: dict[str, dict[str, float]] = {}
    record = {
        **origin("host_time"),
        "processor": device_name(torch.device("cpu")),
        "shape": {"Hq": Hq, "Hkv": Hkv, "N": N, "D": D, "dtype": "bfloat16"},
        "microseconds": times,
    }
    for operator, call in calls().items():
        if args.only and operator not in args.only:
            continue
        times[operator] = found = microseconds(call)
        print(f"{operator:28} {found['p50']:7.1f} µs  (20 % {found['p20']:.1f}, 80 % {found['p80']:.1f})", flush=True)
        if args.profile:
            print_profile(call, 25)
    if not args.only:
        write(args.out or default_path("host_time"), record)


if __name__ == "__main__":
    main()
