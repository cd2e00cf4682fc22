"""`decode_attention` against cuDNN, for one sequence and for eight.

Run: pytest bench/bench_decode_attention.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.problems import CUDNN

OPERATOR = "decode_attention"


@shapes(OPERATOR)
def test_decode_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_dense_attention(benchmark, geometry, N, place):
    baseline(benchmark, CUDNN, OPERATOR, geometry, N, place)
