"""`compact_kv_`: the property check, examples, errors, registration."""

import importlib.util
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_compact_kv, check_compact_kv_of_layers, check_packed_compact_kv

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MORE = [check_packed_compact_kv, check_compact_kv_of_layers]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


BACKENDS = ["reference", *(["triton"] if importlib.util.find_spec("triton") else [])]
if zk.backends()["cuda"] == "available":
    BACKENDS.append("cuda")


def tensors(B=2, Hkv=2, N=9, D=4, dtype=torch.float32):
    k = torch.arange(B * Hkv * N * D).view(B, Hkv, N, D).to(dtype)
    indices = torch.full((B, 1, N), -1, dtype=torch.int32)
    indices[..., : min(3, N)] = torch.tensor([2, 4, 8], dtype=torch.int32)[: min(3, N)]
    return k, -k, indices, torch.full((B, 1), min(3, N), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_compact_kv(package.compact_kv_, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("check", MORE)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract_packed_and_of_layers(package, check):
    check(package.compact_kv_, dtype=torch.bfloat16, derandomize=True)


@pytest.mark.parametrize("check", MORE)
def test_contract_triton_packed_and_of_layers(monkeypatch, check):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.compact_kv"), "ROWS", 4)
    check(partial(zk.compact_kv_, backend="triton"), device=DEVICE, derandomize=True, max_examples=15)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 64), (torch.float32, 4), (torch.float16, 4)])
def test_contract_triton(monkeypatch, dtype, rows):
    """Rows are moved as they are, so a dtype is a number of bytes. A tile of 4 rows is several of a sequence."""
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.compact_kv"), "ROWS", rows)
    fn = partial(zk.compact_kv_, backend="triton")
    check_compact_kv(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=15)


cuda = pytest.mark.skipif(zk.backends()["cuda"] != "available", reason="needs CuPy and a GPU")


@cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_tokens", [48, 3000])
def test_contract_cuda(dtype, max_tokens):
    fn = partial(zk.compact_kv_, backend="cuda")
    dims = (4, 16, 64, 80, 7)  # 7: rows that are not aligned
    options = {"device": "cuda", "dtype": dtype, "derandomize": True, "head_dims": dims, "max_tokens": max_tokens}
    check_compact_kv(fn, **options)
    check_packed_compact_kv(fn, **options)
    check_compact_kv_of_layers(fn, **options, layers=(1, 3, 70) if max_tokens < 100 else (2, 5))


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
@pytest.mark.parametrize("chunk", [(16, 16, 16, 1, 1), (16, 10, 16, 1, 64)])  # D = 128 and 80 in half precision
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_cuda_kernel_compiles_without_spills(tmp_path, arch, chunk):
    source = Path(zk.__file__).parent / "_cuda" / "compact_kv.cu"
    macros = [
        f"-D{name}={n}" for name, n in zip(("CHUNK_BYTES", "CHUNKS", "LANES", "PIECES", "LAYERS"), chunk, strict=True)
    ]
    target = [f"-arch={arch}", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    done = subprocess.run(["nvcc", *target, *macros, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.parametrize("check", [check_compact_kv, check_packed_compact_kv])
def test_contract_over_several_chunks(monkeypatch, check):
    monkeypatch.setattr(importlib.import_module("zipvl_reference.compact_kv"), "ROWS", 5)
    check(zk.compact_kv_, derandomize=True)


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


def packed(dtype=torch.float32, **changed):
    """Sequences of 4, 0 and 5 rows, and a row of none; of 2 heads."""
    k = torch.arange(10 * 2 * 4).view(10, 2, 4).to(dtype)
    indices = torch.tensor([[1, 3, -1, -1, 0, 3, 4, -1, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([[2], [0], [3]], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    good = {"k": k, "v": -k, "indices": indices, "counts": counts, "cu_seqlens": cu_seqlens, "max_seqlen": 5}
    return good | changed


@pytest.mark.parametrize("fused", [False, True])
def test_packed(fused):
    given = packed()
    if fused:  # keys and values are views of one tensor, as a model projects them
        together = torch.stack([given["k"], given["v"]], 1)
        given["k"], given["v"] = together.unbind(1)
    before = given["k"].clone()
    assert zk.compact_kv_(**given) is None
    for now, old in ((given["k"], before), (given["v"], -before)):
        assert torch.equal(now[[0, 1]], old[[1, 3]])
        assert torch.equal(now[[4, 5, 6]], old[[4, 7, 8]])
        assert torch.equal(now[9], old[9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [[0, 4, -3, 2**31 - 1], [7, 2, 30, 9], [-(2**31), 100, 3, 10], [3, 3, 9, 9]])
def test_packed_never_writes_elsewhere(backend, cu_seqlens):
    """Whatever `cu_seqlens`, sets and counts hold, nothing outside of the rows is touched."""
    buffers = [torch.randn(30, 2, 4, device=DEVICE) for _ in range(2)]
    before = [x.clone() for x in buffers]
    wild = [0, 3, 2**31 - 1, 5, -7, 9, 11, 40, -(2**31), 8]
    given = packed(
        k=buffers[0][10:20],
        v=buffers[1][10:20],
        indices=torch.tensor([wild], dtype=torch.int32),
        counts=torch.tensor([[2**31 - 1], [3], [-(2**31)]], dtype=torch.int32),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
    )
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    zk.compact_kv_(**given, backend=backend)
    for now, old in zip(buffers, before, strict=True):
        assert torch.equal(now[:10], old[:10])
        assert torch.equal(now[20:], old[20:])


def test_packed_layers():
    one, two = packed(), packed(indices=packed()["indices"].flip(1))
    two["indices"][0, :] = torch.tensor([0, 2, 3, -1, 1, 2, -1, -1, -1, -1])
    two["counts"] = torch.tensor([[3], [0], [2]], dtype=torch.int32)
    names = ("k", "v", "indices", "counts")
    lists = {name: [one[name].clone(), two[name].clone()] for name in names}
    zk.compact_kv_(**lists, cu_seqlens=one["cu_seqlens"], max_seqlen=5)
    for i, layer in enumerate((one, two)):
        zk.compact_kv_(**layer)
        assert torch.equal(lists["k"][i], layer["k"])
        assert torch.equal(lists["v"][i], layer["v"])


def test_packed_of_nothing():
    empty = packed(k=torch.zeros(0, 2, 4), v=torch.zeros(0, 2, 4), indices=torch.zeros(1, 0, dtype=torch.int32))
    assert zk.compact_kv_(**empty | {"cu_seqlens": torch.zeros(4, dtype=torch.int32), "max_seqlen": 0}) is None
    of_none = packed(counts=packed()["counts"][:0], cu_seqlens=packed()["cu_seqlens"][:1])
    before = of_none["k"].clone()
    zk.compact_kv_(**of_none)
    assert torch.equal(of_none["k"], before)


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
BATCH = {"k": k, "v": v, "indices": indices, "counts": counts}


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


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"k: .*\[rows, heads, head dim\] with cu_seqlens.*\[2, 2, 9, 4\]", {"k": k}),
        (TypeError, "k: .*int64", {"k": packed()["k"].long()}),
        (ValueError, r"v: .*shape of k.*\[9, 2, 4\]", {"v": packed()["v"][1:]}),
        (ValueError, "v: .*buffer of its own", {"v": packed()["k"], "k": None}),
        (ValueError, r"indices: .*\[1, 10\] or \[2, 10\].*\[10\]", {"indices": packed()["indices"][0]}),
        (ValueError, r"counts: .*\[3, 1\].*\[2, 1\]", {"counts": packed()["counts"][1:]}),
        (ValueError, r"dst_start: .*None with cu_seqlens", {"dst_start": counts[:, 0]}),
        (ValueError, "max_seqlen: .*with cu_seqlens", {"max_seqlen": None}),
        (ValueError, "k: .*with cu_seqlens.*10, 2, 4", {"cu_seqlens": None}),
        (
            ValueError,
            "max_seqlen: .*None without cu_seqlens",
            {"cu_seqlens": None, **BATCH},
        ),
        (TypeError, "cu_seqlens: .*int32.*int64", {"cu_seqlens": packed()["cu_seqlens"].long()}),
        (ValueError, r"cu_seqlens: .*\[B \+ 1\].*\[4, 1\]", {"cu_seqlens": packed()["cu_seqlens"][:, None]}),
        (ValueError, "max_seqlen: .*at least 0.*-1", {"max_seqlen": -1}),
        (TypeError, "max_seqlen: .*whole number", {"max_seqlen": 5.0}),
    ],
)
def test_packed_errors(error, match, changed):
    given = packed() | changed
    given["k"] = given["v"] if given["k"] is None else given["k"]
    with pytest.raises(error, match=match):
        zk.compact_kv_(**given)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "v: .*sequence of tensors like k", {"v": v}),
        (ValueError, "indices: .*as many as k has, got 1", {"indices": [indices]}),
        (ValueError, r"k: .*each layer.*got 0", {"k": []}),
        (TypeError, "k: expected a tensor or a sequence of tensors, got NoneType", {"k": None}),
        (TypeError, r"counts\[1\]: .*Tensor", {"counts": [counts, 3]}),
        (ValueError, r"v\[1\]: .*strides.*v\[0\]", {"v": [v, v.transpose(1, 2).contiguous().transpose(1, 2)]}),
        (ValueError, r"k\[1\]: .*got the same tensor as k\[0\]", {"k": [k, k]}),
        (ValueError, r"v\[0\]: .*got the same tensor as k\[1\]", {"k": [k, v], "v": [v, k.clone()]}),
    ],
)
def test_errors_of_layers(error, match, changed):
    given = {"k": [k, k.clone()], "v": [v, v.clone()], "indices": [indices] * 2, "counts": [counts] * 2} | changed
    with pytest.raises(error, match=match):
        zk.compact_kv_(**given)


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        ("sequence 0 to start at row 0, got 1", {"cu_seqlens": [1, 4, 4, 9]}),
        ("sequence 1 starts at row 5 and ends before it, at 4", {"cu_seqlens": [0, 5, 4, 9]}),
        ("sequence 2 ends at row 11, and there are 10 rows", {"cu_seqlens": [0, 4, 4, 11]}),
        ("sequence 2 has length 5, which is more than 4", {"max_seqlen": 4}),
    ],
)
def test_checking(monkeypatch, match, changed):
    monkeypatch.setenv("ZIPVL_CHECK", "1")
    zk.compact_kv_(**packed())
    if "cu_seqlens" in changed:
        changed["cu_seqlens"] = torch.tensor(changed["cu_seqlens"], dtype=torch.int32)
    with pytest.raises(ValueError, match=match):
        zk.compact_kv_(**packed(**changed))


def test_registration_packed_and_of_layers():
    given = packed()
    one = [given[name] for name in ("k", "v", "indices", "counts")]
    rest = (None, "auto", given["cu_seqlens"], 5)
    torch.library.opcheck(torch.ops.zipvl.compact_kv_.default, (*one, *rest))
    two = [[x.clone(), x.clone()] for x in one]
    torch.library.opcheck(torch.ops.zipvl.compact_kv_layers_.default, (*two, *rest))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_packed_and_of_layers(backend):
    compiled = torch.compile(zk.compact_kv_, fullgraph=True, backend=backend)
    a, b = packed(), packed()
    compiled(**a)
    zk.compact_kv_(**b)
    assert torch.equal(a["k"], b["k"])
    a, b = ([[x, x.clone()] for x in tensors()] for _ in range(2))
    compiled(*a)
    zk.compact_kv_(*b)
    for now, wanted in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert torch.equal(now, wanted)


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
