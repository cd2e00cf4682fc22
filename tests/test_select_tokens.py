"""`select_tokens`: the property check, every line of the rule by example, errors, registration."""

import importlib
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_select_tokens

import zipvl_kernels as zk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

UNIT = 2.0**-32  # the score whose mass is 1
FREE = {"keep_first": 0, "keep_recent": 0}


def select(accumulated, normalized=None, **options):
    """The kept columns of one sequence and group."""
    for name in ("leftpad_k", "seqused_k"):
        if name in options:
            options[name] = torch.tensor([options[name]], dtype=torch.int32)
    accumulated = torch.tensor(accumulated, dtype=torch.float32)[None, None]
    normalized = accumulated if normalized is None else torch.tensor(normalized, dtype=torch.float32)[None, None]
    indices, counts = zk.select_tokens(accumulated, normalized, **options)
    p = int(counts)
    assert (indices[0, 0, p:] == -1).all()
    return indices[0, 0, :p].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_select_tokens(package.select_tokens, dtype=dtype, derandomize=True)


def test_contract_triton():
    pytest.importorskip("triton")
    fn = partial(zk.select_tokens, backend="triton")
    check_select_tokens(fn, device=DEVICE, derandomize=True, max_examples=20)


def test_contract_triton_over_several_tiles(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.select_tokens"), "BLOCK", 16)
    fn = partial(zk.select_tokens, backend="triton")
    check_select_tokens(fn, device=DEVICE, derandomize=True, max_examples=2)


CUDA = zk.backends()["cuda"] == "available" and torch.cuda.get_device_capability() >= (8, 0)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CuPy and a GPU of compute capability 8.0 or more")
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (0, 0)
CLUSTERS = [1, *([2, 4, 8] if CAPABILITY >= (9, 0) else []), *([16] if CAPABILITY == (9, 0) else [])]


@needs_cuda
def test_contract_cuda():
    check_select_tokens(partial(zk.select_tokens, backend="cuda"), device="cuda", derandomize=True)


@needs_cuda
@pytest.mark.parametrize("blocks", CLUSTERS)
@pytest.mark.parametrize("threads", [32, 1024])
def test_contract_cuda_in_every_configuration(threads, blocks):
    launch = importlib.import_module("zipvl_kernels._cuda.select_tokens").launch

    def fn(accumulated, normalized, *, tau=None, keep_ratio=None, leftpad_k=None, seqused_k=None, **keep):
        share = {"tau": tau, "keep_ratio": keep_ratio, "leftpad_k": leftpad_k, "seqused_k": seqused_k}
        keep = {"keep_first": 0, "keep_recent": 1, **keep}
        return launch(accumulated, normalized, **share, **keep, threads=threads, blocks=blocks)

    check_select_tokens(fn, device="cuda", derandomize=True, max_examples=50)
    check_select_tokens(fn, device="cuda", derandomize=True, max_examples=10, max_tokens=600)


def many(kind, N):
    """Scores of two sequences as they crowd: one bin of a histogram, few values, every bit pattern."""
    random = torch.Generator().manual_seed(0)
    narrow = 1 + 0.02 * torch.randn(2, 1, N, generator=random)
    if kind == "sink":
        narrow[..., 0] = 900
    if kind == "few":
        narrow = (5 * torch.rand(2, 1, N, generator=random)).floor() / 3
    if kind == "bits":
        narrow = torch.randint(-(2**31), 2**31, (2, 1, N), generator=random).to(torch.int32).view(torch.float32)
    return narrow


@needs_cuda
@pytest.mark.parametrize("kind", ["narrow", "sink", "few", "bits"])
@pytest.mark.parametrize("N", [2880, 32768, 131072])
@pytest.mark.parametrize("share", [{"tau": 0.6}, {"tau": 1.0}, {"keep_ratio": 0.367}])
def test_cuda_on_many_columns(kind, N, share):
    accumulated, normalized = many(kind, N), many(kind, N).flip(-1)
    options = {"keep_first": 4, "keep_recent": 64, **share}
    wanted = zk.select_tokens(accumulated, normalized, **options, backend="reference")
    bounds = torch.tensor([0, 0], dtype=torch.int32, device="cuda")
    columns = normalized.cuda().repeat_interleave(2, -1)[..., ::2]
    got = zk.select_tokens(accumulated.cuda(), columns, **options, leftpad_k=bounds, backend="cuda")
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x.cpu(), y)


@needs_cuda
def test_cuda_replays_on_changed_scores():
    scores = many("narrow", 20000).cuda()
    fn = partial(zk.select_tokens, tau=0.6, backend="cuda")
    fn(scores, scores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fn(scores, scores)
    for kind in ("few", "sink"):
        scores.copy_(many(kind, 20000))
        graph.replay()
        for x, y in zip(got, zk.select_tokens(scores, scores, tau=0.6, backend="reference"), strict=True):
            assert torch.equal(x, y)


@needs_cuda
def test_cuda_refuses_more_columns_than_its_sums_hold():
    scores = torch.ones(1, device="cuda").expand(1, 1, 2**22 + 1)
    with pytest.raises(ValueError, match=r"accumulated: .*4194304 columns.*\[1, 1, 4194305\]"):
        zk.select_tokens(scores, scores, tau=0.5, backend="cuda")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("held", "by_ratio", "packed"), [(4, 0, 0), (4, 1, 0), (4, 0, 1), (0, 0, 0), (0, 0, 1)])
@pytest.mark.parametrize(("architecture", "blocks"), [(80, 1), (90, 1), (90, 8), (90, 16), (100, 8), (120, 8)])
def test_cuda_kernel_compiles_without_spills(tmp_path, architecture, blocks, held, by_ratio, packed):
    source = Path(zk.__file__).parent / "_cuda" / "select_tokens.cu"
    target = [f"-arch=sm_{architecture}", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = ["-DTHREADS=1024", f"-DCLUSTER={blocks}", f"-DHELD={held}", f"-DBY_RATIO={by_ratio}"]
    macros.append(f"-DPACKED={packed}")
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "warning" not in said


def test_mass_rounds_down():
    # 1.9 units count as 1: of the total of 3, two columns reach ceil(0.6 * 3) = 2. Unrounded, one would do for 0.5.
    assert select([1.9 * UNIT, UNIT, UNIT], tau=0.6, **FREE) == [0, 1]
    assert select([0.9 * UNIT, 0.9 * UNIT, UNIT], tau=1.0, **FREE) == [2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -5.0])
def test_mass_of_what_is_not_a_mass_is_zero(bad):
    assert select([1, bad, 1, 1], [4, 3, 2, 1], tau=1.0, **FREE) == [0, 1, 2]  # three masses, so p = 3


def test_need_is_rounded_up():
    assert select([UNIT] * 3, tau=0.34, **FREE) == [0, 1]  # ceil(1.02) = 2
    assert select([UNIT] * 3, tau=1 / 3, **FREE) == [0]  # 1/3 * 3 is 1.0 in float64


def test_boundary_element_is_kept():
    """A sum of exactly tau * total reaches it; one unit less does not, however close it looks in floating point."""
    assert select([0.5, 0.25, 0.125, 0.125], tau=0.75, **FREE) == [0, 1]
    exact = [2**22, 2**21, 2**20, 2**20]
    short = [2**22, 2**21 - 1, 2**20, 2**20 + 1]
    assert select([mass * UNIT for mass in exact], tau=0.75, **FREE) == [0, 1]
    assert select([mass * UNIT for mass in short], tau=0.75, **FREE) == [0, 1, 3]


def test_ties_at_the_boundary_are_not_over_accepted():
    assert select([1.0] * 10, tau=0.25, **FREE) == [0, 1, 2]
    assert select([1.0] * 10, keep_ratio=0.25, **FREE) == [0, 1, 2]
    assert select([2, 1, 1, 1, 1, 2], tau=0.6, **FREE) == [0, 1, 5]


def test_count_from_accumulated_and_members_from_normalized():
    assert select([8, 1, 1, 0], [1, 2, 3, 4], tau=0.8, **FREE) == [3]


def test_total_of_zero_keeps_everything_valid():
    assert select([0.0] * 4, tau=0.5, **FREE) == [0, 1, 2, 3]
    assert select([math.nan] * 4, tau=0.5, leftpad_k=1, **FREE) == [1, 2, 3]
    assert select([0, 9, 0], tau=0.5, leftpad_k=2, **FREE) == [2]  # mass on padding is none


def test_keep_ratio_is_rounded_up_over_valid_columns():
    assert len(select([1.0] * 10, keep_ratio=0.31, **FREE)) == 4
    assert len(select([1.0] * 10, keep_ratio=0.3, **FREE)) == 3
    assert len(select([1.0] * 10, keep_ratio=0.5, leftpad_k=3, **FREE)) == 4
    assert len(select([1.0] * 10, keep_ratio=1.0, seqused_k=7)) == 7


def test_forced_columns_count():
    assert select([0, 9, 0, 0, 1], tau=0.5, keep_first=1, keep_recent=1) == [0, 4]
    assert select([0, 9, 0, 8, 1], tau=0.9, keep_first=1, keep_recent=0) == [0, 1]
    assert select([1, 1], tau=0.1, keep_first=5, keep_recent=5) == [0, 1]
    assert select([1, 1, 1, 1, 1], tau=0.1, keep_first=1, keep_recent=1, leftpad_k=1, seqused_k=4) == [1, 3]
    assert select([math.inf] * 3, [math.inf, math.inf, math.nan], tau=0.1, keep_recent=1) == [0, 1, 2]
    assert select([1, 1, 1], [math.inf, math.inf, math.nan], tau=0.1, keep_recent=1) == [2]


@pytest.mark.parametrize("forced", [(2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_more_forced_columns_than_32_bits_count(backend, forced):
    if backend == "triton":
        pytest.importorskip("triton")
    scores, padding = torch.tensor([[[9.0, 1, 5, 1, 1]]]).to(DEVICE), torch.tensor([1], dtype=torch.int32).to(DEVICE)
    options = {"tau": 0.1, "keep_first": forced[0], "keep_recent": forced[1], "leftpad_k": padding}
    indices, counts = zk.select_tokens(scores, scores, **options, backend=backend)
    assert indices.tolist() == [[[1, 2, 3, 4, -1]]]
    assert counts.item() == 4


def test_last_column_is_kept_by_default():
    assert select([9, 1, 1], tau=0.1) == [2]


def test_at_least_one():
    assert select([1.0] * 5, tau=1e-30, **FREE) == [0]
    assert select([1.0] * 5, keep_ratio=1e-30, **FREE) == [0]


def test_ties_go_to_the_lower_column():
    assert select([1.0] * 4, [0.0, 1.0, 1.0, 1.0], keep_ratio=0.5, **FREE) == [1, 2]
    assert select([1.0] * 4, [-0.0, 0.0, -0.0, 0.0], keep_ratio=0.5, **FREE) == [0, 1]


def test_nan_is_below_everything():
    assert select([1.0] * 4, [math.nan, -math.inf, math.nan, -1], keep_ratio=0.75, **FREE) == [0, 1, 3]


def test_padding_is_never_kept():
    assert select([9, 1, 1, 9], [9, 1, 2, 9], keep_ratio=1.0, leftpad_k=1, seqused_k=3) == [1, 2]
    assert select([1, 1], tau=1.0, leftpad_k=2) == []
    assert select([1, 1], tau=1.0, leftpad_k=2, seqused_k=1, keep_first=1) == []


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("scores", "tau", "wanted"),
    [
        ([1e9] * 2, 1.0, 2),
        ([7e8] * 3, 0.9, 3),
        ([2.0**30] * 4, 0.975, 2),
        ([2.0**29] * 5, 1.0, 4),
        ([1e9, 3.0], 1.0, 2),
    ],
    ids=str,
)
def test_masses_close_to_what_int64_holds(backend, scores, tau, wanted):
    if backend == "triton":
        pytest.importorskip("triton")
    scores = torch.tensor([[scores]], device=DEVICE)
    _, counts = zk.select_tokens(scores, scores, tau=tau, **FREE, backend=backend)
    assert counts.tolist() == [[wanted]]


@pytest.mark.parametrize("number", [2**31, 2**63 - 1, 2**70])
def test_more_forced_columns_than_int64_holds(number):
    for forced in ({"keep_first": number}, {"keep_recent": number}, {"keep_first": number, "keep_recent": number}):
        assert select([0.1, 0.2, 0.3], keep_ratio=0.1, **FREE | forced) == [0, 1, 2]


def test_masses_saturate():
    assert select([3e38, 3e38, 1.0], tau=0.5, **FREE) == [0]
    assert select([2.0**30, 2.0**30, 2.0**30], tau=1.0, **FREE) == [0, 1]  # 2**63 - 1 is reached by the second


def test_catches_an_inexact_boundary_and_other_ties():
    def rounds_tau_to_fp32(accumulated, normalized, **options):
        if options.get("tau"):
            options["tau"] = min(1.0, torch.tensor(options["tau"], dtype=torch.float32).item()) or 1e-45
        return zipvl_reference.select_tokens(accumulated, normalized, **options)

    def ties_to_the_higher_column(accumulated, normalized, **options):
        nudge = torch.arange(normalized.shape[-1]) * 1e-6
        return zipvl_reference.select_tokens(accumulated, normalized + nudge, **options)

    for broken in (rounds_tau_to_fp32, ties_to_the_higher_column):
        with pytest.raises(AssertionError, match="indices"):
            check_select_tokens(broken, derandomize=True, max_tokens=4)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 1, 0), (0, 2, 0)])
@pytest.mark.parametrize("share", [{"tau": 0.5}, {"keep_ratio": 0.5}])
def test_empty(shape, share):
    indices, counts = zk.select_tokens(torch.ones(shape), torch.ones(shape), **share)
    assert indices.shape == shape
    assert counts.shape == shape[:2]
    assert not counts.any()


ones = torch.ones(2, 1, 4)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "accumulated: .*Tensor.*float", {"accumulated": 1.0}),
        (TypeError, "accumulated: .*float32.*float16", {"accumulated": ones.half()}),
        (ValueError, r"accumulated: .*\[B, G, N\].*\[1, 4\]", {"accumulated": ones[0]}),
        (ValueError, r"normalized: .*\[2, 1, 4\].*\[1, 1, 4\]", {"normalized": ones[:1]}),
        (ValueError, "normalized: .*meta", {"normalized": ones.to("meta")}),
        (ValueError, "tau, keep_ratio: .*exactly one", {"tau": None}),
        (ValueError, "tau, keep_ratio: .*exactly one", {"keep_ratio": 0.5}),
        (ValueError, "tau: .*0", {"tau": 0}),
        (ValueError, "tau: .*1.01", {"tau": 1.01}),
        (ValueError, "tau: .*nan", {"tau": math.nan}),
        (TypeError, "tau: .*'0.5'", {"tau": "0.5"}),
        (ValueError, "keep_ratio: .*-0.5", {"tau": None, "keep_ratio": -0.5}),
        (ValueError, "keep_first: .*-1", {"keep_first": -1}),
        (ValueError, "keep_recent: .*-2", {"keep_recent": -2}),
        (TypeError, "keep_recent: .*1.5", {"keep_recent": 1.5}),
        (TypeError, "leftpad_k: .*int64", {"leftpad_k": torch.zeros(2, dtype=torch.int64)}),
        (ValueError, r"seqused_k: .*\[2, 1\]", {"seqused_k": torch.zeros(2, 1, dtype=torch.int32)}),
        (ValueError, "backend: .*''", {"backend": ""}),
        ((RuntimeError, ValueError), "backend='cuda'", {"backend": "cuda"}),  # not there, or these are on the CPU
    ],
)
def test_errors(error, match, changed):
    with pytest.raises(error, match=match):
        zk.select_tokens(**{"accumulated": ones, "normalized": ones, "tau": 0.9, **changed})


@pytest.mark.parametrize("share", [(0.9, None), (None, 0.5)])
def test_registration(share):
    leftpad = torch.tensor([0, 2], dtype=torch.int32)
    arguments = (torch.rand(2, 2, 9), torch.rand(2, 2, 9), *share, 1, 1, leftpad, None, "auto")
    torch.library.opcheck(torch.ops.zipvl.select_tokens.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    def choose(scores):
        return zk.select_tokens(scores, scores, tau=0.7, keep_first=1)

    compiled = torch.compile(choose, fullgraph=True, backend=backend)
    for N in (6, 11):
        scores = torch.rand(2, 1, N)
        for got, wanted in zip(compiled(scores), choose(scores), strict=True):
            assert torch.equal(got, wanted)
