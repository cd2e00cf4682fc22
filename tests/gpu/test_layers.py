"""Compaction of several layers in one launch, and of packed sequences: the contract, waiting tiles, CUDA graphs."""

import pytest
import torch
from cases import DEVICE, EXAMPLES, REAL, D, chosen, function, needs_gpu, never_waiting
from zipvl_reference.testing import (
    check_compact_kv_of_layers,
    check_compact_paged_kv_of_layers,
    check_packed_compact_kv,
)
from zipvl_reference.testing.budget import assert_same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32] if REAL else [torch.float32]
DTYPE = DTYPES[0]
OPTIONS = {"device": DEVICE, "derandomize": True, "max_examples": EXAMPLES, "max_tokens": 600 if REAL else 24}
DIMS = (80, 128) if REAL else (16,)
LAYERS = (1, 5, 66) if REAL else (1, 3)  # 66: more than a launch takes
buffers = pytest.mark.parametrize("backend", chosen("compact_kv_"))
pages = pytest.mark.parametrize("backend", chosen("compact_paged_kv_"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@buffers
def test_packed(backend, dtype):
    check_packed_compact_kv(function("compact_kv_", backend), dtype=dtype, head_dims=DIMS, **OPTIONS)


@dtypes
@buffers
def test_layers(backend, dtype):
    check_compact_kv_of_layers(function("compact_kv_", backend), dtype=dtype, head_dims=DIMS, layers=LAYERS, **OPTIONS)


@dtypes
@pages
def test_layers_of_pages(backend, dtype):
    fn = function("compact_paged_kv_", backend)
    sizes = (1, 16, 24, 256) if REAL else (1, 3)
    check_compact_paged_kv_of_layers(fn, dtype=dtype, head_dims=DIMS, layers=LAYERS, block_sizes=sizes, **OPTIONS)


@buffers
@pytest.mark.parametrize("D", [7, 96, 256, 600] if REAL else [7])
def test_other_rows(backend, D):
    """Rows that are not aligned, and rows that are longer than what a block loads at once."""
    fn, options = function("compact_kv_", backend), {**OPTIONS, "max_examples": 3, "max_tokens": 100 if REAL else 9}
    check_packed_compact_kv(fn, dtype=DTYPE, head_dims=(D,), **options)
    check_compact_kv_of_layers(fn, dtype=DTYPE, head_dims=(D,), **options)


@pages
@pytest.mark.parametrize("D", [7, 96, 256, 600] if REAL else [7])
def test_other_rows_of_pages(backend, D):
    options = {**OPTIONS, "max_examples": 3, "max_tokens": 100 if REAL else 9, "block_sizes": (5,)}
    check_compact_paged_kv_of_layers(function("compact_paged_kv_", backend), dtype=DTYPE, head_dims=(D,), **options)


def draw(L, B, G, N, *, seed, heads=2, page=0):
    """Keys, values, sets, counts and, with pages, tables and lengths of each layer; some sets empty, some whole."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    shares = torch.rand(L, B, G, 1, generator=random, device=DEVICE) * 1.4 - 0.2
    member = torch.rand(L, B, G, N, generator=random, device=DEVICE) < shares
    columns = torch.where(member, torch.arange(N, device=DEVICE), N).sort(-1).values.int()
    indices, counts = columns.masked_fill(columns == N, -1), member.sum(-1, dtype=torch.int32)
    shape = (B, heads, N, D) if not page else (B * -(-N // page) + 3, page, heads, D)
    k, v = ([torch.randn(shape, generator=random, device=DEVICE).to(DTYPE) for _ in range(L)] for _ in range(2))
    found = [k, v, list(indices), list(counts)]
    if page:
        blocks = B * -(-N // page)
        tables = [torch.randperm(shape[0], generator=random, device=DEVICE)[:blocks].int().view(B, -1) for _ in k]
        found += [tables, [torch.full((B,), N, dtype=torch.int32, device=DEVICE) for _ in k]]
    return found


def rows(inputs, layer, which, b, h, at):
    """These rows of a sequence and head."""
    x = inputs[which][layer]
    if len(inputs) == 4:
        return x[b, h, at]
    page = x.shape[1]
    return x[inputs[4][layer][b, at // page].long(), at % page, h]


def assert_moved(call, inputs):
    """All sets of all layers stand in order at the front after `call`; returns what it returns."""
    old = [[x.clone() for x in part] for part in inputs[:2]] + inputs[2:]
    returned = call(inputs)
    for layer, (sets, sizes) in enumerate(zip(inputs[2], inputs[3], strict=True)):
        for b in range(sets.shape[0]):
            for h in range(inputs[0][layer].shape[2 if len(inputs) > 4 else 1]):
                n = int(sizes[b, h % sets.shape[1]])
                at, places = sets[b, h % sets.shape[1], :n].long(), torch.arange(n, device=DEVICE)
                for which in (0, 1):
                    now = rows(inputs, layer, which, b, h, places)
                    assert torch.equal(now, rows(old, layer, which, b, h, at)), (layer, b, h, which)
    return returned


SHAPES = [(6, 1, 1, 20_000), (40, 8, 2, 700), (3, 2, 1, 5_000)] if REAL else [(2, 1, 1, 100), (3, 2, 2, 20)]


@buffers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tiles_waiting(backend, shape):
    """More tiles than run at once, and more sets than a block has threads; the counters end at zero, so again."""
    fn = function("compact_kv_", backend)
    for seed in range(6 if REAL else 1):
        assert_moved(lambda inputs: fn(*inputs), draw(*shape, seed=seed))


@pages
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tiles_of_pages_waiting(backend, shape, page):
    fn, (L, _, G, N) = function("compact_paged_kv_", backend), shape
    for seed in range(4 if REAL else 1):
        inputs = draw(*shape, seed=seed, page=page)
        seqused, freed = assert_moved(lambda inputs: fn(*inputs), inputs)
        counts = torch.stack(inputs[3])
        assert torch.equal(seqused, counts[..., 0] if G == 1 else counts)
        assert torch.equal(freed, -(-N // page) - (counts.amax(-1) + page - 1) // page)
        assert len(freed) == L


@pages
def test_layers_are_one_by_one(backend):
    fn, inputs = function("compact_paged_kv_", backend), draw(5, 2, 2, 300 if REAL else 30, seed=3, page=16)
    alone = [[x.clone() for x in part] for part in inputs]
    returned = fn(*inputs)
    for i, layer in enumerate(zip(*alone, strict=True)):
        for name, got, want in zip(("seqused", "freed"), returned, fn(*layer), strict=True):
            assert_same_bits(f"{name}[{i}]", got[i], want)


@needs_gpu
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("backend", chosen("compact_kv_"))
def test_graph_replays_with_other_inputs(backend, page):
    """Lists of layers captured once, without a wait for the device: addresses are the launch's own parameters."""
    fn = function("compact_paged_kv_" if page else "compact_kv_", backend)
    held = draw(6, 2, 1, 2000, seed=0, page=page)
    fn(*held)
    torch.cuda.synchronize()
    with never_waiting():
        fn(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fn(*held)
    for seed in (1, 2):
        for part, new in zip(held, draw(6, 2, 1, 2000, seed=seed, page=page), strict=True):
            for x, y in zip(part, new, strict=True):
                x.copy_(y)
        assert_moved(lambda inputs: graph.replay(), held)
        if page:
            assert torch.equal(captured[0], torch.stack(held[3])[..., 0])


@needs_gpu
@buffers
def test_a_late_layer_beyond_2_31_elements(backend):
    """Offsets into large buffers, of the second layer of two."""
    N, tail = 4_300_000, 1000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    k, v = ([torch.zeros(1, 4, N, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)] for _ in range(2))
    at = torch.arange(N - tail, N, 7, device=DEVICE)
    for x in (*k, *v):
        x[:, :, -tail:].normal_()
    wanted = [x[:, :, at].clone() for x in (k[1], v[1])]
    indices = torch.full((1, 1, N), -1, dtype=torch.int32, device=DEVICE)
    indices[0, 0, : len(at)] = at.int()
    counts = torch.tensor([[len(at)]], dtype=torch.int32, device=DEVICE)
    function("compact_kv_", backend)(k, v, [indices, indices], [counts * 0, counts])
    for x, want in zip((k[1], v[1]), wanted, strict=True):
        assert torch.equal(x[:, :, : len(at)], want)
    assert not k[0][:, :, : len(at)].any()


@needs_gpu
@buffers
def test_packed_beyond_2_31_elements(backend):
    """The last of two packed sequences, in rows whose offsets pass 2**31."""
    T, tail = 4_300_000, 5000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    k, v = (torch.zeros(T, 4, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for x in (k, v):
        x[-tail:].normal_()
    kept = torch.arange(3, tail, 3, device=DEVICE)
    wanted = [x[T - tail + kept].clone() for x in (k, v)]
    indices = torch.full((1, T), -1, dtype=torch.int32, device=DEVICE)
    indices[0, T - tail : T - tail + len(kept)] = kept.int()
    counts = torch.tensor([[0], [len(kept)]], dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.tensor([0, T - tail, T], dtype=torch.int32, device=DEVICE)
    function("compact_kv_", backend)(k, v, indices, counts, cu_seqlens=cu_seqlens, max_seqlen=T)
    for x, want in zip((k, v), wanted, strict=True):
        assert torch.equal(x[T - tail : T - tail + len(kept)], want)
        assert not x[: T - tail].any()
