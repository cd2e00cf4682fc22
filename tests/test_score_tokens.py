"""`score_tokens`: the property check, examples, errors, registration."""

import importlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_score_tokens

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B=2, Hq=4, Hkv=2, M=6, N=9, D=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, Hq, M, D, generator=random), torch.randn(B, Hkv, N, D, generator=random)
    return q.to(dtype), k.to(dtype), torch.tensor([1, M - 1], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_score_tokens(package.score_tokens, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.score_tokens, backend="triton")
    check_score_tokens(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=15)


def test_contract_triton_over_several_tiles():
    """Tiles small enough for several splits and spans of the columns, and programs enough for parts of the heads."""
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.score_tokens").launch

    def fn(q, k, probe_rows, *, scale=None, q_start=None, leftpad_k=None, seqused_k=None, pool="layer"):
        return launch(q, k, probe_rows, scale, q_start, leftpad_k, seqused_k, pool, 16, 16, 4, 1, 12, 6)

    check_score_tokens(fn, device=DEVICE, derandomize=True, max_examples=15)


@pytest.mark.parametrize("size", [1.0, 100.0, 3000.0])
def test_large_scores_that_are_equal_share_alike_in_triton(size):
    """Their logarithm is not exact: at 3,000 rounding it would change weights more than twofold."""
    pytest.importorskip("triton")
    q, rows = torch.full((1, 2, 6, 16), size, device=DEVICE), torch.tensor([5], dtype=torch.int32, device=DEVICE)
    accumulated, _ = zk.score_tokens(q, q, rows, backend="triton")
    torch.testing.assert_close(accumulated, torch.full_like(accumulated, 2 / 6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_probe_cannot_tell_is_not_lost(backend, value):
    """A key that makes a probe's softmax NaN does so for all that it sees, so that selection keeps them."""
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, _ = tensors(M=9)
    k[0, :, 3] = value
    q, k, rows = q.to(DEVICE), k.to(DEVICE), torch.tensor([2, 6], dtype=torch.int32, device=DEVICE)
    accumulated, normalized = zk.score_tokens(q, k, rows, backend=backend)
    assert accumulated[0, 0, :7].isnan().all()
    assert not accumulated[1].isnan().any()
    _, counts = zk.select_tokens(accumulated, normalized, tau=0.5)
    assert counts[0] == 9


HOPPER = zk.backends()["cuda"] == "available" and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs CuPy and a GPU of compute capability 9.0")


@hopper
@pytest.mark.parametrize("max_tokens", [48, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contract_cuda(dtype, max_tokens):
    """By "auto", which leaves rows that are not aligned to Triton."""
    check_score_tokens(
        zk.score_tokens, device="cuda", dtype=dtype, derandomize=True, head_dims=(64, 128), max_tokens=max_tokens
    )


@hopper
@pytest.mark.parametrize("shares", [(1, 2, 1), (3, 2, 2), (2, 16, 3), (5, 4, 12)])
def test_contract_cuda_however_the_work_is_shared(shares):
    launch = importlib.import_module("zipvl_kernels._cuda.score_tokens").launch
    random = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(2, H, 700, 64, device="cuda", generator=random).bfloat16() for H in (12, 4))
    rows = torch.stack([zk.probe_rows(700, num_recent=n, num_random=200 - n, device="cuda") for n in (64, 3)])
    given = rows, 0.2, None, torch.tensor([0, 130], dtype=torch.int32, device="cuda"), None
    got = launch(q, k, *given, "layer", shares)
    wanted = zipvl_reference.score_tokens(q.double(), k.double(), rows, scale=0.2, leftpad_k=given[3])
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.fixture
def plan():
    """How the Hopper kernels share the work; over no CuPy."""
    names = ("cupy", "cupy.cuda", "cupy.cuda.function")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        yield importlib.import_module("zipvl_kernels._cuda.score_tokens")


@pytest.mark.parametrize("N", [1, 127, 300, 2880, 8192, 32768, 131072, 1 << 20])
@pytest.mark.parametrize("P", [1, 128, 300, 512])
@pytest.mark.parametrize(("Hq", "G"), [(1, 1), (28, 1), (28, 4), (40, 1), (40, 40), (128, 1), (256, 1)])
def test_hopper_shares_cover_all_and_fit(plan, Hq, G, P, N):
    row_tiles, column_tiles, parts = plan.plan(N, P, Hq, G)
    tiles, blocks, heads = -(-N // 128), -(-P // 128), Hq // G
    assert 1 <= row_tiles <= tiles
    assert 1 <= column_tiles <= plan.MAX_SPAN
    assert 1 <= parts <= heads
    assert -(-heads // parts) * blocks <= plan.MAX_ITEMS
    if N >= 2880 and G == 1 and heads * blocks <= 160 and P * Hq <= 5120:
        splits = -(-tiles // row_tiles)
        assert 8 + 4 * max(0, parts - 2) + 4 * Hq * P * splits / N <= 64  # bytes a token


@pytest.mark.parametrize("P", [1, 100, 128, 240, 512])
@pytest.mark.parametrize(("Hq", "G"), [(1, 1), (4, 1), (28, 1), (28, 4), (40, 1), (40, 40), (80, 1)])
def test_a_packed_sequence_is_shared_out_as_alone(plan, Hq, G, P):
    """Looked up by its tiles, with the probes that a sequence of so many rows has."""
    looked_up = plan._plans(300, P, Hq, G, None)
    for rows in (1, 2, 99, 127, 128, 129, 250, 256, 300, 500, 513, 2880, 8191, 8193, 300 * 128):
        assert looked_up[-(-rows // 128)] == plan.plan(rows, min(P, rows), Hq, G)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize(("D", "half"), [(128, 0), (64, 1)])
def test_hopper_kernels_compile(tmp_path, D, half, packed):
    """For one block a multiprocessor, and without a warning, which is how ptxas says that it made tensor cores wait."""
    source = Path(zk.__file__).parent / "_cuda" / "score_tokens.cu"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = [f"-DHEAD_DIM={D}", f"-DHALF={half}", f"-DPACKED={packed}"]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said
    spilled = [int(line.split("bytes stack frame, ")[1].split()[0]) for line in said.splitlines() if "spill" in line]
    assert len(spilled) == 2
    assert max(spilled) <= 12, said  # outside the loops


def test_contract_over_several_tiles(monkeypatch):
    monkeypatch.setattr(importlib.import_module("zipvl_reference.score_tokens"), "TILE", 5)
    check_score_tokens(zk.score_tokens, derandomize=True)


def test_by_hand():
    # One head, equal keys: probe 1 spreads over columns 0-1, probe 3 over columns 0-3.
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    accumulated, normalized = zk.score_tokens(q, k, torch.tensor([1, 3], dtype=torch.int32))
    assert accumulated[0, 0].tolist() == [0.75, 0.75, 0.25, 0.25]
    assert normalized[0, 0].tolist() == [0.375, 0.375, 0.25, 0.25]


def test_probe_on_padding_contributes_nothing():
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    leftpad = torch.tensor([2], dtype=torch.int32)
    accumulated, normalized = zk.score_tokens(q, k, torch.tensor([1, 3], dtype=torch.int32), leftpad_k=leftpad)
    assert accumulated[0, 0].tolist() == normalized[0, 0].tolist() == [0, 0, 0.5, 0.5]


def test_accumulated_sums_to_probes_times_heads():
    q, k, rows = tensors(N=200, M=200)
    accumulated, _ = zk.score_tokens(q, k, rows)
    torch.testing.assert_close(accumulated.sum(-1), torch.full((2, 1), 8.0))
    accumulated, _ = zk.score_tokens(q, k, rows, pool="kv_head")
    torch.testing.assert_close(accumulated.sum(-1), torch.full((2, 2), 4.0))


def test_autocast_does_not_lower_precision():
    q, k, rows = tensors()
    wanted = zk.score_tokens(q, k, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(zk.score_tokens(q, k, rows)[0], wanted[0])


def test_no_gradient():
    q, k, rows = tensors()
    assert not zk.score_tokens(q.requires_grad_(), k, rows)[0].requires_grad


@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"N": 0}])
def test_empty(sizes):
    q, k, _ = tensors(**sizes)
    rows = torch.zeros(0 if sizes == {"M": 0} else 2, dtype=torch.int32)
    for scores in zk.score_tokens(q, k, rows):
        assert scores.shape == (q.shape[0], 1, k.shape[2])
        assert not scores.any()


def test_catches_a_missing_causal_mask():
    def not_causal(q, k, probe_rows, *, q_start=None, seqused_k=None, **options):
        B, N = q.shape[0], k.shape[2]
        everything = torch.full((B,), N, dtype=torch.int32)
        return zipvl_reference.score_tokens(q, k, probe_rows, q_start=everything - 1, seqused_k=seqused_k, **options)

    with pytest.raises(AssertionError, match="accumulated"):
        check_score_tokens(not_causal, derandomize=True)


q, k, rows = tensors()
per_sequence = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "q: expected a torch.Tensor, got list", {"q": [1]}),
        (ValueError, r"q: .*got shape \[4, 6, 8\]", {"q": q[0]}),
        (TypeError, "q: .*float64", {"q": q.double()}),
        (TypeError, "k: .*float32.*bfloat16", {"k": k.bfloat16()}),
        (ValueError, "k: .*on cpu.*meta", {"k": k.to("meta")}),
        (ValueError, "k: .*divides the 4 heads.*got 3", {"k": torch.zeros(2, 3, 9, 8)}),
        (ValueError, r"k: .*D = 8.*\[2, 2, 9, 4\]", {"k": torch.zeros(2, 2, 9, 4)}),
        (ValueError, r"k: .*B = 2.*\[1, 2, 9, 8\]", {"k": k[:1]}),
        (ValueError, "k: .*contiguous last dim", {"k": torch.zeros(2, 2, 8, 9).mT}),
        (TypeError, "probe_rows: .*int32.*int64", {"probe_rows": rows.long()}),
        (ValueError, r"probe_rows: .*\[3, 2\]", {"probe_rows": rows.expand(3, 2)}),
        (ValueError, "probe_rows: .*meta", {"probe_rows": rows.to("meta")}),
        (TypeError, "scale: .*'a'", {"scale": "a"}),
        (ValueError, "scale: .*nan", {"scale": float("nan")}),
        (TypeError, "q_start: .*int32.*int64", {"q_start": per_sequence.long()}),
        (ValueError, r"leftpad_k: .*\[2\].*\[3\]", {"leftpad_k": torch.zeros(3, dtype=torch.int32)}),
        (TypeError, "seqused_k: .*Tensor.*int", {"seqused_k": 4}),
        (ValueError, "pool: .*'head'", {"pool": "head"}),
        (ValueError, "backend: .*'gpu'", {"backend": "gpu"}),
        (RuntimeError, "backend='cuda'.*score_tokens", {"backend": "cuda"}),
    ],
)
def test_errors(error, match, changed):
    with pytest.raises(error, match=match):
        zk.score_tokens(**{"q": q, "k": k, "probe_rows": rows, **changed})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_registration(dtype, pool):
    q, k, rows = tensors(dtype=dtype)
    per_sequence = torch.tensor([0, 2], dtype=torch.int32)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (transposed, k, rows, 0.5, None, per_sequence, None, pool, "auto")
    torch.library.opcheck(torch.ops.zipvl.score_tokens.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    def score(q, k, rows, leftpad):
        return zk.score_tokens(q, k, rows, leftpad_k=leftpad, pool="kv_head")

    compiled = torch.compile(score, fullgraph=True, backend=backend)
    leftpad = torch.tensor([0, 2], dtype=torch.int32)
    for N in (9, 12):
        q, k, rows = tensors(N=N)
        for got, wanted in zip(compiled(q, k, rows, leftpad), score(q, k, rows, leftpad), strict=True):
            assert torch.equal(got, wanted)
