"""`sparse_attention` against dense attention over as many tokens.

Run: pytest bench/bench_sparse_attention.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.problems import CUDNN

OPERATOR = "sparse_attention"


@shapes(OPERATOR)
def test_sparse_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_dense_attention(benchmark, geometry, N, place):
    baseline(benchmark, CUDNN, OPERATOR, geometry, N, place)
