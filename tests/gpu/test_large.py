"""Tensors of more than 2**31 elements: their last rows are where an offset of 32 bits would miss."""

import pytest
import torch
from cases import DEVICE, D, chosen, function, needs_gpu
from zipvl_reference.testing.budget import atom

N = 4_300_000  # times 4 heads and a head dim of 128: 2.2e9 elements, 4.4 GB of bf16
HKV = 4

pytestmark = needs_gpu


def parametrized(operator):
    return pytest.mark.parametrize("backend", chosen(operator) if torch.cuda.is_available() else ["auto"])


@pytest.fixture(autouse=True)
def room():
    """Skips where the GPU's memory is too small, and gives back what a test used."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def draw(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def last_rows(count=100, spread=1000):
    """`indices [1, 1, N]` and `counts [1, 1]` of tokens near the end."""
    members = N - spread + torch.randperm(spread)[:count].sort().values
    indices = torch.full((1, 1, N), -1, dtype=torch.int32, device=DEVICE)
    indices[0, 0, :count] = members
    indices[0, 0, count - 1] = N - 1
    return indices, torch.tensor([[count]], dtype=torch.int32, device=DEVICE)


def attended(q, k, v, at, dtype):
    """Rows `q [Hq, M, D]` at columns `at` of `k, v [Hkv, n, D]`, in `dtype`."""
    group, out = q.shape[0] // k.shape[0], []
    later = torch.arange(k.shape[1], device=DEVICE) > at[:, None]
    for h in range(q.shape[0]):
        weights = (q[h].to(dtype) @ k[h // group].to(dtype).mT * D**-0.5).masked_fill_(later, -torch.inf).softmax(-1)
        out.append(weights @ v[h // group].to(dtype))
    return torch.stack(out)


def close(got, q, k, v, at):
    exact, plain = (attended(q, k, v, at, t) for t in (torch.float64, torch.bfloat16))
    allowed = 2 * (plain.double() - exact).abs().max() + atom(q[None], k[None, :, :1000], D**-0.5, 5.0, torch.bfloat16)
    assert (got.double() - exact).abs().max() <= allowed


@parametrized("compact_kv_")
def test_compact(backend):
    k, v = draw(1, HKV, N, D), draw(1, HKV, N, D)
    indices, counts = last_rows()
    members = indices[0, 0, :100].long()
    wanted = k[:, :, members], v[:, :, members]
    function("compact_kv_", backend)(k, v, indices, counts)
    assert torch.equal(k[:, :, :100], wanted[0])
    assert torch.equal(v[:, :, :100], wanted[1])


@parametrized("sparse_attention")
@pytest.mark.parametrize("kv_compacted", [False, True])
def test_sparse(backend, kv_compacted):
    """Keys near the end of a large buffer: in place, or compacted as the second sequence of a batch."""
    M = 1000
    indices, counts = last_rows()
    members = indices[0, 0, :100].long()
    if kv_compacted:
        big = [draw(1, HKV * N * D + (1 << 20)) for _ in range(2)]
        k, v = (x.as_strided((2, HKV, 1024, D), (HKV * N * D, 1024 * D, D, 1)) for x in big)
        k_kept, v_kept = k[1, :, :100], v[1, :, :100]
        indices, counts = indices.expand(2, 1, N), counts.expand(2, 1)
    else:
        k, v = draw(1, HKV, N, D), draw(1, HKV, N, D)
        k_kept, v_kept = k[0][:, members], v[0][:, members]
    q = draw(len(k), 2 * HKV, M, D)
    out = function("sparse_attention", backend)(q, k, v, indices, counts, kv_compacted=kv_compacted)
    rows = members - (N - M)
    close(out[-1][:, rows], q[-1][:, rows], k_kept, v_kept, torch.arange(100, device=DEVICE))
    out[:, :, rows] = 0
    assert not out.any()


@parametrized("sparse_attention")
def test_sparse_of_many_queries(backend):
    q = draw(1, 4, N, D)
    k, v = draw(1, 1, 1024, D), draw(1, 1, 1024, D)
    indices, counts = last_rows()
    rows = indices[0, 0, :100].long()
    out = function("sparse_attention", backend)(q, k, v, indices, counts, kv_compacted=True)
    close(out[0][:, rows], q[0][:, rows], k[0, :, :100], v[0, :, :100], torch.arange(100, device=DEVICE))
    out[:, :, rows] = 0
    assert not out.any()


@parametrized("decode_attention")
def test_decode(backend):
    q, k, v = draw(1, 2 * HKV, 1, D), draw(1, HKV, N, D), draw(1, HKV, N, D)
    k[:, :, -50:] *= 8  # so that the last rows matter
    used = torch.tensor([N], dtype=torch.int32, device=DEVICE)
    out = function("decode_attention", backend)(q, k, v, used)
    at = torch.tensor([N - 1], device=DEVICE)
    for h in range(HKV):  # one by one, for the sake of memory
        heads = slice(2 * h, 2 * h + 2)
        close(out[0, heads], q[0, heads], k[0, h : h + 1], v[0, h : h + 1], at)


@parametrized("score_tokens")
def test_score(backend):
    M, P = 64, 16
    q, k = draw(1, HKV, M, D), draw(1, HKV, N, D)
    k[:, :, -50:] *= 8
    rows = torch.arange(M - P, M, dtype=torch.int32, device=DEVICE)
    accumulated, _ = function("score_tokens", backend)(q, k, rows)
    exact, plain = (torch.zeros(N, dtype=t, device=DEVICE) for t in (torch.float64, torch.float32))
    later = torch.arange(N, device=DEVICE) > rows[:, None] + N - M
    for h in range(HKV):
        for total, dtype in ((exact, torch.float64), (plain, torch.bfloat16)):
            scores = q[0, h, M - P :].to(dtype) @ k[0, h].to(dtype).mT * D**-0.5
            total += scores.masked_fill_(later, -torch.inf).softmax(-1).sum(0)
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-5 * exact.max()
    assert (accumulated[0, 0].double() - exact).abs().max() <= allowed


def test_prefill_of_a_long_buffer():
    """More tokens than a model takes, of which few are real."""
    n = 500
    q, k, v = draw(1, 2 * HKV, n, D), draw(1, HKV, N, D), draw(1, HKV, N, D)
    leftpad = torch.tensor([N - n], dtype=torch.int32, device=DEVICE)
    real = k[:, :, -n:].clone(), v[:, :, -n:].clone()
    out, indices, counts = function("zipvl_prefill_", "auto")(q, k, v, leftpad_k=leftpad, keep_ratio=0.4)
    assert counts.tolist() == [[200]]
    rows = indices[0, 0, :200].long() - (N - n)
    assert int(rows.min()) >= 0
    kept = [x[0][:, rows] for x in real]
    assert torch.equal(k[0, :, :200], kept[0])
    assert torch.equal(v[0, :, :200], kept[1])
    close(out[0][:, rows], q[0][:, rows], *kept, torch.arange(200, device=DEVICE))
    out[:, :, rows] = 0
    assert not out.any()
