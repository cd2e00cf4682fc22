"""`sparse_attention` against dense attention over all tokens. Run: pytest bench/bench_sparse_attention.py"""

import pytest
import torch
from common import DTYPE, dense, geometries, random_set, timed
from torch import Tensor
from zipvl_reference.testing.budget import assert_within, atom

import zipvl_kernels as zk


def by_torch(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Gather, dense attention by matrix products in the dtype of `q`, scatter."""
    group = q.shape[1] // k.shape[1]
    Q, K, V = (x[:, :, kept] for x in (q, k, v))
    K, V = K.repeat_interleave(group, 1), V.repeat_interleave(group, 1)
    later = torch.ones(len(kept), len(kept), dtype=torch.bool, device=q.device).triu(1)
    weights = (Q @ K.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
    return torch.zeros_like(q).index_copy(2, kept, weights @ V)


@geometries
@pytest.mark.parametrize("kv_compacted", [False, True], ids=["in-place", "compacted"])
def test_sparse_attention(benchmark, geometry, kv_compacted):
    q, k, v = geometry.qkv()
    indices, counts = random_set(geometry.N)
    kept = indices[indices >= 0].long()
    exact, plain = by_torch(q.double(), k.double(), v.double(), kept), by_torch(q, k, v, kept)
    allowed = atom(q, k, geometry.D**-0.5, v.abs().max().item(), DTYPE)
    if kv_compacted:
        zk.compact_kv_(k, v, indices, counts)
    out = zk.sparse_attention(q, k, v, indices, counts, kv_compacted=kv_compacted)
    assert_within("out", out, exact, plain, allowed)
    timed(benchmark, zk.sparse_attention, q, k, v, indices, counts, kv_compacted=kv_compacted)


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    timed(benchmark, dense, *geometry.qkv())
