"""Time of each kernel in one `zipvl_prefill_`: `python bench/prefill_kernels.py`. Needs a GPU.

Eager calls under torch's profiler, inputs warm in L2, so the kernels' sum is not the time of a replayed graph. On
Hopper a kernel starts under the one before it, and its time then includes how long it waits for that one's end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from zipvl_adapters.cli.env import commit, versions

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
    parser.add_argument("--out", type=Path, default=Path("out/prefill_kernels.json"))
    args = parser.parse_args()
    rows = []
    for Hq, Hkv in ((28, 4), (40, 40)):
        for N in args.lengths:
            rows.append({"heads": f"{Hq}/{Hkv}", "N": N, "microseconds": kernel_microseconds(Hq, Hkv, N)})
            print(rows[-1], flush=True)
    record = {
        "command": "python bench/prefill_kernels.py",
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
