"""Checks of `sparse_attention`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, one_sequence


def exact_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, member: Tensor, starts: Sequence[int], scale: float, dtype: torch.dtype
) -> Tensor:
    """Dense attention under a mask, computed in `dtype`. `member [B, G, N]` says which columns are in the set."""
    (B, Hq, M, _), (Hkv, N) = q.shape, k.shape[1:3]
    group, out = Hq // Hkv, torch.zeros(q.shape, dtype=dtype)
    q, k, v = (x.cpu().to(dtype) for x in (q, k, v))
    for b in range(B):
        at = starts[b] + torch.arange(M)
        for h in range(Hq):
            kept = member[b, (h // group) % member.shape[1]]
            row = (at >= 0) & (at < N) & kept[at.clamp(0, N - 1)]
            sees = kept & (torch.arange(N) <= at[row, None])
            scores = q[b, h, row] @ k[b, h // group].mT * scale
            out[b, h, row] = torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ v[b, h // group]
    return out


def as_indices(member: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """`indices` and `counts` of a set given as booleans `[B, G, N]`."""
    N = member.shape[-1]
    columns = torch.where(member, torch.arange(N), N).sort(-1).values
    return torch.where(columns < N, columns, -1).int().to(device), member.sum(-1).int().to(device)


def draw_set(case: AttentionCase) -> Tensor:
    """Booleans `[B, G, N]`: now and then all valid columns or none, else each with one of a few probabilities."""
    share = (0.0, 0.2, 0.5, 0.8, 1.1)[case.seed % 5]
    member = torch.rand(case.B, case.groups, case.N, generator=case.random) < share
    for b, (first, end, _) in enumerate(zip(*case.bounds, strict=True)):
        member[b, :, :first] = member[b, :, end:] = False
    return member


def check_sparse_attention(
    fn: Callable[..., Tensor],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """Against masked dense attention in float64, with keys in place and compacted; rows outside the set exactly 0.

    Columns and rows outside the set hold NaN and must not leak. The same bits at a rerun, and alone as in a batch.
    """

    def test(case: AttentionCase) -> None:
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k, v = (case.tensor(case.Hkv, case.N, device, dtype) for _ in range(2))
        member = draw_set(case)
        indices, counts = as_indices(member, device)
        starts, q_start = case.bounds[2], case.lengths(device)["q_start"]
        scale = case.D**-0.5
        exact, plain = (exact_sparse_attention(q, k, v, member, starts, scale, t) for t in (torch.float64, dtype))
        allowed = atom(q, k, scale, v.abs().max().item(), dtype)
        at = torch.tensor(starts)[:, None, None] + torch.arange(case.M)
        row_kept = member.gather(-1, at.clamp(0, case.N - 1).expand(-1, case.groups, -1)) & (at >= 0) & (at < case.N)
        row_kept = row_kept.repeat_interleave(case.Hkv * case.group // case.groups, 1)

        q[~row_kept.to(device)] = torch.nan
        outside = ~member.expand(-1, case.Hkv, -1).to(device)
        k[outside], v[outside] = torch.nan, torch.inf
        out = fn(q, k, v, indices, counts, q_start=q_start)
        small_k, small_v = (_gathered(case, x, member) for x in (k, v))
        compacted = fn(q, small_k, small_v, indices, counts, q_start=q_start, kv_compacted=True)
        for name, got in (("out", out), ("out of compacted keys", compacted)):
            assert got.dtype == dtype, f"{name}: expected {dtype}, got {got.dtype}"
            assert_within(name, got, exact, plain, allowed)
            assert bool((got.cpu()[~row_kept] == 0).all()), f"{name}: expected exactly 0 in rows outside the set"

        assert_same_bits("out, run again", out, fn(q, k, v, indices, counts, q_start=q_start))
        for b in range(case.B):
            *one, start = one_sequence(b, q, k, v, indices, counts, q_start)
            assert_same_bits(f"out, sequence {b} alone", out[b : b + 1], fn(*one, q_start=start))
            *one, start = one_sequence(b, q, small_k, small_v, indices, counts, q_start)
            alone = fn(*one, q_start=start, kv_compacted=True)
            assert_same_bits(f"out of compacted keys, sequence {b} alone", compacted[b : b + 1], alone)

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def _gathered(case: AttentionCase, x: Tensor, member: Tensor) -> Tensor:
    """Rows of the set moved to the front; NaN behind them."""
    moved = torch.full_like(x, torch.nan)
    for b in range(case.B):
        for h in range(case.Hkv):
            kept = x[b, h, member[b, h % case.groups].to(x.device)]
            moved[b, h, : kept.shape[0]] = kept
    return case.lay(moved)
