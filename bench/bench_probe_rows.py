"""`probe_rows` against a random permutation of all rows. Run: pytest bench/bench_probe_rows.py"""

import pytest
import torch
from common import DEVICE
from zipvl_reference.testing import check_probe_rows

import zipvl_kernels as zk

lengths = pytest.mark.parametrize("N", [2880, 8192, 131072])


def timed(benchmark, draw):
    def finished():
        draw()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=12, warmup_rounds=2)


@lengths
def test_probe_rows(benchmark, N):
    check_probe_rows(zk.probe_rows, device=DEVICE, max_examples=10, derandomize=True)
    timed(benchmark, lambda: zk.probe_rows(N, device=DEVICE))


@lengths
def test_baseline_randperm(benchmark, N):
    timed(benchmark, lambda: torch.randperm(N, device=DEVICE)[:128].sort().values)
