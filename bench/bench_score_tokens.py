"""`score_tokens` against the softmax that stores all scores of the probes. Run: pytest bench/bench_score_tokens.py"""

import torch
from common import DEVICE, dense, geometries, timed
from torch import Tensor
from zipvl_reference.testing.budget import assert_within, atom

import zipvl_kernels as zk


def stored_scores(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """The accumulated scores by way of a P x N matrix a head, in the dtype of `q`."""
    K = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q[:, :, rows.long()] @ K.mT * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2], device=q.device) > rows[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))[:, None]


@geometries
def test_score_tokens(benchmark, geometry):
    q, k, _ = geometry.qkv()
    rows = zk.probe_rows(geometry.N, device=DEVICE)
    got, normalized = zk.score_tokens(q, k, rows)
    exact, plain = stored_scores(q.double(), k.double(), rows), stored_scores(q, k, rows)
    allowed = atom(q, k, geometry.D**-0.5, exact.max().item(), torch.float32)
    assert_within("accumulated", got, exact, plain, allowed)
    seen = geometry.Hq * (rows[:, None] >= torch.arange(geometry.N, device=DEVICE)).sum(0)
    assert_within("normalized", normalized, exact / seen, plain / seen, allowed)
    timed(benchmark, zk.score_tokens, q, k, rows)


@geometries
def test_baseline_stored_scores(benchmark, geometry):
    q, k, _ = geometry.qkv()
    timed(benchmark, stored_scores, q, k, zk.probe_rows(geometry.N, device=DEVICE))


@geometries
def test_baseline_dense_attention(benchmark, geometry):
    timed(benchmark, dense, *geometry.qkv())
