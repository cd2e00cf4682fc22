"""`score_tokens` against the softmax that stores all scores of the probes; over pages against itself over one buffer.

Run: pytest bench/bench_score_tokens.py
"""

from common import baseline, ours, shapes
from zipvl_adapters.cli.paged_problems import ONE_BUFFER, PAGED_PROBLEMS
from zipvl_adapters.cli.problems import RECIPE

OPERATOR = "score_tokens"


@shapes(OPERATOR)
def test_score_tokens(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_baseline_stored_scores(benchmark, geometry, N, place):
    baseline(benchmark, RECIPE, OPERATOR, geometry, N, place)


@shapes(OPERATOR)
def test_paged_score_tokens(benchmark, geometry, N, place):
    ours(benchmark, OPERATOR, geometry, N, place, PAGED_PROBLEMS)


@shapes(OPERATOR)
def test_paged_baseline_one_buffer(benchmark, geometry, N, place):
    baseline(benchmark, ONE_BUFFER, OPERATOR, geometry, N, place, PAGED_PROBLEMS)
