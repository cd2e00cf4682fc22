"""Checks of `sparse_attention`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, one_sequence
from zipvl_reference.testing.pages import BLOCK_SIZES, PagedCase, paged_cases


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
        clean = q.clone(), k.clone(), v.clone()
        row_kept = _rows_kept(case, member, starts)

        q[~row_kept.to(device)] = torch.nan
        outside = ~member.expand(-1, case.Hkv, -1).to(device)
        k[outside], v[outside] = torch.nan, torch.inf
        out = fn(q, k, v, indices, counts, q_start=q_start)
        small_k, small_v = (_gathered(case, x, member) for x in (k, v))
        compacted = fn(q, small_k, small_v, indices, counts, q_start=q_start, kv_compacted=True)
        _assert_attended({"out": out, "out of compacted keys": compacted}, *clean, member, starts, row_kept)

        assert_same_bits("out, run again", out, fn(q, k, v, indices, counts, q_start=q_start))
        for b in range(case.B):
            *one, start = one_sequence(b, q, k, v, indices, counts, q_start)
            assert_same_bits(f"out, sequence {b} alone", out[b : b + 1], fn(*one, q_start=start))
            *one, start = one_sequence(b, q, small_k, small_v, indices, counts, q_start)
            alone = fn(*one, q_start=start, kv_compacted=True)
            assert_same_bits(f"out of compacted keys, sequence {b} alone", compacted[b : b + 1], alone)

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_paged_sparse_attention(
    fn: Callable[..., Tensor],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> None:
    """`sparse_attention` over pages, as `check_sparse_attention`: in both layouts, with first pages that are shared.

    Rows outside the set and pages that are not used hold NaN; entries of the block table that are not used name no
    page. `indices` may be narrower or wider than the pages.
    """

    def test(paged: PagedCase) -> None:
        case, used = paged.rows, paged.used
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k, v = (case.tensor(case.Hkv, case.N, device, dtype) for _ in range(2))
        same = paged.shared(used) * paged.block_size
        k[:, :, :same], v[:, :, :same] = k[:1, :, :same].clone(), v[:1, :, :same].clone()
        member, starts, lengths = draw_set(case), paged.bounds[2], paged.lengths(device)
        indices, counts = as_indices(member, device)
        if case.seed % 4 == 0:  # as wide as the largest set
            indices = indices[..., : int(counts.max())]
        elif case.seed % 4 == 1:
            indices = torch.nn.functional.pad(indices, (0, 300), value=-1)
        clean = q.clone(), k.clone(), v.clone()
        row_kept = _rows_kept(case, member, starts)

        q[~row_kept.to(device)] = torch.nan
        outside = ~member.expand(-1, case.Hkv, -1)
        outside[..., :same] = False  # another sequence may have them in its set
        k[outside.to(device)], v[outside.to(device)] = torch.nan, torch.inf
        table = paged.table(used, device)
        pools = paged.spread(k, table, used, torch.nan), paged.spread(v, table, used, torch.inf)
        sizes, own = member.sum(-1).expand(-1, case.Hkv), replace(paged, share=0.0)  # compacted pages are of one alone
        front = own.table(sizes, device)
        moved = [own.spread(_gathered(case, x, member), front, sizes, torch.nan) for x in (k, v)]

        def call(b: slice, kv_compacted: bool) -> Tensor:
            where = {name: None if x is None else x[b] for name, x in lengths.items() if name != "leftpad_k"}
            options = {"kv_compacted": kv_compacted, "layout": paged.layout, **where}
            if kv_compacted:
                return fn(q[b], *moved, indices[b], counts[b], block_table=front[b], **options)
            return fn(q[b], *pools, indices[b], counts[b], block_table=table[b], **options)

        found = {name: call(slice(None), name != "out") for name in ("out", "out of compacted keys")}
        _assert_attended(found, *clean, member, starts, row_kept)
        for name, out in found.items():
            assert_same_bits(f"{name}, run again", out, call(slice(None), name != "out"))
            for b in range(case.B):
                assert_same_bits(f"{name}, sequence {b} alone", out[b : b + 1], call(slice(b, b + 1), name != "out"))

    cases = paged_cases(head_dims, max_tokens, block_sizes)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)


def _rows_kept(case: AttentionCase, member: Tensor, starts: Sequence[int]) -> Tensor:
    """Which query rows stand on a column of their set, `[B, Hq, M]`."""
    at = torch.tensor(starts)[:, None, None] + torch.arange(case.M)
    kept = member.gather(-1, at.clamp(0, case.N - 1).expand(-1, case.groups, -1)) & (at >= 0) & (at < case.N)
    return kept.repeat_interleave(case.Hkv * case.group // case.groups, 1)


def _assert_attended(
    found: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, member: Tensor, starts: Sequence[int], row_kept: Tensor
) -> None:
    """Each output, named, is within the budget, and exactly 0 in rows outside the set."""
    scale, dtype = q.shape[3] ** -0.5, q.dtype
    exact, plain = (exact_sparse_attention(q, k, v, member, starts, scale, t) for t in (torch.float64, dtype))
    for name, got in found.items():
        assert got.dtype == dtype, f"{name}: expected {dtype}, got {got.dtype}"
        assert_within(name, got, exact, plain, atom(q, k, scale, v.abs().max().item(), dtype))
        assert bool((got.cpu()[~row_kept] == 0).all()), f"{name}: expected exactly 0 in rows outside the set"


def _gathered(case: AttentionCase, x: Tensor, member: Tensor) -> Tensor:
    """Rows of the set moved to the front; NaN behind them."""
    moved = torch.full_like(x, torch.nan)
    for b in range(case.B):
        for h in range(case.Hkv):
            kept = x[b, h, member[b, h % case.groups].to(x.device)]
            moved[b, h, : kept.shape[0]] = kept
    return case.lay(moved)
