"""`zipvl_prefill_` against dense attention over all tokens. Run: pytest bench/bench_zipvl_prefill.py"""

import torch
from common import DEVICE, DTYPE, KEEP_RATIO, dense, geometries, timed
from zipvl_reference.testing import check_zipvl_prefill

import zipvl_kernels as zk


@geometries
def test_zipvl_prefill(benchmark, geometry):
    check_zipvl_prefill(
        zk.zipvl_prefill_, device=DEVICE, dtype=DTYPE, max_examples=10, derandomize=True, head_dims=(geometry.D,)
    )
    q, k, v = geometry.qkv()
    rows = zk.probe_rows(geometry.N, device=DEVICE)
    wanted = zk.select_tokens(*zk.score_tokens(q, k, rows), keep_ratio=KEEP_RATIO)
    _, indices, counts = zk.zipvl_prefill_(q, k, v, keep_ratio=KEEP_RATIO)
    assert torch.equal(indices, wanted[0])
    assert torch.equal(counts, wanted[1])
    timed(benchmark, zk.zipvl_prefill_, q, k, v, keep_ratio=KEEP_RATIO)


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    timed(benchmark, dense, *geometry.qkv())
