"""Time of each kernel in one `zipvl_prefill_`: `python bench/prefill_kernels.py`. Needs a GPU.

Eager calls under torch's profiler, inputs warm in L2, so the kernels' sum is not the time of a replayed graph. On
Hopper a kernel starts under the one before it, and its time then includes how long it waits for that one's end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from records import default_path, origin, write
from torch.profiler import ProfilerActivity, profile

import zipvl_kernels as zk

CALLS = 15
D = 128


def kernel_microseconds(Hq: int, Hkv: int, N: int) -> dict[str, float]:
    """Mean time of every kernel on the device, longest first."""
    q, k, v = (
        torch.randn(1, N, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (Hq, Hkv, Hkv)
    )
    for _ in range(3):  # compiles
        zk.zipvl_prefill_(q, k, v, keep_ratio=0.367)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            zk.zipvl_prefill_(q, k, v, keep_ratio=0.367)
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / CALLS for event in seen.key_averages()}
    return {name: round(time, 1) for name, time in sorted(times.items(), key=lambda item: -item[1]) if time >= 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2880, 8192, 32768])
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/prefill_kernels.json")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    record = {**origin("prefill_kernels"), "rows": rows}
    for Hq, Hkv in ((28, 4), (40, 40)):
        for N in args.lengths:
            rows.append({"heads": f"{Hq}/{Hkv}", "N": N, "microseconds": kernel_microseconds(Hq, Hkv, N)})
            print(rows[-1], flush=True)
            write(args.out or default_path("prefill_kernels"), record)


if __name__ == "__main__":
    main()
