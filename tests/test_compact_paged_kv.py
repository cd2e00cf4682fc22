"""`compact_paged_kv_`: the property check, examples, what may never be written, errors, registration."""

import importlib.util
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import zipvl_reference
from zipvl_reference.testing import check_compact_paged_kv, check_compact_paged_kv_of_layers
from zipvl_reference.testing.budget import assert_same_bits

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
if zk.backends()["cuda"] == "available":
    BACKENDS.append("cuda")


def tensors(layout="NHD", dtype=torch.float32, groups=1):
    """Two sequences of 9 and 6 rows in pages of 4, of which they share the first; 7 pages of 2 heads."""
    shape = (7, 4, 2, 4) if layout == "NHD" else (7, 2, 4, 4)
    k = torch.arange(7 * 4 * 2 * 4).view(shape).to(dtype)
    indices = torch.full((2, groups, 9), -1, dtype=torch.int32)
    indices[0, :, :6] = torch.tensor([0, 1, 2, 3, 5, 8])
    indices[1, :, :5] = torch.tensor([0, 1, 2, 3, 5])
    counts = torch.tensor([[6], [5]], dtype=torch.int32).repeat(1, groups)
    table = torch.tensor([[6, 0, 3], [6, 5, -1]], dtype=torch.int32)
    return k, -k, indices, counts, table, torch.tensor([9, 6], dtype=torch.int32)


def rows(pool, table, layout="NHD"):
    """All rows of a sequence, `[Hkv, rows, D]`."""
    pages = pool[table[table >= 0].long()]
    return (pages.transpose(1, 2) if layout == "NHD" else pages).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_compact_paged_kv(package.compact_paged_kv_, dtype=dtype, derandomize=True)


def test_contract_over_several_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("zipvl_reference.compact_paged_kv"), "ROWS", 5)
    check_compact_paged_kv(zk.compact_paged_kv_, derandomize=True)


@pytest.mark.parametrize(("dtype", "tile"), [(torch.bfloat16, 64), (torch.float32, 4), (torch.float16, 4)])
def test_contract_triton(monkeypatch, dtype, tile):
    """Rows are moved as they are, so a dtype is a number of bytes. A tile of 4 rows is several of a sequence."""
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.compact_paged_kv"), "ROWS", tile)
    fn = partial(zk.compact_paged_kv_, backend="triton")
    check_compact_paged_kv(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=12)


@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract_of_layers(package):
    check_compact_paged_kv_of_layers(package.compact_paged_kv_, dtype=torch.bfloat16, derandomize=True)


def test_contract_of_layers_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zipvl_kernels._triton.compact_paged_kv"), "ROWS", 4)
    fn = partial(zk.compact_paged_kv_, backend="triton")
    check_compact_paged_kv_of_layers(fn, device=DEVICE, derandomize=True, max_examples=8, layers=(1, 3))


@pytest.mark.skipif(zk.backends()["cuda"] != "available", reason="needs CuPy and a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_tokens", [48, 1500])
def test_contract_cuda(dtype, max_tokens):
    fn = partial(zk.compact_paged_kv_, backend="cuda")
    few = {"max_examples": 50 if max_tokens < 100 else 10, "max_tokens": max_tokens, "head_dims": (16, 80, 7)}
    check_compact_paged_kv(fn, device="cuda", dtype=dtype, derandomize=True, **few)
    check_compact_paged_kv_of_layers(fn, device="cuda", dtype=dtype, derandomize=True, layers=(1, 3, 66), **few)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("arch", "chunk"),
    [
        ("sm_90", (16, 16, 16, 1, 1, 16, 3)),  # D = 128 in half precision
        ("sm_90", (16, 10, 16, 1, 64, 16, 3)),  # D = 80, many layers
        ("sm_90", (16, 32, 32, 1, 1, 1, 3)),  # D = 256, rows that are pages
        ("sm_80", (16, 16, 16, 1, 1, 16, 2)),
        ("sm_100", (16, 16, 16, 1, 64, 16, 2)),
        ("sm_120", (16, 16, 16, 1, 1, 24, 2)),
    ],
)
def test_cuda_kernel_compiles_without_spills(tmp_path, arch, chunk):
    source = Path(zk.__file__).parent / "_cuda" / "compact_paged_kv.cu"
    names = ("CHUNK_BYTES", "CHUNKS", "LANES", "PIECES", "LAYERS", "PAGE", "BLOCKS_PER_SM")
    macros = [f"-D{name}={n}" for name, n in zip(names, chunk, strict=True)]
    block = ["-DTHREADS=256", "-DITEMS=8"]
    target = [f"-arch={arch}", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", tmp_path / "cubin"]
    done = subprocess.run(["nvcc", *target, *macros, *block, source], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rows_move_in_place(layout):
    k, v, indices, counts, table, used = tensors(layout)
    before, address = k.clone(), k.data_ptr()
    first = torch.tensor([4, 4], dtype=torch.int32)
    seqused, freed = zk.compact_paged_kv_(k, v, indices, counts, table, used, layout=layout, first_writable=first)
    assert (seqused.tolist(), freed.tolist(), k.data_ptr()) == ([6, 5], [1, 0], address)
    for b, kept in enumerate(([0, 1, 2, 3, 5, 8], [0, 1, 2, 3, 5])):
        old = rows(before, table[b], layout)[:, kept]
        assert torch.equal(rows(k, table[b], layout)[:, : len(kept)], old)
        assert torch.equal(rows(v, table[b], layout)[:, : len(kept)], -old)
    assert torch.equal(k[[1, 2, 4, 6]], before[[1, 2, 4, 6]])  # no page of a sequence, or shared


def test_sets_of_each_head():
    k, v, indices, counts, table, used = tensors(groups=2)
    indices[0, 1], counts[0, 1] = torch.tensor([4, -1, -1, -1, -1, -1, -1, -1, -1]), 1
    before = rows(k, table[0])
    seqused, freed = zk.compact_paged_kv_(k, v, indices, counts, table, used)
    assert seqused.tolist() == [[6, 1], [5, 5]]
    assert freed.tolist() == [1, 0]  # three pages are two, for the sake of head 0
    assert torch.equal(rows(k, table[0])[1, 0], before[1, 4])
    indices, counts = indices[..., :2], torch.tensor([[1, 0], [0, 0]], dtype=torch.int32)
    seqused, freed = zk.compact_paged_kv_(k, v, indices, counts, table, seqused)  # and from lengths of each head
    assert (seqused.tolist(), freed.tolist()) == ([[1, 0], [0, 0]], [1, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences(backend):
    k, v, indices, counts, table, used = (x.to(DEVICE) for x in tensors())
    before = k.clone()
    for width in (9, 0):
        lengths = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
        sets = indices[..., :width], torch.zeros_like(counts)
        seqused, freed = zk.compact_paged_kv_(k, v, *sets, table, lengths, backend=backend)
        assert (seqused.tolist(), freed.tolist()) == ([0, 0], [0, 2])
    assert torch.equal(k, before)
    nothing = zk.compact_paged_kv_(k, v, indices[:0], counts[:0], table[:0], used[:0], backend=backend)
    assert [x.shape for x in nothing] == [(0,), (0,)]
    no_table = zk.compact_paged_kv_(k, v, indices, counts, table[:, :0], used, backend=backend)
    assert [x.tolist() for x in no_table] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_pages_stay_whatever_is_asked_for(backend):
    """Also where the set lacks what it has to have: what stands before `first_writable` is not written."""
    k, v, _, counts, table, used = (x.to(DEVICE) for x in tensors())
    indices = torch.arange(3, 9, dtype=torch.int32, device=DEVICE).expand(2, 1, 6)
    before, first = k.clone(), torch.tensor([4, 6], dtype=torch.int32, device=DEVICE)
    zk.compact_paged_kv_(k, v, indices, counts, table, used, first_writable=first, backend=backend)
    assert torch.equal(k[6], before[6])
    assert torch.equal(k[5], before[5])  # the rest of sequence 1, all of which is protected
    assert torch.equal(rows(k, table[0])[:, 4:6], rows(before, table[0])[:, 7:9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("seed", range(6))
def test_garbage_never_writes_elsewhere(backend, layout, seed):
    """Any numbers in any argument: what is written is a row of a page in the table, at or after `first_writable`."""
    random = torch.Generator().manual_seed(seed)
    extremes = torch.tensor([-(2**31), -17, -1, 0, 1, 7, 8, 40, 2**31 - 1], dtype=torch.int32)

    def garbage(*shape, sane):
        """A third are extreme."""
        wild = extremes[torch.randint(len(extremes), shape, generator=random)]
        drawn = torch.randint(sane, shape, generator=random).int()
        return torch.where(torch.rand(shape, generator=random) < 1 / 3, wild, drawn)

    buffers = [torch.randn(20, *((4, 2) if layout == "NHD" else (2, 4)), 4, generator=random) for _ in range(2)]
    indices, counts, table = garbage(3, 2, 14, sane=12), garbage(3, 2, sane=12), garbage(3, 3, sane=7)
    used, first = garbage(3, 2, sane=13), garbage(3, sane=5)
    moved = [x.clone().to(DEVICE) for x in buffers]
    arguments = [x.to(DEVICE) for x in (indices, counts, table, used)]
    pools = [x[6:13] for x in moved]  # the pool is a part of the buffer, and what is beside it must not change
    options = {"layout": layout, "first_writable": first.to(DEVICE), "backend": backend}
    seqused, freed = zk.compact_paged_kv_(*pools, *arguments, **options)
    allowed = torch.zeros(20, 2, 4, dtype=torch.bool)
    for b, j in torch.cartesian_prod(torch.arange(3), torch.arange(12)).tolist():
        if j >= first[b] and 0 <= table[b, j // 4] < 7:
            allowed[6 + table[b, j // 4], :, j % 4] = True
    allowed = (allowed.transpose(1, 2) if layout == "NHD" else allowed)[..., None]
    for now, old in zip(moved, buffers, strict=True):
        assert_same_bits("what is not to be written", now.cpu().masked_fill(allowed, 0), old.masked_fill(allowed, 0))
    capacity = used.clamp(0, 12)
    assert torch.equal(seqused.cpu(), counts.clamp(0, 14).minimum(capacity))
    assert torch.equal(freed.cpu(), (capacity.amax(1) + 3) // 4 - (seqused.cpu().amax(1) + 3) // 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_are_compacted_as_one_by_one(groups):
    """Twice, the second time from the lengths that the first one returned."""
    one = [tensors(groups=groups) for _ in range(3)]
    two = [tensors(groups=groups) for _ in range(3)]
    for layers in (one, two):
        layers[1][2][0, :, 5] = 7
        layers[2][3][1] = 4
    first, used = torch.tensor([4, 4], dtype=torch.int32), [one[0][5]] * 3
    for width in (9, 5):
        sets = [[layer[i][..., :width] if i == 2 else layer[i].clamp(max=width) for layer in two] for i in (2, 3)]
        pools = [[layer[i] for layer in two] for i in (0, 1)]
        seqused, freed = zk.compact_paged_kv_(*pools, *sets, one[0][4], used, first_writable=first)
        for i, (k, v, *_, table, _) in enumerate(one):
            alone = zk.compact_paged_kv_(k, v, sets[0][i], sets[1][i], table, used[i], first_writable=first)
            for got, wanted in zip((seqused[i], freed[i], *two[i][:2]), (*alone, k, v), strict=True):
                assert torch.equal(got, wanted)
        used = seqused.unbind()
    assert seqused.shape == ((3, 2) if groups == 1 else (3, 2, groups))


def test_catches_writes_to_protected_rows():
    def unprotected(*args, first_writable=None, **options):
        return zk.compact_paged_kv_(*args, **options)

    with pytest.raises(AssertionError, match="rows before first_writable"):
        check_compact_paged_kv(unprotected, derandomize=True)


def test_catches_a_forgotten_page():
    def forgets(*args, **options):
        seqused, freed = zk.compact_paged_kv_(*args, **options)
        return seqused, (freed - 1).clamp(min=0)

    with pytest.raises(AssertionError, match="freed"):
        check_compact_paged_kv(forgets, derandomize=True)


NAMES = ("k_cache", "v_cache", "indices", "counts", "block_table", "seqused_k")
GOOD = dict(zip(NAMES, tensors(), strict=True))
k, v, indices, counts, table, used = GOOD.values()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, "layout: .*'NHD' or 'HND'", {"layout": "nhd"}),
        (ValueError, r"k_cache: .*\[num_blocks, block_size, Hkv, D\].*\[4, 2, 4\]", {"k_cache": k[0]}),
        (ValueError, r"k_cache: .*\[num_blocks, Hkv, block_size, D\].*\[4, 2, 4\]", {"k_cache": k[0], "layout": "HND"}),
        (TypeError, "k_cache: .*int64", {"k_cache": k.long()}),
        (ValueError, r"k_cache: .*at least one block.*\[0, 4, 2, 4\]", {"k_cache": k[:0]}),
        (ValueError, r"v_cache: .*shape of k_cache.*\[6, 4, 2, 4\]", {"v_cache": v[1:]}),
        (ValueError, "v_cache: .*buffer of its own.*k_cache", {"v_cache": k}),
        (TypeError, "v_cache: expected a .*Tensor.*NoneType", {"v_cache": None}),
        (ValueError, "v_cache: .*expanded", {"v_cache": v[:1].expand(7, 4, 2, 4)}),
        (TypeError, "indices: .*int32.*int64", {"indices": indices.long()}),
        (ValueError, r"indices: .*\[2, 1, 9\] or \[2, 2, 9\].*\[2, 3, 9\]", {"indices": indices.repeat(1, 3, 1)}),
        (ValueError, r"counts: .*\[2, 1\].*\[2, 2\]", {"counts": counts.expand(2, 2)}),
        (ValueError, r"block_table: .*\[B, max_blocks\].*\[6\]", {"block_table": table.flatten()}),
        (TypeError, "block_table: .*int32.*int64", {"block_table": table.long()}),
        (ValueError, r"seqused_k: .*\[2\] or \[2, 1\].*\[2, 2\]", {"seqused_k": used[:, None].expand(2, 2)}),
        (TypeError, "first_writable: .*int", {"first_writable": 0}),
        (ValueError, r"first_writable: .*\[2\].*\[1\]", {"first_writable": used[:1]}),
        (RuntimeError, "backend='cuda'.*compact_paged_kv_", {"backend": "cuda"}),
    ],
)
def test_errors_before_anything_is_written(error, match, changed):
    before = k.clone(), v.clone()
    with pytest.raises(error, match=match):
        zk.compact_paged_kv_(**GOOD | changed)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "v_cache: .*sequence of tensors like k_cache", {"v_cache": v}),
        (ValueError, "counts: .*as many as k_cache has, got 1", {"counts": [counts]}),
        (ValueError, "block_table: .*as many as k_cache has, got 3", {"block_table": [table] * 3}),
        (TypeError, "seqused_k: .*sequence.*int", {"seqused_k": 3}),
        (ValueError, r"seqused_k\[1\]: .*shape.*\[2, 1\]", {"seqused_k": [used, used[:, None]]}),
        (ValueError, r"k_cache\[1\]: .*got the same tensor as k_cache\[0\]", {"k_cache": [k, k]}),
        (ValueError, "layout: ", {"layout": "nhd"}),
    ],
)
def test_errors_of_layers(error, match, changed):
    pools = {"k_cache": [k, k.clone()], "v_cache": [v, v.clone()]}
    given = GOOD | pools | {"indices": [indices] * 2, "counts": [counts] * 2} | changed
    with pytest.raises(error, match=match):
        zk.compact_paged_kv_(**given)


def test_checking_names_the_layer(monkeypatch):
    monkeypatch.setenv("ZIPVL_CHECK", "1")
    lists = {"k_cache": [k, k.clone()], "v_cache": [v, v.clone()], "counts": [counts] * 2}
    given = GOOD | lists | {"indices": [indices, indices.flip(2)], "first_writable": torch.tensor([4, 4]).int()}
    with pytest.raises(ValueError, match=r"layer 1: indices: sequence 0, group 0"):
        zk.compact_paged_kv_(**given)


@pytest.mark.parametrize("groups", [1, 2])
def test_registration_of_layers(groups):
    lists = [[x, x.clone()] for x in tensors("HND", torch.float32, groups)]
    arguments = (*lists, "HND", torch.tensor([4, 4], dtype=torch.int32), "auto")
    torch.library.opcheck(torch.ops.zipvl.compact_paged_kv_layers_.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_of_layers(backend):
    compiled = torch.compile(zk.compact_paged_kv_, fullgraph=True, backend=backend)
    a, b = ([[x, x.clone()] for x in tensors()[:4]] for _ in range(2))
    for got, want in zip(
        (*compiled(*a, table, used), *a[0]), (*zk.compact_paged_kv_(*b, table, used), *b[0]), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_registration(dtype, groups):
    arguments = (*tensors("HND", dtype, groups), "HND", torch.tensor([4, 4], dtype=torch.int32), "auto")
    torch.library.opcheck(torch.ops.zipvl.compact_paged_kv_.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    compiled = torch.compile(zk.compact_paged_kv_, fullgraph=True, backend=backend)
    a, b = tensors(), tensors()
    for got, want in zip((*compiled(*a), *a[:2]), (*zk.compact_paged_kv_(*b), *b[:2]), strict=True):
        assert torch.equal(got, want)
