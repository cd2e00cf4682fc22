"""`probe_rows` against a random permutation of all rows. Run: pytest bench/bench_probe_rows.py"""

import torch
from common import DEVICE, geometries, timed
from zipvl_reference.testing import check_probe_rows

import zipvl_kernels as zk


@geometries
def test_probe_rows(benchmark, geometry):
    check_probe_rows(zk.probe_rows, device=DEVICE, max_examples=10, derandomize=True)
    timed(benchmark, zk.probe_rows, geometry.N, device=DEVICE)


@geometries
def test_baseline_randperm(benchmark, geometry):
    def draw():
        return torch.randperm(geometry.N, device=DEVICE)[:128].sort().values

    timed(benchmark, draw)
