"""The benchmarks of whole models, on a tiny one: what they search, compare and record."""

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source checkout")


@pytest.fixture
def bench(monkeypatch):
    """Makes the scripts importable."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def run(bench, monkeypatch, tmp_path):
    """Runs a script's `main` with these arguments; the exit code, and the rows by what names them."""

    def run(script, *arguments, key):
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--out", str(out)])
        code = script.main()
        return code, {tuple(row[name] for name in key): row for row in json.loads(out.read_text())["rows"]}

    return run


@pytest.mark.parametrize("most", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("guess", [0, 1, 6, 7, 8, 30, 100])
def test_the_largest_batch_is_found_from_any_guess(bench, guess, most):
    from whole_models import largest_batch

    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    assert largest_batch(fits, guess, seconds=60) == (most, most + 1)
    assert len(set(tried)) == len(tried)
    assert min(tried) >= 1
    if guess == most > 0:
        assert tried == [most, most + 1]


def test_the_search_ends_where_the_time_does(bench):
    from whole_models import largest_batch

    tried = []
    assert largest_batch(lambda b: not tried.append(b), 5, seconds=20, cost=lambda b: 3.0 * b) == (6, None)
    assert tried == [5, 6]
    assert largest_batch(lambda b: True, 8, seconds=20, cost=lambda b: 3.0 * b) == (0, None)


class Memory:
    """Stands for tensors that an error's traceback holds on to."""


@pytest.mark.parametrize(("most", "tried"), [(0, [1]), (1, [1, 2]), (2, [1, 2, 3]), (9, [1, 2, 8, 9, 11, 10])])
def test_the_search_of_a_prefill_foretells_the_batch(bench, most, tried):
    """Weights of 100 bytes and 10 a sequence; memory that a failed try held is free before the next."""
    from model_prefill import search

    batches, held = [], []

    def prefill(batch):
        assert all(memory() is None for memory in held)
        batches.append(batch)
        memory = Memory()
        held.append(weakref.ref(memory))
        if batch > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.01 * batch, 100 + 10 * batch

    found = search(prefill, 100 + 10 * most + 5, seconds=60)
    assert (found["largest_batch"], found["least_too_large"]) == (most, most + 1)
    assert batches == tried
    assert found.get("peak_bytes") == (100 + 10 * most if most else None)


def test_other_errors_are_not_taken_for_a_lack_of_memory(bench):
    from model_prefill import search

    def prefill(batch):
        if batch > most:
            raise ValueError("something else")
        return 0.01, 100 + 10 * batch

    most = 0
    with pytest.raises(ValueError, match="something else"):
        search(prefill, 1000, seconds=60)
    most = 5
    found = search(prefill, 1000, seconds=60)
    assert (found["largest_batch"], found["least_too_large"]) == (5, 6)
    assert found["other_error"] == "batch 6: ValueError: something else"


def test_prefill_rows(run):
    import model_prefill

    code, rows = run(model_prefill, key=("attention", "batch"))
    assert code == 0
    assert len(rows) == 4
    ours = rows["zipvl", "1"]
    assert ours["kept_ratio"] == pytest.approx(24 / 64)
    assert ours["x_cuDNN"] == rows["cuDNN", "1"]["seconds_p50"] / ours["seconds_p50"]
    code, rows = run(
        model_prefill, "--batch", "max", "--seconds", "0", "--attention", "zipvl", key=("attention", "batch")
    )
    assert code == 0
    assert len(rows) == 5  # those of before are still there
    assert rows["zipvl", "max"]["largest_batch"] == 2


def test_decode_rows(run):
    """Compiled, but by a backend that takes no time."""
    import compiled_decode

    some = (
        "--no-check",
        "--backend",
        "aot_eager",
        "--cache",
        "static",
        "--cache",
        "zipvl",
        "--batch",
        "2",
        "--context",
        "64",
    )
    code, rows = run(compiled_decode, *some, key=("cache", "batch"))
    assert code == 0
    ours, dense = rows["zipvl", 2], rows["static", 2]
    assert (ours["kept"], dense["kept"]) == (24, 64)
    assert (ours["capacity"], dense["capacity"]) == (512, 64 + 256)
    assert ours["graphs"] == dense["graphs"] == 1
    held = 2 * 2 * 2 * 16 * 2  # of a token: keys and values, layers, heads, head dim, bytes
    assert dense["bytes"] - ours["bytes"] == 2 * held * 40
    assert ours["x_static"] == ours["tokens_per_second"] / dense["tokens_per_second"]


@pytest.mark.parametrize("fuse", [False, True])
def test_a_wrong_compiled_step_is_not_timed(bench, monkeypatch, fuse):
    import compiled_decode
    from filled_caches import Case

    how = type("How", (), {"backend": "eager", "mode": None, "tune": False, "fuse": fuse})
    with torch.no_grad():
        compiled_decode.check(Case("tiny", "zipvl", 1, 64), how)

        def forgetful(model, how):
            def call(past_key_values, **inputs):
                for layer in past_key_values.layers:
                    layer.lens.fill_(1)  # all but the first token is forgotten
                return model(past_key_values=past_key_values, **inputs)

            return call

        monkeypatch.setattr(compiled_decode, "compiled", forgetful)
        with pytest.raises(AssertionError, match="a compiled step is wrong"):
            compiled_decode.check(Case("tiny", "zipvl", 1, 64), how)


def test_batches_of_a_cache_that_fit(bench, monkeypatch):
    import filled_caches
    from compiled_decode import eager_step
    from whole_models import build

    model = build("tiny")
    case = filled_caches.Case("tiny", "zipvl", 0, 64)
    weights, sequence = filled_caches.held_bytes(model, case)
    monkeypatch.setattr(filled_caches, "available_bytes", lambda: (weights + 5.5 * sequence) / filled_caches.MARGIN)
    with torch.no_grad():
        assert filled_caches.largest(model, case, lambda batch, cache: eager_step(model, batch, cache), 60) == 5
