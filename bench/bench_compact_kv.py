"""`compact_kv_` against gathering into new memory.

Run: pytest bench/bench_compact_kv.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.problems import RECIPE

OPERATOR = "compact_kv_"


@shapes(OPERATOR)
def test_compact_kv(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_gather(benchmark, geometry, N, place):
    baseline(benchmark, RECIPE, OPERATOR, geometry, N, place)
