"""`select_tokens` against sort, cumsum and top-k in floating point. Run: pytest bench/bench_select_tokens.py"""

import torch
from common import DEVICE, dense, geometries, timed
from torch import Tensor
from zipvl_reference.testing import check_select_tokens

import zipvl_kernels as zk


def scores_of(N: int) -> tuple[Tensor, Tensor]:
    """Scores with the long tail that attention has."""
    random = torch.Generator().manual_seed(0)
    accumulated = (torch.randn(1, 1, N, generator=random) * 2).exp()
    return accumulated.to(DEVICE), (accumulated / torch.arange(N, 0, -1)).to(DEVICE)


def sort_and_topk(accumulated: Tensor, normalized: Tensor, tau: float) -> Tensor:
    """The usual recipe; reads the count on the host."""
    sums = accumulated.sort(-1, descending=True).values.cumsum(-1)
    p = int((sums < tau * sums[..., -1:]).sum()) + 1
    return normalized.topk(p, -1).indices.sort(-1).values


@geometries
def test_select_tokens(benchmark, geometry):
    check_select_tokens(zk.select_tokens, device=DEVICE, max_examples=20, derandomize=True)
    accumulated, normalized = scores_of(geometry.N)
    indices, counts = zk.select_tokens(accumulated, normalized, tau=0.975, keep_recent=0)
    wanted = sort_and_topk(accumulated.double(), normalized, 0.975)
    assert abs(int(counts) - wanted.shape[-1]) <= 1, "the masses round down, which may move the count by one"
    assert len({*wanted.flatten().tolist()} ^ {*indices[indices >= 0].tolist()}) <= 1
    timed(benchmark, zk.select_tokens, accumulated, normalized, tau=0.975)


@geometries
def test_baseline_sort_and_topk(benchmark, geometry):
    timed(benchmark, sort_and_topk, *scores_of(geometry.N), 0.975)


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    timed(benchmark, dense, *geometry.qkv())
