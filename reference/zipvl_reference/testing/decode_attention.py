"""Checks of `decode_attention`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, one_sequence
from zipvl_reference.testing.pages import BLOCK_SIZES, PagedCase, paged_cases


def exact_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One row and head at a time over exactly the rows it sees, computed in `dtype`. `used` is `[B, Hkv]`."""
    (B, Hq, M, _), group = q.shape, q.shape[1] // k.shape[1]
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.full((B, Hq, M), -torch.inf, dtype=dtype)
    q, k, v = (x.cpu().to(dtype) for x in (q, k, v))
    for b in range(B):
        for h in range(Hq):
            for i in range(M):
                sees = int(used[b, h // group]) - M + i + 1
                if sees > 0:
                    scores = k[b, h // group, :sees] @ q[b, h, i] * scale
                    lse[b, h, i] = torch.logsumexp(scores, 0)
                    out[b, h, i] = torch.softmax(scores, 0) @ v[b, h // group, :sees]
    return out, lse


def assert_decoded(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> None:
    """`out` and `lse` are those of `q` over the first `used [B, Hkv]` rows of `k, v [B, Hkv, N, D]`; all finite."""
    scale, dtype = q.shape[3] ** -0.5, q.dtype
    exact, plain = (exact_decode_attention(q, k, v, used, scale, t) for t in (torch.float64, dtype))
    empty = exact[1].isneginf()
    assert out.dtype == dtype, f"out: expected {dtype}, got {out.dtype}"
    assert lse.dtype == torch.float32, f"lse: expected float32, got {lse.dtype}"
    assert_within("out", out, exact[0], plain[0], atom(q, k, scale, v.abs().max().item(), dtype))
    assert bool((out.cpu()[empty] == 0).all()), "out: expected exactly 0 in rows that see nothing"
    assert bool((lse.cpu().isneginf() == empty).all()), "lse: expected -inf exactly in rows that see nothing"
    magnitude = 1 + exact[1].abs().nan_to_num(posinf=0).max().item()
    allowed = atom(q, k, scale, magnitude, torch.float32)
    assert_within("lse", lse.cpu()[~empty], exact[1][~empty], plain[1][~empty], allowed)


def draw_lengths(case: AttentionCase, device: str) -> tuple[Tensor, Tensor]:
    """Used rows as `[B, Hkv]` on the CPU, and as the argument `seqused_k`."""
    used = case.integers(0, case.N, case.B, case.groups)
    return used.expand(case.B, case.Hkv), (used[:, 0] if case.groups == 1 else used).to(device)


def check_decode_attention(
    fn: Callable[..., Any],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """Output and log-sum-exp against float64, lengths per sequence and per head, empty ones included.

    Rows past the used ones hold NaN and must not leak. The same bits at a rerun, and alone as in a batch.
    """

    def test(case: AttentionCase) -> None:
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k, v = (case.tensor(case.Hkv, case.N, device, dtype) for _ in range(2))
        used, seqused_k = draw_lengths(case, device)
        finite = k.clone(), v.clone()
        unused = (torch.arange(case.N) >= used[..., None]).to(device)
        k[unused], v[unused] = torch.nan, torch.inf

        out, lse = fn(q, k, v, seqused_k, return_lse=True)
        assert_decoded(out, lse, q, *finite, used)
        assert_same_bits("out, without lse", out, fn(q, k, v, seqused_k))
        for b in range(case.B):
            alone = fn(*one_sequence(b, q, k, v, seqused_k), return_lse=True)
            assert_same_bits(f"out, sequence {b} alone", out[b : b + 1], alone[0])
            assert_same_bits(f"lse, sequence {b} alone", lse[b : b + 1], alone[1])

    cases = attention_cases(head_dims, max_tokens, max_rows=16)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)


def check_paged_decode_attention(
    fn: Callable[..., Any],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> None:
    """`decode_attention` over pages, as `check_decode_attention`: in both layouts, with first pages that are shared.

    Rows and pages that are not used hold NaN; entries of the block table that are not used name no page.
    """

    def test(paged: PagedCase) -> None:
        case = paged.rows
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k, v = (case.tensor(case.Hkv, case.N, device, dtype) for _ in range(2))
        used, seqused_k = draw_lengths(case, device)
        same = paged.shared(used) * paged.block_size
        k[:, :, :same], v[:, :, :same] = k[:1, :, :same].clone(), v[:1, :, :same].clone()
        table = paged.table(used, device)
        pools = paged.spread(k, table, used, torch.nan), paged.spread(v, table, used, torch.inf)

        def call(b: slice, **options: bool) -> Any:
            return fn(q[b], *pools, seqused_k[b], block_table=table[b], layout=paged.layout, **options)

        everything = slice(None)
        out, lse = call(everything, return_lse=True)
        assert_decoded(out, lse, q, k, v, used)
        assert_same_bits("out, without lse", out, call(everything))
        for b in range(case.B):
            alone = call(slice(b, b + 1), return_lse=True)
            assert_same_bits(f"out, sequence {b} alone", out[b : b + 1], alone[0])
            assert_same_bits(f"lse, sequence {b} alone", lse[b : b + 1], alone[1])

    cases = paged_cases(head_dims, max_tokens, block_sizes, max_rows=16)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)
