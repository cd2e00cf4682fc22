"""What summing scores over ranks costs a layer: `torchrun --nproc-per-node 2 bench/tensor_parallel.py`.

NCCL where every rank has a GPU of its own, gloo on the CPU elsewhere. Times, for one layer and a batch of one, the
scores over the heads of all ranks (probes, exchange, sum), the same heads scored without an exchange, and
the collective alone. The slowest rank counts. Rank 0 prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from records import default_path, origin, write
from zipvl_adapters.cli.env import device_name
from zipvl_adapters.ranks import score_tokens

import zipvl_kernels as zk

HEADS = {"LLaVA-NeXT-13B": (40, 40), "Qwen2-VL-7B": (28, 4), "InternVL2-8B": (32, 8)}
LENGTHS = {"cuda": (2880, 8192, 32768), "cpu": (768, 2880)}
D = 128


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median over `rounds` of the slowest rank; every round begins on all ranks at once."""
    samples = []
    for _ in range(rounds + 3):
        dist.barrier()
        _wait(device)
        begin = perf_counter()
        call()
        _wait(device)
        samples.append(1e3 * (perf_counter() - begin))
    slowest = torch.tensor(samples[3:], device=device)  # the first rounds connect and compile
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return median(slowest.tolist())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exchanged(kv_heads: int) -> int:
    """Rows of scores that a rank with so many KV heads sends: neighbours are added before."""
    while kv_heads % 2 == 0:
        kv_heads //= 2
    return kv_heads


def measure(hq: int, hkv: int, n: int, device: torch.device, rounds: int) -> dict[str, float | int]:
    """One layer of `hq` query and `hkv` KV heads over all ranks, `n` tokens."""
    ranks, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k = (torch.randn(1, heads // ranks, n, D, device=device, dtype=dtype) for heads in (hq, hkv))
    rows = zk.probe_rows(n, device=device)
    sent = torch.randn(1, exchanged(hkv // ranks), n, device=device)
    received = sent.new_empty(ranks, *sent.shape[1:])
    return {
        "query_heads": hq,
        "kv_heads": hkv,
        "tokens": n,
        "sent_bytes": sent.nbytes,
        "scores_over_ranks_ms": milliseconds(lambda: score_tokens(group, q, k, rows), device, rounds),
        "scores_of_a_rank_ms": milliseconds(lambda: zk.score_tokens(q, k, rows), device, rounds),
        "collective_ms": milliseconds(lambda: dist.all_gather_into_tensor(received, sent, group=group), device, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="timed repetitions of each call")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument(
        "--out", type=Path, help="default: bench/results/GPU/tensor_parallel.json, and nothing on a CPU"
    )
    args = parser.parse_args()

    local = int(os.environ["LOCAL_RANK"])
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if enough else torch.device("cpu")
    if enough:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if enough else "gloo")
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    rows: list[dict[str, object]] = []
    record = origin("tensor_parallel") | {
        "command": f"torchrun --nproc-per-node {ranks} bench/tensor_parallel.py",
        "ranks": ranks,
        "backend": dist.get_backend(),
        "device": device_name(device),
        "layers": rows,
    }
    out = args.out or (default_path("tensor_parallel") if enough else None)
    if first:
        print(f"{ranks} ranks, {dist.get_backend()}, {device_name(device)}: milliseconds of one layer's scores")
        print(f"{'heads':>8} {'tokens':>8} {'sent KiB':>9} {'over ranks':>11} {'of a rank':>10} {'collective':>11}")
    for name, (hq, hkv) in HEADS.items():
        if hkv % ranks:
            continue
        for n in args.lengths or LENGTHS[device.type]:
            row = measure(hq, hkv, n, device, args.rounds)
            rows.append({"model": name} | row)
            if first:
                print(
                    f"{f'{hq}/{hkv}':>8} {n:>8} {row['sent_bytes'] / 1024:>9.1f} {row['scores_over_ranks_ms']:>11.3f} "
                    f"{row['scores_of_a_rank_ms']:>10.3f} {row['collective_ms']:>11.3f}",
                    flush=True,
                )
                if out:
                    write(out, record)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
