"""`sparse_attention`: the property check, examples, errors, registration."""

import importlib
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zipvl_reference
from zipvl_reference.testing import check_sparse_attention

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B=2, Hq=4, Hkv=2, M=9, N=9, D=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, M, D, generator=random).to(dtype)
    k, v = (torch.randn(B, Hkv, N, D, generator=random).to(dtype) for _ in range(2))
    indices = torch.full((B, 1, N), -1, dtype=torch.int32)
    indices[..., : min(3, N)] = torch.tensor([1, 4, 8], dtype=torch.int32)[: min(3, N)]
    return q, k, v, indices, torch.full((B, 1), min(3, N), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_sparse_attention(package.sparse_attention, dtype=dtype, derandomize=True)


def test_contract_over_several_row_blocks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("zipvl_reference.sparse_attention"), "ROWS", 5)
    check_sparse_attention(zk.sparse_attention, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.sparse_attention, backend="triton")
    check_sparse_attention(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=15)


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32)])
def test_contract_triton_over_several_tiles(tiles):
    """Tiles small enough for a few on and below the diagonal, and for keys of a tile to differ in number."""
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.sparse_attention").launch

    def fn(q, k, v, indices, counts, *, scale=None, q_start=None, kv_compacted=False):
        return launch(q, k, v, indices, counts, scale, q_start, kv_compacted, *tiles, num_warps=4, num_stages=2)

    check_sparse_attention(fn, device=DEVICE, derandomize=True, max_examples=10)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
def test_triton_takes_any_scale_and_many_zero_rows(scale):
    pytest.importorskip("triton")
    q, k, v, indices, counts = (x.to(DEVICE) for x in tensors(Hq=20, M=140, N=140, D=80))
    out = zk.sparse_attention(q, k, v, indices, counts, scale=scale, backend="triton")
    wanted = zk.sparse_attention(q, k, v, indices, counts, scale=scale, backend="reference")
    torch.testing.assert_close(out, wanted)


HOPPER = zk.backends()["cuda"] == "available" and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs CuPy and a GPU of compute capability 9.0")


@hopper
@pytest.mark.parametrize("max_tokens", [48, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contract_cuda(dtype, max_tokens):
    """By "auto", which leaves keys in place and rows that are not aligned to Triton."""
    check_sparse_attention(
        zk.sparse_attention, device="cuda", dtype=dtype, derandomize=True, head_dims=(64, 128), max_tokens=max_tokens
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize(("D", "half", "stages"), [(128, 0, 2), (64, 1, 4)])
def test_hopper_kernel_compiles_without_spills(tmp_path, D, half, stages, packed):
    """Nor with a warning, which is how ptxas says that it made the tensor cores wait."""
    source = Path(zk.__file__).parent / "_cuda" / "sparse_attention.cu"
    defined = {"HEAD_DIM": D, "HALF": half, "STAGES": stages, "TAKE_TURNS": 1, "PACKED": packed}
    defined |= {"CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40}
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = [f"-D{name}={value}" for name, value in defined.items()]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "Used 168 registers" in said
    assert "warning" not in said


@hopper
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"D": 80}, "q: .*64 or 128"),
        ({"D": 64, "dtype": torch.float32}, "q: .*float16 or bfloat16"),
        ({"D": 64, "dtype": torch.float16}, "kv_compacted: .*True"),
    ],
)
def test_cuda_says_what_it_lacks(changed, match):
    arguments = (x.to("cuda") for x in tensors(**changed))
    with pytest.raises(ValueError, match=match):
        zk.sparse_attention(*arguments, backend="cuda")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_reads_what_tensors_hold_now(backend):
    """Not what they held in an earlier call."""
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = [x.to(DEVICE) for x in tensors()]
    before = zk.sparse_attention(*arguments, backend=backend)
    arguments[0].neg_()
    assert not torch.equal(zk.sparse_attention(*arguments, backend=backend), before)


def test_triton_refuses_wide_heads():
    pytest.importorskip("triton")
    arguments = (x.to(DEVICE) for x in tensors(D=257))
    with pytest.raises(ValueError, match=r"q: .*at most 256.*\[2, 4, 9, 257\]"):
        zk.sparse_attention(*arguments, backend="triton")


def test_full_set_is_dense_attention():
    q, k, v, _, _ = tensors()
    everything = torch.arange(9, dtype=torch.int32).expand(2, 1, 9)
    out = zk.sparse_attention(q, k, v, everything, torch.full((2, 1), 9, dtype=torch.int32))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_kept_rows_are_attention_of_the_gathered_tokens():
    q, k, v, indices, counts = tensors()
    out = zk.sparse_attention(q, k, v, indices, counts)
    kept = [1, 4, 8]
    wanted = F.scaled_dot_product_attention(
        q[:, :, kept], k[:, :, kept], v[:, :, kept], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, kept], wanted)
    others = [row for row in range(9) if row not in kept]
    assert not out[:, :, others].any()


def test_chunk_of_rows_attends_to_earlier_columns():
    q, k, v, indices, counts = tensors()
    whole = zk.sparse_attention(q, k, v, indices, counts)
    chunk = zk.sparse_attention(q[:, :, 6:], k, v, indices, counts)
    torch.testing.assert_close(chunk, whole[:, :, 6:])


def test_compacted_keys_may_be_cut_to_the_largest_count():
    q, k, v, indices, counts = tensors()
    kept = [1, 4, 8]
    out = zk.sparse_attention(q, k[:, :, kept], v[:, :, kept], indices, counts, kv_compacted=True)
    torch.testing.assert_close(out, zk.sparse_attention(q, k, v, indices, counts))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"N": 0}])
@pytest.mark.parametrize("kv_compacted", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty(sizes, kv_compacted, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v, indices, counts = (x.to(DEVICE) for x in tensors(**sizes))
    out = zk.sparse_attention(q, k, v, indices, counts, kv_compacted=kv_compacted, backend=backend)
    assert out.shape == q.shape
    assert not out.any()


def test_catches_rows_left_over_and_future_columns():
    def fills_other_rows(q, *arguments, **options):
        out = zipvl_reference.sparse_attention(q, *arguments, **options)
        return out + (out == 0) * 1e-3

    def sees_the_future(q, k, v, indices, counts, *, q_start=None, **options):
        start = torch.full((q.shape[0],), k.shape[2] - q.shape[2], dtype=torch.int32) if q_start is None else q_start
        return zipvl_reference.sparse_attention(q.roll(1, 2), k, v, indices, counts, q_start=start, **options)

    for broken in (fills_other_rows, sees_the_future):
        with pytest.raises(AssertionError, match="out"):
            check_sparse_attention(broken, derandomize=True)


q, k, v, indices, counts = tensors()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"v: .*shape of k.*\[2, 2, 8, 8\]", {"v": v[:, :, 1:]}),
        (TypeError, "v: .*float32.*float16", {"v": v.half()}),
        (TypeError, "v: expected a torch.Tensor, got NoneType", {"v": None}),
        (ValueError, "v: .*contiguous last dim", {"v": torch.zeros(2, 2, 9, 16)[..., ::2]}),
        (TypeError, "indices: .*int32.*int64", {"indices": indices.long()}),
        (ValueError, r"indices: .*\[2, 9\]", {"indices": indices[:, 0]}),
        (ValueError, r"indices: .*\[2, 1, 9\].*\[2, 1, 8\]", {"indices": indices[..., :8]}),
        (ValueError, r"indices: .*\[2, 3, 9\]", {"indices": indices.expand(2, 3, 9)}),
        (ValueError, r"counts: .*\[2, 1\].*\[2\]", {"counts": counts[:, 0]}),
        (TypeError, "counts: .*int32.*float32", {"counts": counts.float()}),
        (ValueError, r"q_start: .*\[2\].*\[1\]", {"q_start": torch.zeros(1, dtype=torch.int32)}),
        (ValueError, "scale: .*inf", {"scale": float("inf")}),
        (ValueError, "backend: .*None", {"backend": None}),
        (ValueError, "backend: .*'fastest'", {"backend": "fastest"}),
        ((RuntimeError, ValueError), "backend='cuda'", {"backend": "cuda"}),  # not there, or these are on the CPU
    ],
)
def test_errors(error, match, changed):
    with pytest.raises(error, match=match):
        zk.sparse_attention(**{"q": q, "k": k, "v": v, "indices": indices, "counts": counts, **changed})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_compacted", [False, True])
def test_registration(dtype, kv_compacted):
    arguments = (*tensors(dtype=dtype), 0.5, torch.zeros(2, dtype=torch.int32), kv_compacted, "auto")
    torch.library.opcheck(torch.ops.zipvl.sparse_attention.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    compiled = torch.compile(zk.sparse_attention, fullgraph=True, backend=backend)
    for M in (9, 5):
        arguments = tensors(M=M)
        assert torch.equal(compiled(*arguments), zk.sparse_attention(*arguments))


def test_compiles_where_some_sizes_are_symbols():
    """After a call over pages, whose `k` has other sizes, those of `k` alone are symbols."""
    torch.compiler.reset()
    compiled = torch.compile(zk.sparse_attention, fullgraph=True, backend="eager")
    q, _, _, indices, counts = tensors()
    pools = torch.randn(2, 6, 3, 2, 8).unbind()
    table, used = torch.arange(6, dtype=torch.int32).view(2, 3), torch.full((2,), 9, dtype=torch.int32)
    compiled(q, *pools, indices, counts, block_table=table, seqused_k=used)
    arguments = tensors()
    assert torch.equal(compiled(*arguments), zk.sparse_attention(*arguments))
