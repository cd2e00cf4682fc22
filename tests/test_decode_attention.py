"""`decode_attention`: the property check, examples, errors, registration."""

import importlib.util
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zipvl_reference
from zipvl_reference.testing import check_decode_attention, check_paged_decode_attention

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def tensors(B=2, Hq=4, Hkv=2, M=2, N=9, D=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, M, D, generator=random).to(dtype)
    k, v = (torch.randn(B, Hkv, N, D, generator=random).to(dtype) for _ in range(2))
    return q, k, v, torch.full((B,), N, dtype=torch.int32)


def paged(layout="NHD", dtype=torch.float32):
    """Arguments and options: two sequences of 9 rows in pages of 4, in the halves of one buffer."""
    q, k, v, used = tensors(dtype=dtype)
    table = torch.tensor([[6, 0, 3], [2, 5, 1]], dtype=torch.int32)
    buffer = torch.full((7, 2, 4, 2, 8), torch.nan, dtype=dtype)  # [page, k or v, row, head, D]
    for x, pool in ((k, buffer[:, 0]), (v, buffer[:, 1])):
        for b, j in torch.cartesian_prod(torch.arange(2), torch.arange(9)).tolist():
            pool[table[b, j // 4], j % 4] = x[b, :, j]
    pools = (x if layout == "NHD" else x.transpose(1, 2) for x in (buffer[:, 0], buffer[:, 1]))
    return (q, *pools, used), {"block_table": table, "layout": layout}


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
@pytest.mark.parametrize("page", [0, 16, 256])
@pytest.mark.parametrize(("D", "half"), [(128, 0), (64, 1)])
def test_hopper_kernels_compile_without_spills(tmp_path, D, half, page):
    source = Path(zk.__file__).parent / "_cuda" / "decode_attention.cu"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    macros = [f"-DHEAD_DIM={D}", f"-DHALF={half}", "-DSPLIT=512", f"-DPAGE={page}"]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract_over_pages(package, dtype):
    check_paged_decode_attention(package.decode_attention, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton_over_pages(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.decode_attention, backend="triton")
    check_paged_decode_attention(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=5)


def test_contract_triton_over_pages_and_several_splits(monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module("zipvl_kernels._triton.decode_attention")
    monkeypatch.setattr(module, "SPLIT", 16)
    monkeypatch.setattr(module, "tiles", lambda dtype, D: (16, 4, 1))
    fn = partial(zk.decode_attention, backend="triton")
    check_paged_decode_attention(fn, device=DEVICE, derandomize=True, max_examples=5, block_sizes=(1, 3, 16))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages_hold_what_one_buffer_holds(layout):
    arguments, options = paged(layout)
    torch.testing.assert_close(zk.decode_attention(*arguments, **options), zk.decode_attention(*tensors()))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_pages_that_are_not_there(backend):
    """Nothing outside of the pool is read, and what a sequence gets does not depend on another one's table."""
    arguments, options = paged()
    wanted = zk.decode_attention(*(x.to(DEVICE) for x in arguments), block_table=options["block_table"].to(DEVICE))
    broken = options["block_table"].clone()
    broken[0] = torch.tensor([2**31 - 1, -(2**31), -1])
    used = torch.tensor([2**31 - 1, 9], dtype=torch.int32)
    arguments = (x.to(DEVICE) for x in (*arguments[:3], used))
    out = zk.decode_attention(*arguments, block_table=broken.to(DEVICE), backend=backend)
    torch.testing.assert_close(out[1], wanted[1])


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


def test_catches_pages_in_the_wrong_order():
    def reads_backwards(q, k, v, seqused_k, *, block_table, **options):
        return zipvl_reference.decode_attention(q, k, v, seqused_k, block_table=block_table.flip(1), **options)

    with pytest.raises(AssertionError, match=r"out|lse"):
        check_paged_decode_attention(reads_backwards, derandomize=True)


q, k, v, used = tensors()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"q: expected at most 16 query rows.*\[2, 4, 17, 8\]", {"q": torch.zeros(2, 4, 17, 8)}),
        (ValueError, r"v: .*shape of k", {"v": v[..., :4]}),
        (TypeError, "v: expected a torch.Tensor, got NoneType", {"v": None}),
        (TypeError, "seqused_k: .*Tensor.*NoneType", {"seqused_k": None}),
        (TypeError, "seqused_k: .*int32.*int64", {"seqused_k": used.long()}),
        (ValueError, r"seqused_k: .*\[2\] or \[2, 2\].*\[2, 4\]", {"seqused_k": used[:, None].expand(2, 4)}),
        (TypeError, "scale: .*True", {"scale": True}),
        (RuntimeError, "backend='cuda'.*decode_attention", {"backend": "cuda"}),
        (ValueError, "layout: .*'NHD' or 'HND'.*'BHND'", {"layout": "BHND"}),
    ],
)
def test_errors(error, match, changed):
    with pytest.raises(error, match=match):
        zk.decode_attention(**{"q": q, "k": k, "v": v, "seqused_k": used, **changed})


PAGED = dict(zip(("q", "k", "v", "seqused_k"), paged()[0], strict=True), block_table=paged()[1]["block_table"])
pool_k, pool_v, table = PAGED["k"], PAGED["v"], PAGED["block_table"]


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"k: .*\[num_blocks, block_size, Hkv, D\].*\[7, 4, 2\]", {"k": pool_k[..., 0]}),
        (ValueError, r"k: .*at least one block.*\[0, 4, 2, 8\]", {"k": pool_k[:0], "v": pool_v[:0]}),
        (
            ValueError,
            r"k: .*divides the 4 heads of q.*\[7, 4, 3, 8\]",
            {"k": pool_k[:, :, [0, 1, 1]], "v": pool_v[:, :, [0, 1, 1]]},
        ),
        (ValueError, r"k: .*D = 8.*\[7, 4, 2, 4\]", {"k": pool_k[..., :4], "v": pool_v[..., :4]}),
        (TypeError, "k: .*float16", {"k": pool_k.half(), "v": pool_v.half()}),
        (ValueError, r"v: .*shape of k.*\[6, 4, 2, 8\]", {"v": pool_v[:6]}),
        (TypeError, "v: expected a torch.Tensor, got NoneType", {"v": None}),
        (TypeError, "block_table: .*Tensor.*list", {"block_table": table.tolist()}),
        (TypeError, "block_table: .*int32.*int64", {"block_table": table.long()}),
        (ValueError, r"block_table: .*\[B, max_blocks\].*\[2, 3\].*\[1, 3\]", {"block_table": table[:1]}),
        (ValueError, r"block_table: .*\[B, max_blocks\].*\[3\]", {"block_table": table[0]}),
        (ValueError, r"seqused_k: .*\[2\] or \[2, 2\].*\[2, 4\]", {"seqused_k": used[:, None].expand(2, 4)}),
    ],
)
def test_errors_of_pages(error, match, changed):
    with pytest.raises(error, match=match):
        zk.decode_attention(**PAGED | changed)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"max_blocks": 0}])
def test_empty_over_pages(sizes):
    B, M, max_blocks = (sizes.get(name, 2) for name in ("B", "M", "max_blocks"))
    out = zk.decode_attention(q[:B, :, :M], pool_k, pool_v, used[:B], block_table=table[:B, :max_blocks])
    assert out.shape == (B, 4, M, 8)
    assert max_blocks or not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    arguments = (*tensors(dtype=dtype), None, "auto")
    torch.library.opcheck(torch.ops.zipvl.decode_attention.default, arguments)
    torch.library.opcheck(torch.ops.zipvl.decode_attention_lse.default, arguments)
    (q, k, v, used), options = paged("HND", dtype)
    arguments = (q, k, v, used, None, "auto", options["block_table"], "HND")
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
    arguments, options = paged()
    assert torch.equal(compiled(*arguments, **options), zk.decode_attention(*arguments, **options))
