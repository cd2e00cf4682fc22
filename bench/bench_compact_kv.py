"""`compact_kv_` against gathering into new memory. Run: pytest bench/bench_compact_kv.py"""

import torch
from common import dense, geometries, random_set, timed

import zipvl_kernels as zk


@geometries
def test_compact_kv(benchmark, geometry):
    _, k, v = geometry.qkv()
    indices, counts = random_set(geometry.N)
    kept = indices[indices >= 0].long()
    wanted = k[:, :, kept], v[:, :, kept]
    zk.compact_kv_(k, v, indices, counts)
    assert torch.equal(k[:, :, : len(kept)], wanted[0])
    assert torch.equal(v[:, :, : len(kept)], wanted[1])
    timed(benchmark, zk.compact_kv_, k, v, indices, counts)  # moves as many rows again, whatever they hold


@geometries
def test_baseline_gather(benchmark, geometry):
    _, k, v = geometry.qkv()
    indices, _ = random_set(geometry.N)
    kept = indices[indices >= 0].long()
    timed(benchmark, lambda: (k.index_select(2, kept), v.index_select(2, kept)))


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    timed(benchmark, dense, *geometry.qkv())
