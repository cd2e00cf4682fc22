"""Packed sequences on the GPU: each has the bits that it has alone, in every backend, whatever stands around it."""

import importlib
from functools import partial

import pytest
import torch
from cases import DEVICE, DTYPE, EXAMPLES, HEADS, REAL, D, available, needs_gpu, never_waiting
from zipvl_reference.testing import (
    check_packed_compact_kv,
    check_packed_probe_rows,
    check_packed_score_tokens,
    check_packed_select_tokens,
    check_packed_sparse_attention,
    check_packed_zipvl_prefill,
)
from zipvl_reference.testing.budget import assert_same_bits

import zipvl_kernels as zk

CHECKS = {
    "score_tokens": check_packed_score_tokens,
    "select_tokens": check_packed_select_tokens,
    "compact_kv_": check_packed_compact_kv,
    "sparse_attention": check_packed_sparse_attention,
    "zipvl_prefill_": check_packed_zipvl_prefill,
}
# On both sides of what the kernels take for short, of a tile, and of the number of probes.
LENGTHS = (9000, 0, 1, 2880, 128, 17, 8192) if REAL else (40, 0, 1, 17)
BACKENDS = ("auto", "triton") if REAL else ("triton",)  # "auto" takes the kernels in CUDA C that there are
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if REAL else (DTYPE,)
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("max_tokens", [48, 300] if REAL else [24])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("operator", CHECKS)
@backends
def test_contract(operator, backend, dtype, max_tokens):
    options = {"max_examples": EXAMPLES, "max_tokens": max_tokens, "derandomize": True, "device": DEVICE}
    if operator != "select_tokens":
        options |= {"dtype": dtype, "head_dims": (64, 128) if REAL else (16,)}
    elif dtype != DTYPE:
        pytest.skip("selection knows of no dtype")
    CHECKS[operator](partial(getattr(zk, operator), backend=backend), **options)


@pytest.mark.parametrize("head_dims", [(80, 96), (256,)], ids=str)
@pytest.mark.parametrize("operator", ["score_tokens", "sparse_attention"])
@needs_gpu
def test_contract_of_other_head_dims(operator, head_dims):
    options = {"max_examples": EXAMPLES, "max_tokens": 150, "device": DEVICE, "dtype": DTYPE}
    CHECKS[operator](getattr(zk, operator), **options, head_dims=head_dims, derandomize=True)


@pytest.mark.parametrize("backend", available("probe_rows"))
def test_probe_rows(backend):
    drawn = importlib.import_module(f"zipvl_kernels._{backend}.probe_rows")

    def fn(*args, cu_seqlens, **options):
        return drawn.probe_rows(*args, device=cu_seqlens.device, cu_seqlens=cu_seqlens, **options)

    bounds = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    if hasattr(drawn, "lacks") and drawn.lacks(4, cu_seqlens=bounds):
        pytest.skip("this kernel takes no packed sequences")
    check_packed_probe_rows(fn, device=DEVICE, max_examples=4 * EXAMPLES, derandomize=True)


def inputs(lengths, seed=0, total=None):
    """`q, k, v` of one projection, and where the sequences are, as an engine has them."""
    random, (Hq, Hkv) = torch.Generator(DEVICE).manual_seed(seed), HEADS
    total = sum(lengths) if total is None else total
    x = torch.randn(total, Hq + 2 * Hkv, D, generator=random, device=DEVICE).to(DTYPE)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    return list(x.split((Hq, Hkv, Hkv), 1)), {"cu_seqlens": bounds, "max_seqlen": max(lengths)}


def prefill(fn, tensors, where, **options):
    """All that a prefill returns or writes, 0 where it is unspecified: rows past a set, and rows of no sequence."""
    q, k, v = (x.clone() for x in tensors)
    out, indices, counts = fn(q, k, v, **options, **where)
    bounds, row = where["cu_seqlens"].long(), torch.arange(len(q), device=DEVICE)
    b = (torch.searchsorted(bounds, row, right=True) - 1).clamp(0, len(counts) - 1)
    inside = (row >= bounds[0]) & (row < bounds[-1])
    kept = inside & (row - bounds[b] < counts[b, 0])
    return (
        out.masked_fill(~inside[:, None, None], 0),
        indices.masked_fill(~inside, 0),
        counts,
        *(x.masked_fill(~kept[:, None, None], 0) for x in (k, v)),
    )


@pytest.mark.parametrize("options", [{}, {"keep_ratio": 0.4, "num_recent": 40, "num_random": 200}], ids=["", "probes"])
@backends
def test_each_sequence_as_alone(backend, options):
    fn = partial(zk.zipvl_prefill_, backend=backend, **options)
    (q, k, v), where = inputs(LENGTHS)
    ours_k, ours_v = k.clone(), v.clone()
    out, indices, counts = fn(q, ours_k, ours_v, **where)
    for b, (start, end) in enumerate(zip(*(where["cu_seqlens"].tolist()[i:] for i in (0, 1)), strict=False)):
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k.clone(), v.clone())]
        alone, wanted, number = fn(*one)
        assert_same_bits(f"counts, sequence {b}", number[0], counts[b])
        assert_same_bits(f"indices, sequence {b}", wanted[0], indices[:, start:end])
        assert_same_bits(f"out, sequence {b}", alone[0].transpose(0, 1), out[start:end])
        p = int(counts[b, 0])
        for name, moved, packed in zip("kv", one[1:], (ours_k, ours_v), strict=True):
            assert_same_bits(f"{name}, sequence {b}", moved[0, :, :p].transpose(0, 1), packed[start : start + p])


@backends
def test_the_same_bits_again_and_in_poisoned_memory(backend, monkeypatch):
    fn = partial(zk.zipvl_prefill_, backend=backend)
    tensors, where = inputs(LENGTHS)
    wanted = prefill(fn, tensors, where)

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.dtype.is_floating_point else 0x7F7F7F7F % (torch.iinfo(x.dtype).max + 1))

        return empty

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        found = prefill(fn, tensors, where)
    for name, a, b in zip(("out", "indices", "counts", "k", "v"), wanted, found, strict=True):
        assert_same_bits(name, a, b)


@needs_gpu
@backends
def test_graph_replays_with_other_sequences(backend):
    """Captured once, without a wait for the device, and replayed with other bounds: empty sequences, bad ones, one."""
    fn = partial(zk.zipvl_prefill_, backend=backend)
    tensors, where = inputs((3000, 2000, 17, 0), total=6000)
    where["max_seqlen"] = 6000
    prefill(fn, tensors, where)
    with never_waiting():
        fn(tensors[0], *(x.clone() for x in tensors[1:]), **where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prefill(fn, tensors, where)
    for seed, lengths in enumerate(((3000, 2000, 17, 0), (0, 0, 0, 6000), (1, 128, 129, 5742), (1500,) * 4), 1):
        new, at = inputs(lengths, seed, total=6000)
        at["max_seqlen"] = 6000
        for held, x in zip((*tensors, where["cu_seqlens"]), (*new, at["cu_seqlens"]), strict=True):
            held.copy_(x)
        graph.replay()
        for name, a, b in zip(("out", "indices", "counts", "k", "v"), prefill(fn, new, at), captured, strict=True):
            assert_same_bits(f"{name}, replayed with {lengths}", a, b)
    # Bounds that no engine should have: nothing out of bounds is touched, or the replay would fault.
    for bounds in ((0, 2**31 - 1, -5, 7000, 3), (-(2**31), 6000, 0, 6000, 6000), (6001, 7, 9, 9, 2**31 - 1)):
        where["cu_seqlens"].copy_(torch.tensor(bounds, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()


@needs_gpu
@backends
def test_rows_beyond_two_to_the_31(backend):
    """Sequences at the end of tensors of more elements than 32 bits count."""
    (Hq, Hkv), lengths = HEADS, (1500, 2500)
    total = 2**31 // (Hq * D) + sum(lengths) + 100
    first = total - sum(lengths)
    random = torch.Generator(DEVICE).manual_seed(0)
    q = torch.empty(total, Hq, D, dtype=DTYPE, device=DEVICE)
    k, v = (torch.empty(total, Hkv, D, dtype=DTYPE, device=DEVICE) for _ in range(2))
    for x in (q, k, v):
        x[first:] = torch.randn(sum(lengths), *x.shape[1:], generator=random, device=DEVICE).to(DTYPE)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    small = [x[first:].clone() for x in (q, k, v)]
    fn = partial(zk.zipvl_prefill_, backend=backend)
    wanted = fn(*small, cu_seqlens=bounds, max_seqlen=2500)
    got = fn(q, k, v, cu_seqlens=bounds + first, max_seqlen=2500)
    assert_same_bits("out", wanted[0], got[0][first:])
    assert_same_bits("indices", wanted[1], got[1][:, first:])
    assert_same_bits("counts", wanted[2], got[2])
    for b, start in enumerate((0, lengths[0])):
        p = int(wanted[2][b, 0])
        for name, old, now in (("k", small[1], k), ("v", small[2], v)):
            assert_same_bits(f"{name}, sequence {b}", old[start : start + p], now[first + start :][:p])
