"""`decode_attention`: the property check, examples, errors, registration."""

import importlib
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zipvl_reference
from zipvl_reference.testing import check_decode_attention

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B=2, Hq=4, Hkv=2, M=2, N=9, D=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, M, D, generator=random).to(dtype)
    k, v = (torch.randn(B, Hkv, N, D, generator=random).to(dtype) for _ in range(2))
    return q, k, v, torch.full((B,), N, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_decode_attention(package.decode_attention, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.decode_attention, backend="triton")
    check_decode_attention(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=5)


def test_contract_triton_over_several_splits(monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module("zipvl_kernels._triton.decode_attention")
    monkeypatch.setattr(module, "SPLIT", 16)
    monkeypatch.setattr(module, "tiles", lambda dtype, D: (16, 4, 1))
    fn = partial(zk.decode_attention, backend="triton")
    check_decode_attention(fn, device=DEVICE, derandomize=True, max_examples=5)


HOPPER = zk.backends()["cuda"] == "available" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="needs CuPy and a GPU of compute capability 9.0")
@pytest.mark.parametrize("max_tokens", [48, 1300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contract_cuda(dtype, max_tokens):
    """By "auto", which leaves many rows, and what is not aligned, to Triton."""
    check_decode_attention(
        zk.decode_attention, device="cuda", dtype=dtype, derandomize=True, head_dims=(64, 128), max_tokens=max_tokens
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("D", "half"), [(128, 0), (64, 1)])
def test_hopper_kernels_compile_without_spills(tmp_path, D, half):
    source = Path(zk.__file__).parent / "_cuda" / "decode_attention.cu"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = [f"-DHEAD_DIM={D}", f"-DHALF={half}", "-DSPLIT=512"]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, said


def test_last_rows_of_dense_attention():
    q, k, v, used = tensors(M=9)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(zk.decode_attention(q[:, :, -3:], k, v, used), dense[:, :, -3:])


def test_used_length_per_sequence_and_per_head():
    q, k, v, _ = tensors(M=1)
    used = torch.tensor([4, 7], dtype=torch.int32)
    out = zk.decode_attention(q, k, v, used)
    for b, length in enumerate((4, 7)):
        dense = F.scaled_dot_product_attention(q[b], k[b, :, :length], v[b, :, :length], enable_gqa=True)
        torch.testing.assert_close(out[b], dense)
    assert torch.equal(out, zk.decode_attention(q, k, v, used[:, None].expand(2, 2)))


def test_empty_cache_gives_zeros():
    q, k, v, _ = tensors()
    out, lse = zk.decode_attention(q, k, v, torch.tensor([0, 1], dtype=torch.int32), return_lse=True)
    assert not out[0].any()
    assert lse[0].isneginf().all()
    assert not out[1, :, 0].any()
    assert lse[1, :, 0].isneginf().all()
    torch.testing.assert_close(out[1, :, 1], v[1, :, 0].repeat_interleave(2, 0))


def test_partial_results_merge_by_lse():
    q, k, v, used = tensors(M=1)
    out, lse = zk.decode_attention(q, k, v, used, return_lse=True)
    near, near_lse = zk.decode_attention(q, k[:, :, :4], v[:, :, :4], used - 5, return_lse=True)
    far, far_lse = zk.decode_attention(q, k[:, :, 4:], v[:, :, 4:], used - 4, return_lse=True)
    torch.testing.assert_close(torch.logaddexp(near_lse, far_lse), lse)
    merged = near * (near_lse - lse).exp()[..., None] + far * (far_lse - lse).exp()[..., None]
    torch.testing.assert_close(merged, out)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"N": 0}])
def test_empty(sizes):
    q, k, v, used = tensors(**sizes)
    out, lse = zk.decode_attention(q, k, v, used, return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    assert lse.shape == q.shape[:3]
    assert lse.isneginf().all()


def test_catches_a_row_too_many():
    def reads_one_more(q, k, v, seqused_k, **options):
        return zipvl_reference.decode_attention(q, k, v, (seqused_k + 1).clamp(max=k.shape[2]), **options)

    with pytest.raises(AssertionError, match=r"out|lse"):
        check_decode_attention(reads_one_more, derandomize=True)


q, k, v, used = tensors()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"q: expected at most 16 query rows.*\[2, 4, 17, 8\]", {"q": torch.zeros(2, 4, 17, 8)}),
        (ValueError, r"v: .*shape of k", {"v": v[..., :4]}),
        (TypeError, "seqused_k: .*Tensor.*NoneType", {"seqused_k": None}),
        (TypeError, "seqused_k: .*int32.*int64", {"seqused_k": used.long()}),
        (ValueError, r"seqused_k: .*\[2\] or \[2, 2\].*\[2, 4\]", {"seqused_k": used[:, None].expand(2, 4)}),
        (TypeError, "scale: .*True", {"scale": True}),
        (RuntimeError, "backend='cuda'.*decode_attention", {"backend": "cuda"}),
    ],
)
def test_errors(error, match, changed):
    with pytest.raises(error, match=match):
        zk.decode_attention(**{"q": q, "k": k, "v": v, "seqused_k": used, **changed})


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    arguments = (*tensors(dtype=dtype), None, "auto")
    torch.library.opcheck(torch.ops.zipvl.decode_attention.default, arguments)
    torch.library.opcheck(torch.ops.zipvl.decode_attention_lse.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    compiled = torch.compile(zk.decode_attention, fullgraph=True, backend=backend)
    arguments = tensors()
    assert torch.equal(compiled(*arguments), zk.decode_attention(*arguments))
    wanted = zk.decode_attention(*arguments, return_lse=True)
    for got, want in zip(compiled(*arguments, return_lse=True), wanted, strict=True):
        assert torch.equal(got, want)
