"""`compact_paged_kv_` against gathering into new memory, and against `compact_kv_` over one buffer.

Run: pytest bench/bench_compact_paged_kv.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import RECIPE

OPERATOR = "compact_paged_kv_"


@shapes(OPERATOR)
def test_compact_paged_kv(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place, PAGED_PROBLEMS)


@shapes(OPERATOR)
def test_baseline_gather(benchmark, geometry, N, place):
    baseline(benchmark, RECIPE, OPERATOR, geometry, N, place, PAGED_PROBLEMS)


@shapes(OPERATOR)
def test_baseline_one_buffer(benchmark, geometry, N, place):
    baseline(benchmark, ONE_BUFFER, OPERATOR, geometry, N, place, PAGED_PROBLEMS)
