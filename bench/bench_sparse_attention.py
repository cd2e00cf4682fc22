"""`sparse_attention` against dense attention over as many tokens; over pages against itself over one buffer.

Run: pytest bench/bench_sparse_attention.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import CUDNN

OPERATOR = "sparse_attention"


@shapes(OPERATOR)
def test_sparse_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_dense_attention(benchmark, geometry, N, place):
    baseline(benchmark, CUDNN, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_paged_sparse_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place, PAGED_PROBLEMS)


@shapes(OPERATOR)
def test_paged_baseline_one_buffer(benchmark, geometry, N, place):
    baseline(benchmark, ONE_BUFFER, OPERATOR, geometry, N, place, PAGED_PROBLEMS)
