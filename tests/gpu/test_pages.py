"""Pools of pages: the contract, many tiles that wait for each other, pools beyond 2**31 elements, CUDA graphs."""

import pytest
import torch
from cases import DEVICE, EXAMPLES, HEADS, REAL, D, available, chosen, function, needs_gpu, never_waiting
from zipvl_reference.pages import in_rows
from zipvl_reference.testing import (
    check_compact_paged_kv,
    check_paged_decode_attention,
    check_paged_score_tokens,
    check_paged_sparse_attention,
)
from zipvl_reference.testing.budget import assert_same_bits

import zipvl_kernels as zk

HOPPER = "cuda" in available("score_tokens") and torch.cuda.get_device_capability() == (9, 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if REAL else [torch.float32]
PAGES = (1, 16, 24, 256) if REAL else (1, 3)
compaction = pytest.mark.parametrize("backend", chosen("compact_paged_kv_"))
decoding = pytest.mark.parametrize("backend", chosen("decode_attention"))
scoring = pytest.mark.parametrize("backend", chosen("score_tokens") or ["auto"])
attending = pytest.mark.parametrize("backend", chosen("sparse_attention") or ["auto"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def options(dtype):
    shapes = {"head_dims": (80, 128) if REAL else (16,), "max_tokens": 600 if REAL else 24, "block_sizes": PAGES}
    return {"device": DEVICE, "dtype": dtype, "derandomize": True, "max_examples": EXAMPLES, **shapes}


@dtypes
@compaction
def test_compaction(backend, dtype):
    check_compact_paged_kv(function("compact_paged_kv_", backend), **options(dtype))


@dtypes
@decoding
def test_decoding(backend, dtype):
    check_paged_decode_attention(function("decode_attention", backend), **options(dtype))


@dtypes
@scoring
def test_scores(backend, dtype):
    check_paged_score_tokens(function("score_tokens", backend), **options(dtype))


@dtypes
@attending
def test_sparse(backend, dtype):
    check_paged_sparse_attention(function("sparse_attention", backend), **options(dtype))


@pytest.mark.parametrize("head_dim", [64, 256] if REAL else [24])
@scoring
def test_scores_and_sparse_with_other_head_dims(backend, head_dim):
    few = options(DTYPES[0]) | {"head_dims": (head_dim,), "block_sizes": (16,), "max_examples": 2}
    check_paged_score_tokens(function("score_tokens", backend), **few)
    check_paged_sparse_attention(function("sparse_attention", backend), **few)


def chunk(page, layout, *, N=2880, M=1024, seed=0, dtype=None):
    """Queries, pools, and where the last `M` rows of two sequences are; the second is shorter, and its tail NaN."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    (Hq, Hkv), dtype = HEADS, dtype or (torch.bfloat16 if REAL else torch.float32)
    N, M = (N, M) if REAL else (70, 20)
    blocks = -(-N // page)
    shape = (2, 2 * blocks + 3, page, Hkv, D) if layout == "NHD" else (2, 2 * blocks + 3, Hkv, page, D)
    pools = torch.randn(shape, generator=random, device=DEVICE).to(dtype)
    table = torch.randperm(2 * blocks + 3, generator=random, device=DEVICE)[: 2 * blocks].int().view(2, blocks)
    used = torch.tensor([N, N - N // 3], dtype=torch.int32, device=DEVICE)
    unused = -(-int(used[1]) // page)
    pools[:, table[1, unused:].long()] = torch.nan
    q = torch.randn(2, M, Hq, D, generator=random, device=DEVICE).to(dtype).transpose(1, 2)
    return q, *pools.unbind(), {"seqused_k": used, "block_table": table, "layout": layout}


scoring_kernels = pytest.mark.parametrize("backend", available("score_tokens") or ["auto"])


@scoring_kernels
@dtypes
@pytest.mark.parametrize(("page", "layout"), [(1, "HND"), (16, "NHD"), (24, "HND"), (64, "HND"), (256, "NHD")])
@pytest.mark.parametrize("N", [2880, 32768] if REAL else [70])
def test_scores_and_sparse_give_the_bits_of_one_buffer(backend, N, page, layout, dtype):
    """Of the same kernels: a chunk over pages, as over rows side by side."""
    taken = "cuda" if page % 16 == 0 and dtype != torch.float32 and HOPPER else "triton"
    if backend == "cuda" and taken != "cuda":
        pytest.skip("no kernel of that dtype or page, or for this GPU")
    q, k, v, pages = chunk(page, layout, N=N, dtype=dtype)
    buffers = [in_rows(pool, pages["block_table"], layout) for pool in (k, v)]
    used, start = pages["seqused_k"], pages["seqused_k"] - q.shape[2]
    rows = zk.probe_rows(q.shape[2], num_recent=8, num_random=90 if REAL else 8, device=DEVICE)
    score = function("score_tokens", backend)
    for pool in ("layer", "kv_head"):
        got = score(q, k, rows, pool=pool, **pages)
        wanted = score(q, buffers[0], rows, pool=pool, q_start=start, seqused_k=used)
        for name, x, y in zip(("accumulated", "normalized"), got, wanted, strict=True):
            assert_same_bits(f"{name}, {pool}", x, y)
        sets = zk.select_tokens(*got, tau=0.7, seqused_k=used)
        for kv_compacted in (False, True):
            attend = function("sparse_attention", "triton" if backend == "cuda" and not kv_compacted else backend)
            out = attend(q, k, v, *sets, kv_compacted=kv_compacted, **pages)
            assert out.isfinite().all()
            dense = attend(q, *buffers, *sets, kv_compacted=kv_compacted, q_start=start)
            assert_same_bits(f"out, {pool}", out, dense)
    if REAL and backend == taken:  # the same kernels
        assert_same_bits("accumulated of auto", zk.score_tokens(q, k, rows, pool=pool, **pages)[0], got[0])
        assert_same_bits("out of auto", zk.sparse_attention(q, k, v, *sets, kv_compacted=True, **pages), out)


@scoring
def test_scores_and_sparse_leave_no_bounds(backend):
    """Broken tables, lengths and sets of one sequence read nothing outside, and change nothing of another's."""
    q, k, v, pages = chunk(16, "NHD")
    rows = zk.probe_rows(q.shape[2], num_recent=8, num_random=8, device=DEVICE)
    score, attend = function("score_tokens", backend), function("sparse_attention", backend)
    scores = score(q, k, rows, **pages)
    indices, counts = zk.select_tokens(*scores, tau=0.7, seqused_k=pages["seqused_k"])
    outs = [attend(q, k, v, indices, counts, kv_compacted=x, **pages) for x in (False, True)]
    for number in (2**31 - 1, -(2**31), -1):
        pages["block_table"][0], pages["seqused_k"][0] = number, 2**31 - 1
        indices[0, 0, 3], counts[0] = number, 2**31 - 1
        for x, y in zip(score(q, k, rows, **pages), scores, strict=True):
            assert_same_bits("scores", x[1], y[1])
        for kv_compacted, out in zip((False, True), outs, strict=True):
            again = attend(q, k, v, indices, counts, kv_compacted=kv_compacted, **pages)
            assert_same_bits(f"out, {kv_compacted=}", again[1], out[1])


decoding_kernels = pytest.mark.parametrize("backend", available("decode_attention") or ["auto"])


def newest_rows(page, layout, dtype, M=2):
    """The last `M` rows of two sequences over pages, and their arguments: see `chunk`."""
    q, k, v, pages = chunk(page, layout, M=M, dtype=dtype)
    return q[:, :, -M:], k, v, pages


@dtypes
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256] if REAL else [4])
@decoding_kernels
def test_decoding_gives_the_bits_of_one_buffer(backend, page, layout, dtype):
    if backend == "cuda" and (dtype == torch.float32 or not HOPPER):
        pytest.skip("no kernel of that dtype, or for this GPU")
    q, k, v, pages = newest_rows(page, layout, dtype)
    buffers = [in_rows(pool, pages["block_table"], layout) for pool in (k, v)]
    attend = function("decode_attention", backend)
    got = attend(q, k, v, return_lse=True, **pages)
    wanted = attend(q, *buffers, pages["seqused_k"], return_lse=True)
    for name, x, y in zip(("out", "lse"), got, wanted, strict=True):
        assert x.isfinite().all()
        assert_same_bits(name, x, y)


@decoding_kernels
def test_decoding_leaves_no_bounds(backend):
    """Broken tables and lengths of one sequence read nothing outside, and change nothing of another's."""
    q, k, v, pages = newest_rows(16, "NHD", None)
    attend = function("decode_attention", backend)
    out = attend(q, k, v, **pages)
    for number in (2**31 - 1, -(2**31), -1):
        pages["block_table"][0], pages["seqused_k"][0] = number, 2**31 - 1
        assert_same_bits("out", attend(q, k, v, **pages)[1], out[1])


@needs_gpu
@scoring
def test_scores_and_sparse_of_a_large_pool(backend):
    """The rows are in the last pages of pools of more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    k, v = (torch.empty(600_000, 16, 2, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    assert k.numel() > 2**31
    table = torch.arange(len(k) - 200, len(k), dtype=torch.int32, device=DEVICE).flip(0)[None]
    for x in (k, v):
        x[-200:].normal_()
    q = torch.randn(1, 4, 500, D, dtype=torch.bfloat16, device=DEVICE)
    rows, used = zk.probe_rows(500, device=DEVICE), torch.tensor([3200], dtype=torch.int32, device=DEVICE)
    score, attend = function("score_tokens", backend), function("sparse_attention", backend)
    found = []
    for pools, mine in (((k, v), table), ((k[-200:].clone(), v[-200:].clone()), table - (len(k) - 200))):
        pages = {"seqused_k": used, "block_table": mine}
        scores = score(q, pools[0], rows, **pages)
        sets = zk.select_tokens(*scores, tau=0.7, seqused_k=used)
        outs = [attend(q, *pools, *sets, kv_compacted=x, **pages) for x in (False, True)]
        found.append((*scores, *outs))
    for name, x, y in zip(("accumulated", "normalized", "out", "out, compacted"), *found, strict=True):
        assert_same_bits(name, x, y)


@needs_gpu
@scoring
def test_scores_and_sparse_replay_with_other_inputs(backend):
    """A chunk's scores, selection and attention, captured once, without a wait for the device."""
    score, attend = function("score_tokens", backend), function("sparse_attention", backend)
    rows = zk.probe_rows(1024, device=DEVICE)

    def inputs(seed):
        q, k, v, pages = chunk(16, "NHD", seed=seed)
        return [q, k, v, pages["seqused_k"] - 100 * seed, pages["block_table"]]

    def run(q, k, v, used, table):
        pages = {"seqused_k": used, "block_table": table}
        scores = score(q, k, rows, **pages)
        sets = zk.select_tokens(*scores, tau=0.7, seqused_k=used)
        return *scores, *sets, *(attend(q, k, v, *sets, kv_compacted=x, **pages) for x in (False, True))

    held = inputs(0)
    run(*held)
    torch.cuda.synchronize()
    with never_waiting():
        run(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*held)
    for seed in (1, 2):
        for x, new in zip(held, inputs(seed), strict=True):
            x.copy_(new)
        graph.replay()
        for i, (got, want) in enumerate(zip(captured, run(*inputs(seed)), strict=True)):
            assert_same_bits(f"result {i}, replayed with seed {seed}", got, want)


def draw(num_blocks, page=16, heads=2):
    return torch.randn(num_blocks, page, heads, D, device=DEVICE).bfloat16()


def set_of(kept, N, seed=0):
    """A random set as `indices [1, 1, N]`, `counts [1, 1]`, and its rows."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    columns = (torch.rand(N, generator=random, device=DEVICE) < kept).nonzero().int().flatten()
    indices = torch.nn.functional.pad(columns, (0, N - len(columns)), value=-1)[None, None]
    return indices, torch.tensor([[len(columns)]], dtype=torch.int32, device=DEVICE), columns.long()


def of_pages(pool, table, rows):
    """These rows of a sequence."""
    return pool[table[rows // pool.shape[1]].long(), rows % pool.shape[1]]


@pytest.mark.parametrize("kept", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("page", [1, 16])
@compaction
def test_many_tiles_waiting(backend, page, kept):
    """More tiles than run at once, of three sequences that share their first pages; nothing else is written."""
    N = 70_000 // page * page if REAL else 192
    blocks, shared = N // page, N // page // 7
    for seed in range(10 if REAL else 2):
        k, v = draw(3 * blocks + 5, page), draw(3 * blocks + 5, page)
        table = torch.randperm(len(k), device=DEVICE)[: 3 * blocks].int().view(3, blocks)
        table[1:, :shared] = table[0, :shared]
        first = torch.full((3,), shared * page, dtype=torch.int32, device=DEVICE)
        indices, counts, rows = set_of(kept, N - shared * page, seed)
        rows = torch.cat([torch.arange(shared * page, device=DEVICE), rows + shared * page])
        indices = torch.nn.functional.pad(rows, (0, N - len(rows)), value=-1).int().expand(3, 1, N)
        counts = counts.expand(3, 1) + shared * page
        before, used = (k.clone(), v.clone()), torch.full((3,), N, dtype=torch.int32, device=DEVICE)
        fn = function("compact_paged_kv_", backend)
        seqused, freed = fn(k, v, indices, counts, table, used, first_writable=first)
        assert seqused.tolist() == [len(rows)] * 3
        assert freed.tolist() == [blocks - -(-len(rows) // page)] * 3
        places = torch.arange(len(rows), device=DEVICE)
        others = torch.ones(len(k), dtype=torch.bool, device=DEVICE)
        others[table[:, shared:].flatten().long()] = False
        for now, old in ((k, before[0]), (v, before[1])):
            assert torch.equal(now[others], old[others])
            for b in range(3):
                assert torch.equal(of_pages(now, table[b], places), of_pages(old, table[b], rows))


@needs_gpu
@compaction
def test_compaction_of_a_large_pool(backend):
    """The rows are in the last pages of pools of more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    k, v = (torch.empty(600_000, 16, 2, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    assert k.numel() > 2**31
    table = torch.arange(len(k) - 200, len(k), dtype=torch.int32, device=DEVICE).flip(0)
    for x in (k, v):
        x[-200:].normal_()
    indices, counts, rows = set_of(0.4, 3200)
    wanted = of_pages(k, table, rows), of_pages(v, table, rows)
    used = torch.tensor([3200], dtype=torch.int32, device=DEVICE)
    lengths, _ = function("compact_paged_kv_", backend)(k, v, indices, counts, table[None], used)
    places = torch.arange(len(rows), device=DEVICE)
    assert torch.equal(of_pages(k, table, places), wanted[0])
    assert torch.equal(of_pages(v, table, places), wanted[1])
    q = torch.randn(1, 4, 1, D, dtype=torch.bfloat16, device=DEVICE)
    decode = function("decode_attention", chosen("decode_attention")[0])
    small = k[-200:].contiguous(), v[-200:].contiguous()
    got = decode(q, k, v, lengths, block_table=table[None])
    assert_same_bits("out", got, decode(q, *small, lengths, block_table=(table - (len(k) - 200))[None]))


@needs_gpu
@compaction
def test_graph_replays_with_other_inputs(backend):
    """Compaction and a decode step from its lengths, captured once, without a wait for the device."""
    compact, decode = function("compact_paged_kv_", backend), function("decode_attention", "auto")
    N, q = 3200, torch.randn(1, 4, 1, D, dtype=torch.bfloat16, device=DEVICE)

    def inputs(seed):
        torch.manual_seed(seed)
        indices, counts, _ = set_of(0.3 + 0.2 * seed, N, seed)
        table = torch.randperm(300, device=DEVICE)[:200].int()[None]
        return [draw(300), draw(300), indices, counts, table, torch.tensor([N], dtype=torch.int32, device=DEVICE)]

    def run(k, v, indices, counts, table, used):
        lengths, freed = compact(k, v, indices, counts, table, used)
        return lengths, freed, decode(q, k, v, lengths, block_table=table)

    held = inputs(0)
    run(*(x.clone() for x in held))
    torch.cuda.synchronize()
    with never_waiting():
        run(*(x.clone() for x in held))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*held)
    for seed in (1, 2):
        for x, new in zip(held, inputs(seed), strict=True):
            x.copy_(new)
        graph.replay()
        for name, got, want in zip(("seqused", "freed", "out"), captured, run(*inputs(seed)), strict=True):
            assert_same_bits(f"{name}, replayed with seed {seed}", got, want)
