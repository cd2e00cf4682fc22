"""CUDA C kernels, packed and not, run by the CPU: the launchers as they are, over a driver that tests/cuda_on_cpu is.

What this cannot show: speed, races, and what tensor cores and bulk copies do differently from their stand-ins.
"""

import ctypes
import functools
import mmap
import shutil
import struct

import pytest
import torch
import zipvl_reference
from cuda_over_nothing import OPTIONS
from zipvl_reference.testing.budget import assert_same_bits

from zipvl_kernels._cuda.packed import fewest, ways

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LENGTHS = (300, 0, 1, 129, 70)
D = 64

LOOK_UP = """
#include "packed.cuh"

struct Params {
    Packing all;
    Places places;
    int count;
    int* found;  // [count, 4]: sequence, the place in it, first row, rows
};

void look_up(Params p) {
    for (int i = 0; i < p.count; ++i) {
        int b = sequence_at(p.all, p.places, i);
        Span span = span_of(p.all, b);
        int found[4] = {b, i - first_place(p.all, p.places, b), span.first, span.rows};
        memcpy(p.found + 4 * i, found, sizeof found);
    }
}
"""


def look_up(compiled, bounds, T, most, count, every, apart):
    """What packed.cuh finds for each place."""
    found = torch.full((count, 4), -7, dtype=torch.int32)
    packing = bounds.data_ptr(), len(bounds) - 1, T, most, every, apart, count, found.data_ptr()
    parameters = ctypes.create_string_buffer(struct.pack("=Q3i4x2ii4xQ", *packing))
    compiled("look_up", (("PACKED", 1),), LOOK_UP).run_look_up(1, 32, parameters)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_every_sequence_has_its_places(compiled, seed):
    """As many as it needs, in order, whatever the lengths."""
    random = torch.Generator().manual_seed(seed)
    tile, longest = 128, [1, 5, 40][seed % 3]
    lengths = torch.randint(0, longest * tile + 1, (1 + 7 * seed,), generator=random, dtype=torch.int32)
    lengths[torch.rand(len(lengths), generator=random) < 0.2] = 0
    sizes = [0, *torch.randint(1, 50, (longest,), generator=random).tolist()]  # places by the tiles of a sequence
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    T, most = int(bounds[-1]), longest * tile
    found_ways = ways(sizes, tile)
    assert found_ways
    for every, apart in found_ways:
        count = T // every + len(lengths) * apart
        assert fewest(found_ways, T, len(lengths))[0] <= count
        found = look_up(compiled, bounds, T, most, count, every, apart)
        wanted = 0
        for b, n in enumerate(lengths.tolist()):
            places = found[found[:, 0] == b]
            assert places[:, 1].tolist() == list(range(len(places)))
            assert len(places) >= sizes[-(-n // tile)]
            assert (places[:, 2] == bounds[b]).all()
            assert (places[:, 3] == n).all()
            wanted += len(places)
        assert wanted == count


@pytest.mark.parametrize("seed", range(5))
def test_no_bounds_lead_out_of_the_rows(compiled, seed):
    random = torch.Generator().manual_seed(seed)
    bounds = torch.randint(-(2**31), 2**31 - 1, (40,), generator=random, dtype=torch.int64).int()
    bounds[::3] = torch.randint(-50, 1500, bounds[::3].shape, generator=random, dtype=torch.int32)
    found = look_up(compiled, bounds, 1000, 300, 1000 // 32 + 39, 32, 1)
    b, place, first, rows = found.T
    assert ((b >= 0) & (b < 39)).all()
    assert ((first >= 0) & (rows >= 0) & (first + rows <= 1000) & (rows <= 300)).all()
    assert (place <= 1000 // 32 + 39).all()


def packed(lengths, Hq, Hkv, dtype=torch.float16, seed=0):
    """q, k, v as parts of one tensor, with rows of no sequence behind them, and where sequences begin and end."""
    random = torch.Generator().manual_seed(seed)
    fused = torch.randn(sum(lengths) + 3, Hq + 2 * Hkv, D, generator=random).to(dtype)
    fused[sum(lengths) :] = torch.nan
    q, k, v = fused.split((Hq, Hkv, Hkv), dim=1)
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def spans(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [(b, slice(first, first + n)) for b, (first, n) in enumerate(zip(starts, lengths, strict=False)) if n]


def batch(x, span):
    """`[1, H, n, D]` of one sequence of `x [T, H, D]`."""
    return x[span].transpose(0, 1)[None]


def test_probe_rows(on_cpu):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    for num_recent, num_random in ((64, 64), (3, 200), (0, 5)):
        options = {"num_recent": num_recent, "num_random": num_random, "seed": 7}
        found = on_cpu.probe_rows.probe_rows(250, **options, cu_seqlens=bounds)
        assert torch.equal(found, zipvl_reference.probe_rows(250, **options, cu_seqlens=bounds))
        assert torch.equal(on_cpu.probe_rows.probe_rows(250, **options), zipvl_reference.probe_rows(250, **options))


@pytest.mark.parametrize("options", [{"tau": 0.8}, {"keep_ratio": 0.4, "keep_first": 3}], ids=str)
def test_select_tokens(on_cpu, options):
    random = torch.Generator().manual_seed(1)
    bounds, T = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32), sum(LENGTHS)
    scores = torch.randn(2, 2, T, generator=random).mul(2).exp().transpose(0, 1)
    where = {"cu_seqlens": bounds, "max_seqlen": 200}  # the longest one is cut
    given = {"tau": None, "keep_ratio": None, "keep_first": 0, "keep_recent": 1, **options}
    padding = {"leftpad_k": None, "seqused_k": None}
    indices, counts = on_cpu.select_tokens.launch(scores[0], scores[1], **given, **padding, **where, threads=64)
    wanted = zipvl_reference.select_tokens(scores[0], scores[1], **options, **where)
    assert torch.equal(counts, wanted[1])
    for _, span in spans(LENGTHS):
        used = slice(span.start, min(span.stop, span.start + 200))
        assert torch.equal(indices[:, used], wanted[0][:, used])


@pytest.mark.parametrize(
    ("Hq", "Hkv", "pool", "shares"),
    [(4, 2, "layer", None), (6, 2, "layer", (2, 2, 3)), (2, 2, "kv_head", (1, 2, 1))],
    ids=str,
)
def test_score_tokens(on_cpu, Hq, Hkv, pool, shares):
    q, k, _, bounds = packed(LENGTHS, Hq, Hkv)
    rows = zipvl_reference.probe_rows(max(LENGTHS), num_recent=20, num_random=120, cu_seqlens=bounds)
    launch = functools.partial(on_cpu.score_tokens.launch, scale=None, q_start=None, leftpad_k=None, seqused_k=None)
    many = launch(q, k, rows, pool=pool, shares=shares, cu_seqlens=bounds, max_seqlen=max(LENGTHS))
    for b, span in spans(LENGTHS):
        alone = launch(batch(q, span), batch(k, span), rows[b], pool=pool, shares=shares)
        wanted = zipvl_reference.score_tokens(batch(q, span).float(), batch(k, span).float(), rows[b], pool=pool)
        for name, x, y, z in zip(("accumulated", "normalized"), many, alone, wanted, strict=True):
            assert_same_bits(f"{name} of sequence {b}", x[:, span], y[0])
            torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("number", [2**31 - 1, 2**31 - 130, -(2**31)])
def test_score_tokens_with_padding_that_cannot_be(on_cpu, number):
    """Nobody waits for keys that nobody loads, and nothing is written but zeros."""
    q, k = (torch.randn(2, 2, 300, D, generator=torch.Generator().manual_seed(0)).half() for _ in range(2))
    leftpad, rows = torch.tensor([number, 0], dtype=torch.int32), torch.tensor([3, 150, 299], dtype=torch.int32)
    for pool in ("layer", "kv_head"):
        scores = on_cpu.score_tokens.launch(q, k, rows, None, None, leftpad, None, pool)
        wanted = zipvl_reference.score_tokens(q.float(), k.float(), rows, leftpad_k=leftpad.clamp(0, 300), pool=pool)
        for got, want in zip(scores, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("Hq", "Hkv", "G"), [(2, 1, 1), (4, 2, 2)])
def test_sparse_attention(on_cpu, Hq, Hkv, G):
    q, k, v, bounds = packed(LENGTHS, Hq, Hkv)
    indices = torch.full((G, len(q)), 99, dtype=torch.int32)
    counts = torch.zeros(len(LENGTHS), G, dtype=torch.int32)
    for b, span in spans(LENGTHS):
        for g in range(G):
            kept = torch.arange(g % 2, LENGTHS[b], 2, dtype=torch.int32)
            indices[g, span.start : span.start + len(kept)], counts[b, g] = kept, len(kept)
    where = {"cu_seqlens": bounds, "max_seqlen": max(LENGTHS)}
    many = on_cpu.sparse_attention.sparse_attention(q, k, v, indices, counts, kv_compacted=True, **where)
    assert many.is_contiguous()
    for b, span in spans(LENGTHS):
        x, set_of = [batch(x, span) for x in (q, k, v)], (indices[None, :, span], counts[b : b + 1])
        alone = on_cpu.sparse_attention.sparse_attention(*x, *set_of, kv_compacted=True)
        wanted = zipvl_reference.sparse_attention(*(x.float() for x in x), *set_of, kv_compacted=True)
        assert_same_bits(f"sequence {b}", batch(many, span), alone)
        torch.testing.assert_close(alone.float(), wanted, rtol=5e-3, atol=2e-3)


def test_sparse_attention_of_a_chunk_reads_its_sets_alone(on_cpu):
    """Behind them is memory that cannot be read."""
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(size), 0) == 0
    indices = torch.frombuffer(memory, dtype=torch.int32, count=2 * 64, offset=size - 4 * 2 * 64).view(2, 1, 64)
    indices.copy_(torch.arange(64))
    q, k = (torch.randn(2, 2, n, D, generator=torch.Generator().manual_seed(n)).half() for n in (20, 64))
    counts, starts = torch.full((2, 1), 64, dtype=torch.int32), torch.tensor([10, 44], dtype=torch.int32)
    got = on_cpu.sparse_attention.launch(q, k, k, indices, counts, None, starts)
    wanted = zipvl_reference.sparse_attention(q, k, k, indices, counts, q_start=starts, kv_compacted=True)
    torch.testing.assert_close(got, wanted, rtol=5e-3, atol=2e-3)


def caches(lengths, Hq, M, *, head_dim=D, capacity=1100, dtype=torch.float16):
    """New rows, keys and values of two heads, and how many of a sequence's rows are used: behind them is NaN."""
    random = torch.Generator().manual_seed(0)
    shapes = ((M, Hq), (capacity, 2), (capacity, 2))
    q, k, v = (torch.randn(len(lengths), *shape, head_dim, generator=random).transpose(1, 2) for shape in shapes)
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    return *(x.to(dtype) for x in (q, k, v)), torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize(("Hq", "M", "dtype"), [(2, 1, torch.float16), (14, 1, torch.bfloat16), (8, 4, torch.float16)])
def test_decode_attention(on_cpu, Hq, M, dtype):
    """Sequences that end in a first and in a third split, within a tile, and before they begin."""
    q, k, v, used = caches((1100, 70, 0, 3, 513), Hq, M, dtype=dtype)
    decode = functools.partial(on_cpu.decode_attention.decode_attention, return_lse=True)
    found = decode(q, k, v, used)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    wanted = zipvl_reference.decode_attention(*(x.nan_to_num(0).float() for x in (q, k, v)), used, return_lse=True)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=tolerance, atol=tolerance)
    for b in range(len(used)):
        one = slice(b, b + 1)
        for x, y in zip(found, decode(q[one], k[one], v[one], used[one]), strict=True):
            assert_same_bits(f"sequence {b}", x[one], y)
    each = used[:, None].expand(-1, 2).contiguous()  # of each head
    assert_same_bits("lengths by head", decode(q, k, v, each)[0], found[0])


def paged(x, page, layout, table):
    """The rows of `x [B, H, N, D]` in the pages that the table names; two pages more hold infinity."""
    B, H, N, width = x.shape
    pool = torch.full((B * N // page + 2, page, H, width), torch.inf, dtype=x.dtype)
    pool[table.long()] = x.transpose(1, 2).unflatten(1, (N // page, page))
    return pool if layout == "NHD" else pool.transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    ("page", "layout", "head_dim"),
    [(16, "NHD", 128), (16, "HND", 64), (32, "NHD", 64), (64, "HND", 128), (128, "NHD", 64), (256, "HND", 64)],
)
def test_decode_attention_over_pages(on_cpu, page, layout, head_dim):
    """The bits of one buffer; a table that names pages outside of the pool, and unused ones, changes nothing."""
    lengths = (1100, 70, 0, 513)
    q, k, v, used = caches(lengths, 6, 2, head_dim=head_dim, capacity=1280)
    decode = functools.partial(on_cpu.decode_attention.decode_attention, return_lse=True)
    found = decode(q, k, v, used)
    blocks, random = 1280 // page, torch.Generator().manual_seed(page)
    table = torch.randperm(len(lengths) * blocks + 2, generator=random)[: len(lengths) * blocks].int().view(-1, blocks)
    where = {"layout": layout}
    pools = [paged(x, page, layout, table) for x in (k, v)]
    for b, n in enumerate(lengths):
        table[b, -(-n // page) :] = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)[b % 3]
    wide = torch.stack([table.T, torch.full_like(table.T, -7)], 1)  # [blocks, 2, B]
    for same in (table, wide[:, 0].T):
        over_pages = decode(q, *pools, used, block_table=same, **where)
        for name, x, y in zip(("out", "lse"), over_pages, found, strict=True):
            assert_same_bits(name, x, y)
    one = [x[3:].expand(2, *x.shape[1:]) for x in (table, used)]  # two sequences of the same pages
    assert_same_bits(
        "twice", decode(q[3:].expand(2, -1, -1, -1), *pools, one[1], block_table=one[0], **where)[0][1], found[0][3]
    )
    assert not decode(q, *pools, used, block_table=table[:, :0], **where)[0].any()
    table[0], used[0] = 2**31 - 1, 2**31 - 1  # what the first sequence gets is undefined
    for x, y in zip(decode(q, *pools, used, block_table=table, **where), found, strict=True):
        assert_same_bits("the others", x[1:], y[1:])


@pytest.mark.parametrize(("page", "layout", "head_dim"), [(16, "NHD", 64), (64, "HND", 128), (256, "NHD", 64)])
def test_scores_and_attention_over_pages(on_cpu, page, layout, head_dim):
    """The bits of one buffer; what the table, lengths and sets of a sequence say is nothing to the other."""
    lengths, M, capacity = (41, 250), 30, 256
    q, k, v, used = caches(lengths, 4, M, head_dim=head_dim, capacity=capacity)
    blocks, random = capacity // page, torch.Generator().manual_seed(page)
    table = torch.randperm(2 * blocks + 2, generator=random)[: 2 * blocks].int().view(2, blocks)
    pools = [paged(x, page, layout, table) for x in (k, v)]
    for b, n in enumerate(lengths):
        table[b, -(-n // page) :] = (-1, 2**31 - 1)[b]
    score, attend = on_cpu.score_tokens.score_tokens, on_cpu.sparse_attention.sparse_attention
    rows = zipvl_reference.probe_rows(M, num_recent=4, num_random=9)
    where = {"seqused_k": used, "block_table": table, "layout": layout}
    scores = score(q, pools[0], rows, **where)
    in_one_buffer = score(q, k, rows, seqused_k=used, q_start=used - M)
    for name, x, y in zip(("accumulated", "normalized"), scores, in_one_buffer, strict=True):
        assert_same_bits(name, x, y)
    kept = torch.arange(0, capacity, 2, dtype=torch.int32).expand(2, 1, -1)
    sets = kept.clone(), torch.tensor([[21], [125]], dtype=torch.int32)
    out = attend(q, *pools, *sets, kv_compacted=True, **where)
    assert_same_bits("out", out, attend(q, k, v, *sets, kv_compacted=True, q_start=used - M))
    assert out.any()
    narrow = {**where, "block_table": table[:, : -(-125 // page)]}
    assert_same_bits("narrow", attend(q, *pools, *sets, kv_compacted=True, **narrow), out)
    assert not attend(q, *pools, *sets, kv_compacted=True, **{**where, "block_table": table[:, :0]}).any()
    assert score(q, pools[0], rows, **{**where, "block_table": table[:, :0]})[0].shape == (2, 1, 0)
    for number in (2**31 - 1, -(2**31)):
        table[0], used[0], sets[0][0, 0, 3], sets[1][0] = number, number, number, number
        for x, y in zip(score(q, pools[0], rows, **where), scores, strict=True):
            assert_same_bits("scores of the other", x[1], y[1])
        assert_same_bits("out of the other", attend(q, *pools, *sets, kv_compacted=True, **where)[1], out[1])


@pytest.mark.parametrize(
    ("shape", "layout", "width", "why"),
    [
        ((4, 16, 2, 64), "NHD", 8, ""),
        ((4, 2, 16, 64), "HND", 8, ""),
        ((4, 24, 2, 64), "NHD", 8, "k: expected pages of 16, 32, 64, 128, 256 rows, got 24"),
        ((4, 2, 1, 64), "HND", 8, "k: expected pages of 16, 32, 64, 128, 256 rows, got 1"),
        ((4, 256, 2, 64), "NHD", 2**22 + 1, "block_table: expected at most 1073741824 rows of a sequence"),
        ((4, 16, 1, 64), "NHD", 8, "q: expected at most 16 rows"),
    ],
)
def test_pages_that_decode_attention_leaves_to_others(on_cpu, shape, layout, width, why):
    q, pool = torch.zeros(1, 18, 1, 64).half(), torch.zeros(shape).half()
    table = torch.zeros(1, 1, dtype=torch.int32).expand(1, width)
    found = on_cpu.decode_attention.lacks(q, pool, pool, torch.ones(1).int(), block_table=table, layout=layout)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@pytest.mark.parametrize("pool", ["layer", "kv_head"])
def test_zipvl_prefill(on_cpu, pool):
    q, k, v, bounds = packed(LENGTHS, 4, 2)
    options = {**OPTIONS, "tau": 0.7, "num_recent": 20, "num_random": 20, "pool": pool}
    many_k, many_v, where = k.clone(), v.clone(), {"cu_seqlens": bounds, "max_seqlen": max(LENGTHS)}
    out, indices, counts = on_cpu.zipvl_prefill.zipvl_prefill_(q, many_k, many_v, **options, **where)
    for b, span in spans(LENGTHS):
        alone_q, alone_k, alone_v = (batch(x, span).clone() for x in (q, k, v))
        alone = on_cpu.zipvl_prefill.zipvl_prefill_(alone_q, alone_k, alone_v, **options)
        assert torch.equal(counts[b], alone[2][0])
        assert torch.equal(indices[:, span], alone[1][0])
        assert_same_bits(f"out of sequence {b}", batch(out, span), alone[0])
        for h, n in enumerate(counts[b].expand(2).tolist()):
            for name, x, y in (("k", many_k, alone_k), ("v", many_v, alone_v)):
                assert_same_bits(f"kept {name} of sequence {b}", x[span][:n, h], y[0, h, :n])
                assert torch.equal(
                    y[0, h, :n], {"k": k, "v": v}[name][span][indices[h % len(indices), span][:n].long(), h]
                )
