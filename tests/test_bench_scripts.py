"""The benchmarks that are scripts, as far as a CPU goes: what they check before timing, and what they write."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source checkout")


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """Makes the scripts importable."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """What a script's `main` wrote."""

    def run(script):
        out = tmp_path / "folder" / "record.json"
        monkeypatch.setattr(sys, "argv", [script.__name__, "--out", str(out)])
        script.main()
        record = json.loads(out.read_text())
        assert record["command"] == f"python bench/{script.__name__}.py"
        assert {"device", "versions", "commit"} <= set(record)
        return record

    return run


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_all_layers_checks_every_row(monkeypatch, even, pages):
    import all_layers

    case = all_layers.Case(layers=3, Hkv=2, N=40, even=even, pages=pages)
    used = torch.tensor([case.N], dtype=torch.int32)
    all_layers.check(case, all_layers.draw(case), used)

    def forgets_the_last(*args, **options):
        args[1][-1].zero_()
        return compact(*args, **options)

    name = "compact_paged_kv_" if pages else "compact_kv_"
    compact = getattr(all_layers.zk, name)
    monkeypatch.setattr(all_layers.zk, name, forgets_the_last)
    with pytest.raises(AssertionError, match="layer 2: expected the rows of its set in order in v"):
        all_layers.check(case, all_layers.draw(case), used)


@pytest.mark.parametrize("lengths", [(9, 9), (11, 0, 4)])
def test_packed_compares_bits(lengths):
    from packed import Case

    pytest.importorskip("triton")
    case = Case(2, 1, lengths, "cuda" if torch.cuda.is_available() else "cpu", torch.float32, D=16)
    case.sets = 1
    case.check("triton")
    case.restore()
    for mine, clean in zip(case.rows[0][1:], case.clean_rows[0], strict=True):
        assert torch.equal(mine, clean)


def test_records(monkeypatch, recorded):
    """Rows that were measured are there when a later one fails."""
    import all_layers

    monkeypatch.setattr(all_layers, "ceilings", lambda: {"copy_bytes_per_second": 1e12})
    monkeypatch.setattr(all_layers, "cases", lambda: [all_layers.Case(n, 2, 40, True, False) for n in (1, 2)])
    row = {"sets": "even", "by": "one launch", "p50_ms": 1.0, "x_copy": 1.0}
    monkeypatch.setattr(all_layers, "measure", lambda case, copy: [row | {"layers": case.layers}])
    assert [row["layers"] for row in recorded(all_layers)["rows"]] == [1, 2]

    def fails_late(case, copy):
        assert case.layers == 1
        return [row | {"layers": 7}]

    monkeypatch.setattr(all_layers, "measure", fails_late)
    with pytest.raises(AssertionError):
        recorded(all_layers)
    assert json.loads(Path(sys.argv[-1]).read_text())["rows"] == [row | {"layers": 7}]
