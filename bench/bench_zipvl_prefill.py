"""`zipvl_prefill_` against dense attention over all tokens, and against the recipe in torch's operators.

Run: pytest bench/bench_zipvl_prefill.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.problems import CUDNN, RECIPE

OPERATOR = "zipvl_prefill_"


@shapes(OPERATOR)
def test_zipvl_prefill(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_dense_attention(benchmark, geometry, N, place):
    baseline(benchmark, CUDNN, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_recipe(benchmark, geometry, N, place):
    baseline(benchmark, RECIPE, OPERATOR, geometry, N, place)
