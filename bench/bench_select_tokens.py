"""`select_tokens` against sort, cumsum and top-k in floating point.

Run: pytest bench/bench_select_tokens.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.problems import RECIPE

OPERATOR = "select_tokens"


@shapes(OPERATOR)
def test_select_tokens(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_sort_and_topk(benchmark, geometry, N, place):
    baseline(benchmark, RECIPE, OPERATOR, geometry, N, place)
