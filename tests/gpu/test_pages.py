"""Pools of pages: the contract, many tiles that wait for each other, pools beyond 2**31 elements, CUDA graphs."""

import pytest
import torch
from cases import DEVICE, EXAMPLES, REAL, D, chosen, function, needs_gpu
from zipvl_reference.testing import check_compact_paged_kv, check_paged_decode_attention
from zipvl_reference.testing.budget import assert_same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32] if REAL else [torch.float32]
PAGES = (1, 16, 24, 256) if REAL else (1, 3)
compaction = pytest.mark.parametrize("backend", chosen("compact_paged_kv_"))
decoding = pytest.mark.parametrize("backend", chosen("decode_attention"))


def options(dtype):
    shapes = {"head_dims": (80, 128) if REAL else (16,), "max_tokens": 600 if REAL else 24, "block_sizes": PAGES}
    return {"device": DEVICE, "dtype": dtype, "derandomize": True, "max_examples": EXAMPLES, **shapes}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@compaction
def test_compaction(backend, dtype):
    check_compact_paged_kv(function("compact_paged_kv_", backend), **options(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@decoding
def test_decoding(backend, dtype):
    check_paged_decode_attention(function("decode_attention", backend), **options(dtype))


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*(x.clone() for x in held))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*held)
    for seed in (1, 2):
        for x, new in zip(held, inputs(seed), strict=True):
            x.copy_(new)
        graph.replay()
        for name, got, want in zip(("seqused", "freed", "out"), captured, run(*inputs(seed)), strict=True):
            assert_same_bits(f"{name}, replayed with seed {seed}", got, want)
