"""`decode_attention` against cuDNN, for one sequence and for eight; over pages also against itself over one buffer.

Run: pytest bench/bench_decode_attention.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import CUDNN

OPERATOR = "decode_attention"


@shapes(OPERATOR)
def test_decode_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_dense_attention(benchmark, geometry, N, place):
    baseline(benchmark, CUDNN, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_paged_decode_attention(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place, PAGED_PROBLEMS)


@shapes(OPERATOR)
def test_paged_baseline_one_buffer(benchmark, geometry, N, place):
    baseline(benchmark, ONE_BUFFER, OPERATOR, geometry, N, place, PAGED_PROBLEMS)
