"""The CUDA C kernels that move rows, run by the CPU as in test_cuda_on_cpu: the contract in every form.

Blocks run one after the other there, so nobody waits; that tiles wait for one another is for tests on a GPU to show.
"""

import shutil
from functools import partial

import pytest
import torch
from zipvl_reference.testing import (
    check_compact_kv,
    check_compact_kv_of_layers,
    check_compact_paged_kv,
    check_compact_paged_kv_of_layers,
    check_packed_compact_kv,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
OPTIONS = {"derandomize": True, "max_examples": 12, "head_dims": (8,), "max_tokens": 40}


@pytest.fixture
def kernels(on_cpu, monkeypatch):
    """`compact_kv_` and `compact_paged_kv_` with small blocks, so that there are many tiles."""
    small = on_cpu.compact_kv.moving.Config(threads=32, items=2)
    monkeypatch.setattr(on_cpu.compact_kv, "Config", lambda: small)
    monkeypatch.setattr(on_cpu.compact_paged_kv, "default", lambda device: small)
    return on_cpu.compact_kv.compact_kv_, on_cpu.compact_paged_kv.compact_paged_kv_


@pytest.mark.parametrize("check", [check_compact_kv, check_packed_compact_kv, check_compact_kv_of_layers])
def test_contract(kernels, check):
    check(kernels[0], **OPTIONS)


def test_more_layers_than_a_launch_takes(kernels):
    check_compact_kv_of_layers(kernels[0], **OPTIONS | {"max_examples": 2}, layers=(66,))


def test_rows_longer_than_a_block_loads(kernels):
    """In 33 pieces of 2 bytes times 15, since neither start nor length of a row is a multiple of 4."""
    check_packed_compact_kv(kernels[0], dtype=torch.float16, **OPTIONS | {"max_examples": 4, "head_dims": (495,)})


@pytest.mark.parametrize("page", [1, 3])
def test_contract_of_pages(kernels, page):
    check_compact_paged_kv(kernels[1], **OPTIONS, block_sizes=(page,))


def test_contract_of_pages_and_layers(kernels):
    def of_lists(k, v, indices, counts, table, used, **options):
        lists = ([x] * len(k) if isinstance(x, torch.Tensor) else x for x in (table, used))  # as the operator does
        return kernels[1](k, v, indices, counts, *lists, **options)

    check_compact_paged_kv_of_layers(of_lists, **OPTIONS, block_sizes=(4,))


@pytest.mark.parametrize("fn", [0, 1])
def test_more_sets_than_threads(kernels, fn):
    """Each thread adds up several sets; some are empty, some are whole."""
    random = torch.Generator().manual_seed(0)
    B, H, N = 90, 2, 9
    member = torch.rand(B, H, N, generator=random) < torch.rand(B, H, 1, generator=random) * 1.4 - 0.2
    columns = torch.where(member, torch.arange(N), N).sort(-1).values
    counts = member.sum(-1, dtype=torch.int32)
    k, v = (torch.randn(B, N, H, 8, generator=random) for _ in range(2))  # which are pages of 9 rows, too
    old = k.transpose(1, 2).clone(), v.transpose(1, 2).clone()
    if fn == 0:
        kernels[0](k.transpose(1, 2), v.transpose(1, 2), columns.int(), counts)
    else:
        table, used = torch.arange(B, dtype=torch.int32)[:, None], torch.full((B,), N, dtype=torch.int32)
        seqused, freed = kernels[1](k, v, columns.int(), counts, table, used)
        assert torch.equal(seqused, counts)
        assert torch.equal(freed, (counts.amax(1) == 0).int())
    wanted = [x.gather(2, columns.clamp(max=N - 1)[..., None].expand_as(x)) for x in old]
    kept = (torch.arange(N) < counts[..., None])[..., None]
    for now, want in zip((k, v), wanted, strict=True):
        assert torch.equal(now.transpose(1, 2) * kept, want * kept)


@pytest.mark.parametrize("seed", range(4))
def test_garbage_never_writes_elsewhere(kernels, seed):
    """Any numbers in any argument of packed sequences, and of pages."""
    random = torch.Generator().manual_seed(seed)
    extremes = torch.tensor([-(2**31), -17, -1, 0, 1, 7, 40, 2**31 - 1], dtype=torch.int32)

    def garbage(*shape, sane):
        wild = extremes[torch.randint(len(extremes), shape, generator=random)]
        drawn = torch.randint(sane, shape, generator=random).int()
        return torch.where(torch.rand(shape, generator=random) < 1 / 3, wild, drawn)

    def unchanged(call, *shape):
        buffers = [torch.randn(shape, generator=random) for _ in range(2)]
        old = [x.clone() for x in buffers]
        call(*(x[6:19] for x in buffers))
        for now, before in zip(buffers, old, strict=True):
            assert torch.equal(now[:6], before[:6])
            assert torch.equal(now[19:], before[19:])

    sets, sizes = garbage(2, 13, sane=9), garbage(3, 2, sane=12)
    where = {"cu_seqlens": garbage(4, sane=14), "max_seqlen": 9}
    unchanged(partial(kernels[0], indices=sets, counts=sizes, **where), 25, 2, 8)
    rest = {"indices": garbage(3, 2, 14, sane=12), "counts": sizes, "block_table": garbage(3, 3, sane=13)}
    rest |= {"seqused_k": garbage(3, 2, sane=13), "first_writable": garbage(3, sane=5)}
    unchanged(partial(kernels[1], **rest), 25, 4, 2, 8)


def test_sequences_that_overlap_use_no_more_counters(kernels, on_cpu, monkeypatch):
    """Counters are as many as sequences one after the other need; what lies behind them stays as it is."""
    given, B, T = [], 30, 100  # 4 tiles

    def tickets(device, count):
        given.append(torch.zeros(count + 4000, dtype=torch.int32))
        given[-1][count:] = 77
        return given[-1]

    monkeypatch.setattr(on_cpu.compact_kv, "tickets", tickets)
    k = torch.randn(T, 2, 8)
    indices, counts = torch.arange(T, dtype=torch.int32)[None], torch.full((B, 1), T, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, T] * (B // 2) + [0], dtype=torch.int32)
    kernels[0](k, k.clone(), indices, counts, cu_seqlens=cu_seqlens, max_seqlen=T)
    counters, rest = given[0].tensor_split([2 + 2 * 2 * (B + 4)])
    assert not counters.any()
    assert (rest == 77).all()
    assert len(rest) == 4000
