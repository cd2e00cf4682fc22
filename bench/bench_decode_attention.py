"""`decode_attention` over the kept tokens against SDPA over all of them. Run: pytest bench/bench_decode_attention.py"""

import torch
import torch.nn.functional as F
from common import DEVICE, DTYPE, KEEP_RATIO, geometries, timed
from torch import Tensor
from zipvl_reference.testing.budget import assert_within, atom

import zipvl_kernels as zk


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query row over everything, by matrix products in the dtype of `q`."""
    K, V = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ K.mT * q.shape[-1] ** -0.5).softmax(-1) @ V


@geometries
def test_decode_attention(benchmark, geometry):
    q, k, v = geometry.qkv(rows=1)
    used = round(KEEP_RATIO * geometry.N)
    seqused_k = torch.tensor([used], dtype=torch.int32, device=DEVICE)
    some = k[:, :, :used], v[:, :, :used]
    exact, plain = by_torch(*(x.double() for x in (q, *some))), by_torch(q, *some)
    allowed = atom(q, k, geometry.D**-0.5, v.abs().max().item(), DTYPE)
    assert_within("out", zk.decode_attention(q, k, v, seqused_k), exact, plain, allowed)
    timed(benchmark, zk.decode_attention, q, k, v, seqused_k)


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    q, k, v = geometry.qkv(rows=1)
    timed(benchmark, F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
