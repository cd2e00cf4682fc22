"""`zipvl_prefill_`: the property check, examples, errors, registration."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import zipvl_reference
from zipvl_reference.testing import check_zipvl_prefill
from zipvl_reference.testing.draw import one_sequence

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(B=2, Hq=4, Hkv=2, M=30, N=30, D=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, M, D, generator=random).to(dtype)
    return (q, *(torch.randn(B, Hkv, N, D, generator=random).to(dtype) for _ in range(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract(package, dtype):
    check_zipvl_prefill(package.zipvl_prefill_, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.zipvl_prefill_, backend="triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_zipvl_prefill(fn, device=device, dtype=dtype, derandomize=True, max_examples=4)


def test_a_sequence_alone_keeps_its_strides():
    """Else a backend that picks its kernel by strides would be compared with another kernel's bits."""
    wide = torch.randn(3, 2, 5, 9)
    x = wide[..., :4]
    (alone,) = one_sequence(1, x)
    assert alone.stride() == x.stride()
    assert torch.equal(alone, x[1:2])
    alone.zero_()
    assert x.all()


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_same_bits_as_the_steps_one_by_one(pool):
    q, k, v = tensors()
    leftpad = torch.tensor([0, 11], dtype=torch.int32)
    rows = zk.probe_rows(30, num_recent=4, num_random=4, seed=3)
    scores = zk.score_tokens(q, k, rows, leftpad_k=leftpad, pool=pool)
    indices, counts = zk.select_tokens(*scores, tau=0.8, keep_recent=2, leftpad_k=leftpad)
    steps_k, steps_v = k.clone(), v.clone()
    zk.compact_kv_(steps_k, steps_v, indices, counts)
    out = zk.sparse_attention(q, steps_k, steps_v, indices, counts, kv_compacted=True)
    options = {"num_recent": 4, "num_random": 4, "seed": 3, "keep_recent": 2, "leftpad_k": leftpad, "pool": pool}
    got = zk.zipvl_prefill_(q, k, v, tau=0.8, **options)
    for a, b in zip((*got, k, v), (out, indices, counts, steps_k, steps_v), strict=True):
        assert torch.equal(a, b)


def test_one_plan_is_taken_where_it_can(monkeypatch):
    module, done = sys.modules["zipvl_kernels.zipvl_prefill"], object()
    q, k, v = tensors()
    for found in (done, "q: too long", ""):
        monkeypatch.setattr(module, "_fused", lambda backend, device, found=found: lambda *_: found)
        got = zk.zipvl_prefill_(q, k.clone(), v.clone())
        assert (got is done) == (found is done)
        assert got is done or got[0].shape == q.shape
    monkeypatch.setattr(module, "_fused", lambda backend, device: lambda *_: "q: too long")
    with pytest.raises(ValueError, match=r"^backend='cuda': q: too long$"):
        zk.zipvl_prefill_(q, k, v, backend="cuda")


def test_everything_kept_is_dense_attention():
    q, k, v = tensors()
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    before = k.clone(), v.clone()
    out, _, counts = zk.zipvl_prefill_(q, k, v, keep_ratio=1.0)
    assert (counts == 30).all()
    torch.testing.assert_close(out, dense)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_keep_ratio_takes_the_place_of_tau():
    _, _, counts = zk.zipvl_prefill_(*tensors(), tau=1.0, keep_ratio=0.2)
    assert (counts == 6).all()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"N": 0}, {"M": 0, "N": 0}])
def test_empty(sizes):
    q, k, v = tensors(**sizes)
    out, indices, counts = zk.zipvl_prefill_(q, k, v)
    assert out.shape == q.shape
    assert not out.any()
    assert indices.shape == (q.shape[0], 1, k.shape[2])
    assert counts.shape == (q.shape[0], 1)


def test_catches_an_unjustified_set():
    def keeps_the_last(q, k, v, **options):
        _, _, counts = zipvl_reference.zipvl_prefill_(q, k.clone(), v.clone(), **options)
        N = k.shape[2]
        column = torch.arange(N, dtype=torch.int32)
        end = torch.full((q.shape[0],), N) if options["seqused_k"] is None else options["seqused_k"]
        indices = torch.where(column < counts[..., None], column + end[:, None, None] - counts[..., None], -1).int()
        zipvl_reference.compact_kv_(k, v, indices, counts)
        out = zipvl_reference.sparse_attention(q, k, v, indices, counts, q_start=options["q_start"], kv_compacted=True)
        return out, indices, counts

    with pytest.raises(AssertionError, match="indices"):
        check_zipvl_prefill(keeps_the_last, derandomize=True)


q, k, v = tensors()


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "q: .*float64", {"q": q.double()}),
        (ValueError, "v: .*buffer of its own", {"v": k}),
        (TypeError, "v: expected a torch.Tensor, got NoneType", {"v": None}),
        (ValueError, "k: .*expanded", {"k": k[:1].expand(2, 2, 30, 8)}),
        (ValueError, "tau: .*1.5", {"tau": 1.5}),
        (TypeError, "tau: .*None", {"tau": None}),
        (ValueError, "keep_ratio: .*0.0", {"keep_ratio": 0.0}),
        (ValueError, "num_recent: .*-1", {"num_recent": -1}),
        (ValueError, "at least one probe", {"num_recent": 0, "num_random": 0}),
        (TypeError, "seed: .*0.5", {"seed": 0.5}),
        (ValueError, "keep_first: .*-1", {"keep_first": -1}),
        (TypeError, "seqused_k: .*int64", {"seqused_k": torch.zeros(2, dtype=torch.int64)}),
        (ValueError, "pool: .*'heads'", {"pool": "heads"}),
        (RuntimeError, "backend='cuda' is not available for", {"backend": "cuda"}),
    ],
)
def test_errors_before_anything_is_written(error, match, changed):
    before = k.clone(), v.clone()
    with pytest.raises(error, match=match):
        zk.zipvl_prefill_(**{"q": q, "k": k, "v": v, **changed})
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_registration(dtype, pool):
    leftpad = torch.tensor([0, 2], dtype=torch.int32)
    arguments = (*tensors(dtype=dtype), 0.9, None, 4, 4, 0, 1, 1, None, None, leftpad, None, pool, "auto")
    torch.library.opcheck(torch.ops.zipvl.zipvl_prefill_.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    def prefill(q, k, v):
        return zk.zipvl_prefill_(q, k, v, tau=0.9, num_recent=4, num_random=4)

    compiled = torch.compile(prefill, fullgraph=True, backend=backend)
    for M in (30, 20):
        a, b = tensors(M=M), tensors(M=M)
        for got, wanted in zip((*compiled(*a), *a), (*prefill(*b), *b), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_same_bits_alone_and_in_a_batch_at_length(dtype, layout):
    def lay(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "transposed" else x.clone()

    q, k, v = tensors(B=3, M=600, N=701, D=64, dtype=dtype)
    leftpad = torch.tensor([0, 300, 17], dtype=torch.int32)
    batch = zk.zipvl_prefill_(lay(q), lay(k), lay(v), leftpad_k=leftpad)
    for b in range(3):
        alone = zk.zipvl_prefill_(*(x[b : b + 1].clone() for x in (q, k, v)), leftpad_k=leftpad[b : b + 1])
        for got, wanted in zip(batch, alone, strict=True):
            assert torch.equal(got[b : b + 1], wanted)
