"""`zipvl bench` and `zipvl tune` as far as a CPU goes: bad input, checks before timing, what is made of rows."""

import json
import sys

import pytest
import torch
from rich.console import Console
from test_cli import refused
from typer.testing import CliRunner
from zipvl_adapters.cli import app, paged_problems, problems, speeds, tune
from zipvl_adapters.cli.bench import check_against
from zipvl_adapters.cli.tables import print_table

import zipvl_kernels as zk

TINY = problems.Geometry("tiny", 4, 2, (96,), 16)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
@pytest.mark.parametrize("command", ["bench", "tune"])
def test_needs_a_gpu(command):
    assert f"zipvl {command} needs a GPU" in refused(command)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--op", "sort"], "--op sort: expected one of zipvl_prefill_, "),
        (["tune", "--op", "sort"], "--op sort: expected one of score_tokens, "),
        (["bench", "--geometry", "12/5"], "--geometry 12/5: expected one of LLaVA-NeXT-13B (40/40), "),
        (["bench", "--lengths", "long"], "--lengths long: expected whole numbers with commas between"),
        (["bench", "--lengths", "2880,0"], "--lengths 0: expected a whole number of at least 1"),
        (["bench", "--against", "math"], "expected package.module:function"),
        (
            ["bench", "--against", "no_such_module:fn", "--op", "score_tokens"],
            "cannot be imported, ModuleNotFoundError",
        ),
        (["bench", "--against", "math:no_such", "--op", "score_tokens"], "there is no no_such in math"),
        (["bench", "--against", "math:pi", "--op", "score_tokens"], "expected a function, got float"),
        (["bench", "--against", "math:sqrt"], "say which operator it is with one --op"),
        (["bench", "--read", "no/such.json"], "--read no/such.json: "),
    ],
)
def test_bad_input(arguments, said):
    assert said in refused(*arguments)


def test_against_takes_the_operator_from_the_name_of_the_function(tmp_path, monkeypatch):
    (tmp_path / "their_kernels.py").write_text("def score_tokens(q, k, rows): ...\n")
    monkeypatch.chdir(tmp_path)
    operator, fn = check_against("their_kernels:score_tokens", ["score_tokens", "select_tokens"])
    assert (operator, fn.__name__) == ("score_tokens", "score_tokens")
    assert check_against("their_kernels:score_tokens", ["select_tokens"])[0] == "select_tokens"
    sys.modules.pop("their_kernels")


@pytest.fixture
def on_cpu(monkeypatch):
    """Problems whose tensors are on the CPU, with two input sets."""
    monkeypatch.setattr(problems, "DEVICE", "cpu")
    for module in (problems, paged_problems):
        monkeypatch.setattr(module, "sets_of", lambda num_bytes: 2)


@pytest.mark.parametrize(
    ("table", "operator"),
    [(table, name) for table in (problems.PROBLEMS, paged_problems.PAGED_PROBLEMS) for name in table],
)
def test_checks_before_timing(table, operator, on_cpu):
    fn = getattr(zk, operator)
    for problem in table[operator](TINY, 96):
        problem.check(fn)
        for name, baseline in {"ours": problem.call(fn), **problem.baselines}.items():
            if name != problems.CUDNN:
                baseline(1)

        def off(*arguments, **options):
            result = fn(*arguments, **options)
            changed = arguments[0] if result is None else result[0] if isinstance(result, tuple) else result
            changed[(0,) * changed.dim()] += 1
            return result

        with pytest.raises(AssertionError, match=r"expected|error"):
            problem.check(off)


def rows():
    """Two providers of the prefill at two lengths and two ratios, and one of an operator that moves bytes."""
    found = []
    for N, kept, ms in ((2880, 1057, 0.07), (8192, 3007, 0.25), (8192, 820, 0.1)):
        common = {"operator": "zipvl_prefill_", "geometry": "tiny", "heads": "4/2", "input_sets": 1, "bytes": None}
        shape = {"B": 1, "N": N, "kept": kept}
        for provider, factor in (("zipvl", 1), ("cuDNN dense", 3)):
            times = {f"p{p}_ms": ms * factor for p in (20, 50, 80)}
            rate = {"flops": 10**9, "flops_per_second": 3e14, "bytes_per_second": None, "of_ceiling": 0.4}
            found.append({**common, "shape": shape, "provider": provider, **times, **rate, "x_dense": 3 / factor})
    return [*found, {**found[0], "operator": "decode_attention", "shape": {"B": 8, "N": 5}, "bytes_per_second": 3.5e12}]


def record(**changed):
    """What a run would write."""
    return {
        "settings": {"keep_ratio": 0.367, "ratio_length": 8192},
        "device": {"name": "a GPU"},
        "ceilings": {"copy_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14},
        "rows": rows(),
        "overhead": [
            {"heads": "4/2", "N": 2880, "host_us_p50": 55.0, "graph_nodes": {"kernel": 6}, "extra_bytes_per_token": 40}
        ],
        "failed": [],
        **changed,
    }


def test_a_recorded_run_becomes_table_and_plots(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(record()))
    arguments = ["bench", "--read", str(tmp_path / "bench.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "zipvl_prefill_ 4/2 at 2,880: host 55 µs a call, launches 6 kernel, extra memory 40.0" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"length.png", "kept.png"}
    for said in ("0.0700", "3.00", "300", "3.50", "5 × 8", "a GPU"):
        assert said in result.stdout


def test_something_wrong_fails_the_command(tmp_path):
    line = "score_tokens 4/2 96: theirs is not timed, AssertionError: error 1 is over the budget"
    (tmp_path / "bench.json").write_text(json.dumps(record(rows=[], failed=[line])))
    arguments = ["bench", "--read", str(tmp_path / "bench.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert line in result.stdout


@pytest.mark.parametrize("content", ["[]", "{", '{"rows": []}', "3"])
def test_a_recorded_run_that_is_none(tmp_path, content):
    (tmp_path / "bench.json").write_text(content)
    assert "expected" in refused("bench", "--read", tmp_path / "bench.json")


def test_cells_fit_their_headings():
    table = speeds.table(rows())
    assert table
    assert {len(row) for row in table} == {len(speeds.HEADINGS)}
    print_table(Console(), speeds.HEADINGS, table, title="t", caption="c", labels=4)


def test_no_speed_for_what_is_wrong(on_cpu):
    (problem,) = problems.PROBLEMS["select_tokens"](TINY, 96)

    def wrong(accumulated, normalized, **options):
        indices, counts = zk.select_tokens(accumulated, normalized, **options)
        return indices, counts + 1

    measured, failed = speeds.measure(problem, {"theirs": wrong}, {})
    assert measured == []
    assert failed == [
        "select_tokens 4/2 96: theirs is not timed, AssertionError: counts: expected those of the reference"
    ]


def test_tuned_configurations_fit_the_launchers(on_cpu, monkeypatch):
    """Every table's configurations, run by Triton's interpreter on a tiny problem."""
    pytest.importorskip("triton")
    monkeypatch.setattr(problems, "DTYPE", torch.float32)
    found = [table for table in tune.tables() if table.backend == "triton"]
    assert found
    for table in found:
        problem, *_ = problems.PROBLEMS[table.operator](TINY, 96)
        for config in (table.shipped(16), table.tried[0]):
            problem.check(table.call(config))
