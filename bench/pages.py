"""Operators over pages of 16 rows against one buffer, by replayed CUDA graphs: `python bench/pages.py`. Needs a GPU.

The problems of `bench/bench_*.py` over pages, each checked on its inputs before it is timed, in turn with the same
operator over one buffer, where "auto" may take another kernel than over pages: this is what pages cost a user.
Writes bench/results/GPU/pages.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from records import default_path, origin, write
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGE, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import GEOMETRIES
from zipvl_adapters.cli.speeds import Row, measure
from zipvl_adapters.cli.timing import ceilings

import zipvl_kernels as zk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=PAGED_PROBLEMS, action="append", help="repeat for more (all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2880, 32768, 131072])
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/pages.json")
    args = parser.parse_args()
    found, out = ceilings(), args.out or default_path("pages")
    rows: list[Row] = []
    wrong: list[str] = []
    record = {**origin("pages"), "block_size": PAGE, "ceilings": found, "rows": rows, "failed": wrong}
    for operator in args.op or PAGED_PROBLEMS:
        for geometry in GEOMETRIES:
            for N in sorted(set(args.lengths) & set(geometry.lengths)):
                for problem in PAGED_PROBLEMS[operator](geometry, N):
                    measured, failed = measure(problem, {"pages": getattr(zk, operator)}, found)
                    rows += measured
                    wrong += failed
                    write(out, record)
                    ms = {row["provider"]: row["p50_ms"] for row in measured}
                    if {"pages", ONE_BUFFER} <= set(ms):
                        where = f"{operator:18} {geometry.heads:>6} {N:7} x {problem.shape['B']}"
                        where += " compacted" * problem.shape.get("kv_compacted", False)
                        times = f"pages {ms['pages']:8.4f} ms  {ONE_BUFFER} {ms[ONE_BUFFER]:8.4f} ms"
                        print(f"{where}  {times}  {ms['pages'] / ms[ONE_BUFFER]:.2f} x", flush=True)
                    del problem
                torch.cuda.empty_cache()
    print(*wrong, f"file: {out}", sep="\n")


if __name__ == "__main__":
    main()
