"""Scores and sparse attention over pages: property checks, the bits of one buffer, chunks, errors, registration."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import zipvl_reference
from zipvl_reference.pages import in_rows
from zipvl_reference.testing import check_paged_score_tokens, check_paged_sparse_attention
from zipvl_reference.testing.budget import assert_same_bits

import zipvl_kernels as zk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def over_pages(page, layout, device=DEVICE, *, M=12, used=(22, 17), dtype=torch.float32):
    """`q`, two pools that are the halves of one tensor, and the arguments that say where sequences are in them.

    Two sequences of `used` rows, 4 and 2 heads of 16; rows and pages that are not used hold NaN.
    """
    random = torch.Generator().manual_seed(0)
    blocks, Hkv, D = -(-max(used) // page), 2, 16
    pools = torch.full((2, 2 * blocks + 2, page, Hkv, D), torch.nan, dtype=dtype)
    table = torch.randperm(2 * blocks + 2, generator=random)[: 2 * blocks].view(2, blocks)
    for b, length in enumerate(used):
        j = torch.arange(length)
        pools[:, table[b, j // page], j % page] = torch.randn(2, length, Hkv, D, generator=random).to(dtype)
        table[b, -(-length // page) :] = 2**31 - 1
    if layout == "HND":
        pools = pools.transpose(2, 3).contiguous()
    q = torch.randn(2, 2 * Hkv, M, D, generator=random).to(dtype)
    where = {"seqused_k": torch.tensor(used, dtype=torch.int32), "block_table": table.int()}
    where = {name: x.to(device) for name, x in where.items()}
    return q.to(device), pools.to(device).unbind(), where | {"layout": layout}


def in_one_buffer(pools, paged):
    """Keys and values `[B, Hkv, N, D]`."""
    return [in_rows(pool, paged["block_table"], paged["layout"]) for pool in pools]


def set_over_pages():
    """`indices` and `counts` for the sequences of `over_pages`."""
    indices = torch.full((2, 1, 24), -1, dtype=torch.int32)
    indices[0, 0, :8] = torch.tensor([0, 3, 9, 10, 13, 17, 18, 21], dtype=torch.int32)
    indices[1, 0, :5] = torch.tensor([2, 6, 7, 15, 16], dtype=torch.int32)
    return indices.to(DEVICE), torch.tensor([[8], [5]], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract_of_scores(package, dtype):
    check_paged_score_tokens(package.score_tokens, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton_of_scores(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.score_tokens, backend="triton")
    sizes = (1, 3, 16)
    check_paged_score_tokens(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=5, block_sizes=sizes)


def test_contract_triton_and_several_tiles_of_scores():
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.score_tokens").launch

    def fn(
        q, k, probe_rows, *, q_start=None, leftpad_k=None, seqused_k=None, pool="layer", block_table=None, layout="NHD"
    ):
        k = k.transpose(1, 2) if layout == "NHD" else k
        where = q_start, leftpad_k, seqused_k
        return launch(q, k, probe_rows, None, *where, pool, 16, 16, 4, 1, 12, 6, block_table=block_table)

    check_paged_score_tokens(fn, device=DEVICE, derandomize=True, max_examples=5, block_sizes=(1, 3, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 3, 24])
def test_pages_give_the_bits_of_one_buffer_of_scores(page, layout, backend):
    q, pools, paged = over_pages(page, layout, DEVICE)
    (k, _), used = in_one_buffer(pools, paged), paged["seqused_k"]
    options = {"leftpad_k": torch.tensor([0, 5], dtype=torch.int32, device=DEVICE), "backend": backend}
    probes = torch.tensor([[1, 8, 11], [0, 3, 11]], dtype=torch.int32, device=DEVICE)
    got = zk.score_tokens(q, pools[0], probes, **paged, **options)
    wanted = zk.score_tokens(q, k, probes, q_start=used - q.shape[2], seqused_k=used, **options)
    for name, x, y in zip(("accumulated", "normalized"), got, wanted, strict=True):
        assert_same_bits(name, x, y)
        assert x.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_are_not_there_of_scores(backend):
    """Nothing outside of the pool is read, and what a sequence gets does not depend on another one's table."""
    q, pools, paged = over_pages(4, "NHD", DEVICE)
    probes = torch.tensor([1, 11], dtype=torch.int32, device=DEVICE)
    wanted = zk.score_tokens(q, pools[0], probes, **paged, backend=backend)
    for number in (2**31 - 1, -(2**31), -1):
        paged["block_table"][0], paged["seqused_k"][0] = number, 2**31 - 1
        got = zk.score_tokens(q, pools[0], probes, **paged, backend=backend)
        for name, x, y in zip(("accumulated", "normalized"), got, wanted, strict=True):
            assert_same_bits(name, x[1], y[1])


def test_scores_of_chunks_add_up_to_one_prefill():
    """Probes stand at their places in the prompt; those of another chunk are outside of the rows and do not count."""
    q, pools, paged = over_pages(4, "NHD", "cpu", M=22, used=(22, 22))
    probes = torch.tensor([2, 7, 11, 12, 20, 21], dtype=torch.int32)
    wanted, _ = zk.score_tokens(q, pools[0], probes, **paged)
    total = torch.zeros_like(wanted)
    for begin, end in ((0, 8), (8, 12), (12, 13), (13, 22)):
        used = torch.full((2,), end, dtype=torch.int32)
        total += zk.score_tokens(q[:, :, begin:end], pools[0], probes - begin, **paged | {"seqused_k": used})[0]
    torch.testing.assert_close(total, wanted)


def test_catches_pages_in_the_wrong_order_of_scores():
    def reads_backwards(q, k, probe_rows, *, block_table, **options):
        return zipvl_reference.score_tokens(q, k, probe_rows, block_table=block_table.flip(1), **options)

    with pytest.raises(AssertionError, match="accumulated"):
        check_paged_score_tokens(reads_backwards, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [zk, zipvl_reference], ids=lambda p: p.__name__)
def test_contract_of_attention(package, dtype):
    check_paged_sparse_attention(package.sparse_attention, dtype=dtype, derandomize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_triton_of_attention(dtype):
    pytest.importorskip("triton")
    fn = partial(zk.sparse_attention, backend="triton")
    sizes = (1, 3, 16)
    check_paged_sparse_attention(fn, device=DEVICE, dtype=dtype, derandomize=True, max_examples=5, block_sizes=sizes)


def test_contract_triton_and_several_tiles_of_attention():
    pytest.importorskip("triton")
    launch = importlib.import_module("zipvl_kernels._triton.sparse_attention").launch

    def fn(q, k, v, indices, counts, *, q_start=None, kv_compacted=False, seqused_k=None, block_table=None, layout=""):
        k, v = (x.transpose(1, 2) if layout == "NHD" else x for x in (k, v))
        tiles = 16, 16, 4, 2
        return launch(q, k, v, indices, counts, None, q_start, kv_compacted, *tiles, None, None, seqused_k, block_table)

    check_paged_sparse_attention(fn, device=DEVICE, derandomize=True, max_examples=5, block_sizes=(1, 3, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_compacted", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 3, 24])
def test_pages_give_the_bits_of_one_buffer_of_attention(page, layout, kv_compacted, backend):
    """Also where the first rows are taken for a compacted set."""
    q, pools, paged = over_pages(page, layout, DEVICE)
    k, v = in_one_buffer(pools, paged)
    indices, counts = set_over_pages()
    indices, options = indices[..., : k.shape[2]], {"kv_compacted": kv_compacted, "backend": backend}
    out = zk.sparse_attention(q, *pools, indices, counts, **paged, **options)
    start = paged["seqused_k"] - q.shape[2]
    assert_same_bits("out", out, zk.sparse_attention(q, k, v, indices, counts, q_start=start, **options))
    assert out.isfinite().all()
    rows = torch.tensor([0, 3, 7, 8, 11])
    kept = torch.zeros(12, dtype=torch.bool).index_fill_(0, rows, True)
    assert out[0].any(-1).cpu().equal(kept.expand(4, 12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_compacted", [False, True])
def test_pages_that_are_not_there_of_attention(backend, kv_compacted):
    """Nothing outside of the pool is read, and what a sequence gets does not depend on another one's table or set."""
    q, pools, paged = over_pages(4, "NHD", DEVICE)
    indices, counts = set_over_pages()
    options = {"kv_compacted": kv_compacted, "backend": backend}
    wanted = zk.sparse_attention(q, *pools, indices, counts, **paged, **options)
    for number in (2**31 - 1, -(2**31), -1):
        paged["block_table"][0], paged["seqused_k"][0] = number, 2**31 - 1
        out = zk.sparse_attention(q, *pools, indices, counts, **paged, **options)
        assert_same_bits("out", out[1], wanted[1])
        indices[0, 0, 5], counts[0] = number, 2**31 - 1
        out = zk.sparse_attention(q, *pools, indices, counts, **paged, **options)
        assert_same_bits("out", out[1], wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_chunks_is_that_of_one_prefill(backend):
    """Each sees the keys before it in the pages; with every column in the set it is dense causal attention."""
    q, pools, paged = over_pages(4, "HND", DEVICE, M=22, used=(22, 22))
    everything = torch.arange(22, dtype=torch.int32, device=DEVICE).expand(2, 1, 22)
    sets = set_over_pages(), (everything, torch.full((2, 1), 22, dtype=torch.int32, device=DEVICE))
    for indices, counts in sets:
        whole = zk.sparse_attention(q, *pools, indices, counts, **paged, backend=backend)
        for begin, end in ((0, 8), (8, 12), (12, 13), (13, 22)):
            used = torch.full((2,), end, dtype=torch.int32, device=DEVICE)
            arguments = q[:, :, begin:end], *pools, indices, (indices < end).logical_and(indices >= 0).sum(-1).int()
            chunk = zk.sparse_attention(*arguments, **paged | {"seqused_k": used}, backend=backend)
            torch.testing.assert_close(chunk, whole[:, :, begin:end])
    k, v = (x[:, :, :22] for x in in_one_buffer(pools, paged))
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_catches_pages_in_the_wrong_order_of_attention():
    def reads_backwards(q, k, v, indices, counts, *, block_table, **options):
        return zipvl_reference.sparse_attention(q, k, v, indices, counts, block_table=block_table.flip(1), **options)

    with pytest.raises(AssertionError, match="out"):
        check_paged_sparse_attention(reads_backwards, derandomize=True)


q, (k, v), where = over_pages(4, "NHD", "cpu")
rows = torch.tensor([1, 5], dtype=torch.int32)
indices, counts = (x.cpu() for x in set_over_pages())
SCORES = {"q": q, "k": k, "probe_rows": rows, **where}
ATTENTION = {"q": q, "k": k, "v": v, "indices": indices, "counts": counts, **where}


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"k: .*\[num_blocks, block_size, Hkv, D\].*\[14, 4, 2\]", {"k": k[..., 0]}),
        (ValueError, r"k: .*at least one block.*\[0, 4, 2, 16\]", {"k": k[:0]}),
        (ValueError, r"k: .*divides the 4 heads of q.*\[14, 4, 3, 16\]", {"k": k[:, :, [0, 1, 1]]}),
        (ValueError, r"k: .*D = 16.*\[14, 4, 2, 8\]", {"k": k[..., :8]}),
        (TypeError, "block_table: .*int32.*int64", {"block_table": where["block_table"].long()}),
        (ValueError, r"block_table: .*\[2, 6\].*\[1, 6\]", {"block_table": where["block_table"][:1]}),
        (ValueError, r"seqused_k: expected int32 \[B\] with a block_table, got None", {"seqused_k": None}),
        (ValueError, r"seqused_k: .*\[2\].*\[2, 2\]", {"seqused_k": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "layout: .*'NHD' or 'HND'.*'BHND'", {"layout": "BHND"}),
        (ValueError, "cu_seqlens: expected None with a block_table", {"cu_seqlens": rows, "max_seqlen": 3}),
    ],
)
def test_errors_of_scores(error, match, changed):
    with pytest.raises(error, match=match):
        zk.score_tokens(**SCORES | changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"max_blocks": 0}])
def test_empty_of_scores(sizes, backend):
    B, M, max_blocks = (sizes.get(name, n) for name, n in (("B", 2), ("M", 12), ("max_blocks", 6)))
    table, used = (where[name][:B].to(DEVICE) for name in ("block_table", "seqused_k"))
    given = (q[:B, :, :M].to(DEVICE), k.to(DEVICE), rows.to(DEVICE))
    for x in zk.score_tokens(*given, seqused_k=used, block_table=table[:, :max_blocks], backend=backend):
        assert x.shape == (B, 1, max_blocks * 4)
        assert not x.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_registration_of_scores(dtype, layout):
    q, (k, _), paged = over_pages(4, layout, "cpu", dtype=dtype)
    positions = paged["seqused_k"], "kv_head", "auto", None, None, paged["block_table"], layout
    arguments = (q, k, rows, 0.5, None, None, *positions)
    torch.library.opcheck(torch.ops.zipvl.score_tokens.default, arguments)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"v: .*shape of k.*\[13, 4, 2, 16\]", {"v": v[:13]}),
        (ValueError, r"k: .*divides the 4 heads of q.*\[14, 4, 3, 16\]", dict.fromkeys("kv", k[:, :, [0, 1, 1]])),
        (ValueError, r"indices: .*\[B, G, W\].*\[2, 24\]", {"indices": indices[:, 0]}),
        (ValueError, r"counts: .*\[2, 1\].*\[2\]", {"counts": counts[:, 0]}),
        (ValueError, r"block_table: .*\[2, 6\].*\[1, 6\]", {"block_table": where["block_table"][:1]}),
        (ValueError, r"seqused_k: expected int32 \[B\] with a block_table, got None", {"seqused_k": None}),
        (ValueError, r"seqused_k: .*\[2\].*\[2, 2\]", {"seqused_k": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "layout: .*'NHD' or 'HND'.*'BHND'", {"layout": "BHND"}),
        (ValueError, "cu_seqlens: expected None with a block_table", {"cu_seqlens": counts[:, 0], "max_seqlen": 3}),
        (
            ValueError,
            "seqused_k: expected None without a block_table",
            {
                "k": in_rows(k, where["block_table"], "NHD"),
                "v": in_rows(v, where["block_table"], "NHD"),
                "block_table": None,
            },
        ),
    ],
)
def test_errors_of_attention(error, match, changed):
    with pytest.raises(error, match=match):
        zk.sparse_attention(**ATTENTION | changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_compacted", [False, True])
@pytest.mark.parametrize("sizes", [{"B": 0}, {"M": 0}, {"max_blocks": 0}, {"W": 0}])
def test_empty_of_attention(sizes, kv_compacted, backend):
    B, M, max_blocks, W = (sizes.get(name, n) for name, n in (("B", 2), ("M", 12), ("max_blocks", 6), ("W", 24)))
    cut = {"q": q[:B, :, :M], "block_table": where["block_table"][:, :max_blocks], "indices": indices[..., :W]}
    names = ("indices", "counts", "block_table", "seqused_k")
    given = ATTENTION | cut
    given |= {name: given[name][:B] for name in names}
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    out = zk.sparse_attention(**given, kv_compacted=kv_compacted, backend=backend)
    assert out.shape == (B, 4, M, 16)
    assert sizes in ({"B": 0}, {"M": 0}) or not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_registration_of_attention(dtype, layout):
    q, pools, paged = over_pages(4, layout, "cpu", dtype=dtype)
    rest = None, False, "auto", None, None, paged["seqused_k"], paged["block_table"], layout
    torch.library.opcheck(torch.ops.zipvl.sparse_attention.default, (q, *pools, indices, counts, 0.5, *rest))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    for fn, given in ((zk.score_tokens, SCORES), (zk.sparse_attention, ATTENTION)):
        got, wanted = torch.compile(fn, fullgraph=True, backend=backend)(**given), fn(**given)
        for x, y in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, wanted)), strict=True):
            assert torch.equal(x, y)
