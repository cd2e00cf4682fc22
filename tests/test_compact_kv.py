"""`compact_kv_`: the property check, examples, errors, registration."""

import importlib
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_compact_kv

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(B=2, Hkv=2, N=9, D=4, dtype=torch.float32):
    k = torch.arange(B * Hkv * N * D).view(B, Hkv, N, D).to(dtype)
    indices = torch.full((B, 1, N), -1, dtype=torch.int32)
    indices[..., : min(3, N)] = torch.tensor([2, 4, 8], dtype=torch.int32)[: min(3, N)]
    return k, -k, indices, torch.full((B, 1), min(3, N), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_compact_kv(package.compact_kv_, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [64, 4])
def test_contract_triton(monkeypatch, dtype, rows):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.compact_kv"), "ROWS", rows)
    fn = partial(zk.compact_kv_, backend="triton")
    check_compact_kv(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=30)


cuda = pytest.mark.skipif(zk.backends()["cuda"] != "available", reason="needs CuPy and a GPU")


@cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_tokens", [48, 3000])
def test_contract_cuda(dtype, max_tokens):
    fn = partial(zk.compact_kv_, backend="cuda")
    dims = (4, 16, 64, 80, 7)  # 7: rows that are not aligned
    check_compact_kv(fn, device="cuda", dtype=dtype, derandomize=True, head_dims=dims, max_tokens=max_tokens)


@cuda
@pytest.mark.parametrize("kept", [0.05, 0.4, 0.95])
def test_cuda_with_many_blocks_waiting(kept):
    """More tiles than blocks, so that blocks overwrite what others read a moment ago; the counters end at zero."""
    random = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(10):
        k, v = (torch.randn(1, 2, 200_000, 128, generator=random, device="cuda").bfloat16() for _ in range(2))
        columns = (torch.rand(200_000, generator=random, device="cuda") < kept).nonzero().int().flatten()
        indices = torch.nn.functional.pad(columns, (0, 200_000 - len(columns)), value=-1)[None, None]
        counts = torch.tensor([[len(columns)]], dtype=torch.int32, device="cuda")
        wanted = k[:, :, columns], v[:, :, columns]
        zk.compact_kv_(k, v, indices, counts, backend="cuda")
        assert torch.equal(k[:, :, : len(columns)], wanted[0])
        assert torch.equal(v[:, :, : len(columns)], wanted[1])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("chunk", [(16, 16, 16), (16, 10, 16)])  # D = 128 and 80 in half precision
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_cuda_kernel_compiles_without_spills(tmp_path, arch, chunk):
    source = Path(zk.__file__).parent / "_cuda" / "compact_kv.cu"
    macros = [f"-D{name}={n}" for name, n in zip(("CHUNK_BYTES", "CHUNKS", "LANES"), chunk, strict=True)]
    target = [f"-arch={arch}", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said


def test_contract_over_several_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("zipvl_reference.compact_kv"), "ROWS", 5)
    check_compact_kv(zk.compact_kv_, derandomize=True)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_rows_move_in_place(start):
    k, v, indices, counts = tensors()
    before, address = k.clone(), k.data_ptr()
    dst_start = torch.full((2,), start, dtype=torch.int32)
    assert zk.compact_kv_(k, v, indices, counts, dst_start=dst_start) is None
    assert k.data_ptr() == address
    assert torch.equal(k[:, :, start : start + 3], before[:, :, [2, 4, 8]])
    assert torch.equal(v[:, :, start : start + 3], -before[:, :, [2, 4, 8]])
    assert torch.equal(k[:, :, :start], before[:, :, :start])


def test_whole_set_at_the_end_of_the_buffer():
    k, v, indices, counts = tensors()
    before = k.clone()
    indices[..., :3] = torch.tensor([6, 7, 8])
    zk.compact_kv_(k, v, indices, counts, dst_start=torch.tensor([6, 5], dtype=torch.int32))
    assert torch.equal(k[0], before[0])
    assert torch.equal(k[1, :, 5:8], before[1, :, 6:9])


def test_keys_and_values_interleaved_in_one_buffer():
    buffer = torch.randn(2, 9, 2, 2, 4)
    k, v = (buffer[:, :, i].transpose(1, 2) for i in range(2))
    before = k.clone(), v.clone()
    zk.compact_kv_(k, v, *tensors()[2:])
    assert torch.equal(k[:, :, :3], before[0][:, :, [2, 4, 8]])
    assert torch.equal(v[:, :, :3], before[1][:, :, [2, 4, 8]])


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}])
def test_empty(sizes):
    assert zk.compact_kv_(*tensors(**sizes)) is None


def test_catches_a_copy_in_the_wrong_order():
    def backwards(k, v, indices, counts, *, dst_start=None):
        start = torch.zeros(k.shape[0], dtype=torch.int32) if dst_start is None else dst_start
        for b in range(k.shape[0]):
            for h in range(k.shape[1]):
                for i in reversed(range(int(counts[b, h % indices.shape[1]]))):
                    source = int(indices[b, h % indices.shape[1], i])
                    for x in (k, v):
                        x[b, h, int(start[b]) + i] = x[b, h, source].clone()

    with pytest.raises(AssertionError, match="the set"):
        check_compact_kv(backwards, derandomize=True)


k, v, indices, counts = tensors()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"k: .*\[2, 9, 4\]", {"k": k[0]}),
        (TypeError, "k: .*int64", {"k": k.long()}),
        (ValueError, r"v: .*shape of k.*\[2, 2, 8, 4\]", {"v": v[:, :, 1:]}),
        (ValueError, "v: .*buffer of its own", {"v": k}),
        (ValueError, "v: .*expanded", {"v": v[:, :1].expand(2, 2, 9, 4)}),
        (TypeError, "indices: .*int32.*int64", {"indices": indices.long()}),
        (ValueError, r"indices: .*\[2, 1, 9\].*\[2, 1, 3\]", {"indices": indices[..., :3]}),
        (ValueError, r"counts: .*\[2, 1\].*\[2, 2\]", {"counts": counts.expand(2, 2)}),
        (TypeError, "dst_start: .*int", {"dst_start": 0}),
        (ValueError, "dst_start: .*meta", {"dst_start": torch.zeros(2, dtype=torch.int32, device="meta")}),
        (RuntimeError, "backend='cuda'.*compact_kv_", {"backend": "cuda"}),
    ],
)
def test_errors_before_anything_is_written(error, match, changed):
    arguments = {"k": k, "v": v, "indices": indices, "counts": counts, **changed}
    before = k.clone(), v.clone()
    with pytest.raises(error, match=match):
        zk.compact_kv_(**arguments)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    arguments = (*tensors(dtype=dtype), torch.ones(2, dtype=torch.int32), "auto")
    torch.library.opcheck(torch.ops.zipvl.compact_kv_.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    compiled = torch.compile(zk.compact_kv_, fullgraph=True, backend=backend)
    a, b = tensors(), tensors()
    compiled(*a)
    zk.compact_kv_(*b)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
