"""Checks of `score_tokens`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, one_sequence
from zipvl_reference.testing.pages import BLOCK_SIZES, PagedCase, paged_cases

Bounds = tuple[list[int], list[int], list[int]]  # first and end of the valid columns, and where query row 0 stands


def exact_scores(
    case: AttentionCase,
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    scale: float,
    dtype: torch.dtype,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """Both scores by the definition, one probe and head at a time, computed in `dtype`. `rows` is `[B, P]`."""
    shared = case.group if case.pool == "kv_head" else case.group * case.Hkv
    accumulated = torch.zeros(case.B, case.groups, case.N, dtype=dtype)
    seen = torch.zeros(case.B, 1, case.N, dtype=dtype)
    q, k = q.cpu().to(dtype), k.cpu().to(dtype)
    for b, (first, end, start) in enumerate(zip(*(bounds or case.bounds), strict=True)):
        for row in rows[b].tolist():
            at = start + row
            if not first <= at < end:
                continue
            seen[b, 0, first : at + 1] += 1
            for h in range(case.Hkv * case.group):
                scores = k[b, h // case.group, first : at + 1] @ q[b, h, row] * scale
                accumulated[b, h // shared, first : at + 1] += torch.softmax(scores, -1)
    return accumulated, torch.where(seen > 0, accumulated / (shared * seen.clamp(min=1)), 0)


def assert_scores(
    got: tuple[Tensor, Tensor], case: AttentionCase, q: Tensor, k: Tensor, rows: Tensor, scale: float, bounds: Bounds
) -> None:
    """Both scores are within the budget, and exactly 0 in columns that no probe sees."""
    exact, plain = (exact_scores(case, q, k, rows, scale, dtype, bounds) for dtype in (torch.float64, q.dtype))
    for name, g, e, p in zip(("accumulated", "normalized"), got, exact, plain, strict=True):
        assert g.dtype == torch.float32, f"{name}: expected float32, got {g.dtype}"
        assert_within(name, g, e, p, atom(q, k, scale, e.max().item(), torch.float32))
        assert bool((g.cpu()[e == 0] == 0).all()), f"{name}: expected exactly 0 where no probe sees the column"


def draw_probes(case: AttentionCase, device: str) -> tuple[Tensor, Tensor]:
    """Probe rows as `[B, P]` on the CPU, and as the argument: of each sequence, or one list for all."""
    P = int(case.integers(1, min(case.M, 8), 1))
    per_sequence = [torch.randperm(case.M, generator=case.random)[:P].sort().values for _ in range(case.B)]
    rows = torch.stack(per_sequence).int()
    if case.seed % 2:
        rows = rows[:1].expand(case.B, P)
    return rows, (rows[0] if case.seed % 2 else rows).to(device)


def check_score_tokens(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """Both scores against float64; padding never leaks; the same bits at a rerun, and alone as in a batch."""

    def test(case: AttentionCase) -> None:
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k = case.tensor(case.Hkv, case.N, device, dtype)
        rows, given = draw_probes(case, device)
        scale = case.D**-0.5 if case.seed % 3 else 0.3
        lengths = case.lengths(device)
        clean_q, clean_k = q.clone(), k.clone()
        case.poison(q, k)
        options = {"pool": case.pool, **({} if case.seed % 3 else {"scale": scale})}

        got = fn(q, k, given, **lengths, **options)
        assert_scores(got, case, clean_q, clean_k, rows, scale, case.bounds)

        again = fn(q, k, given, **lengths, **options)
        for b in range(case.B):
            q_b, k_b, *at = one_sequence(b, q, k, *lengths.values())
            rows_b = given if given.dim() == 1 else given[b : b + 1].clone()
            alone = fn(q_b, k_b, rows_b, **dict(zip(lengths, at, strict=True)), **options)
            for name, g, rerun, single in zip(("accumulated", "normalized"), got, again, alone, strict=True):
                assert_same_bits(f"{name}, run again", g, rerun)
                assert_same_bits(f"{name}, sequence {b} alone", g[b : b + 1], single)

    cases = attention_cases(head_dims, max_tokens)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)


def check_paged_score_tokens(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> None:
    """`score_tokens` over pages, as `check_score_tokens`: in both layouts, with first pages that are shared.

    Rows and pages that are not used hold NaN; entries of the block table that are not used name no page.
    """

    def test(paged: PagedCase) -> None:
        case, used = paged.rows, paged.used
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k = case.tensor(case.Hkv, case.N, device, dtype)
        rows, given = draw_probes(case, device)
        same = paged.shared(used) * paged.block_size
        k[:, :, :same] = k[:1, :, :same].clone()
        clean_q, clean_k = q.clone(), k.clone()
        for b, (first, end, start) in enumerate(zip(*paged.bounds, strict=True)):
            at = start + torch.arange(case.M)
            q[b, :, ((at < first) | (at >= end)).to(device)] = torch.nan
            if not same:
                k[b, :, :first] = torch.nan
        table, lengths = paged.table(used, device), paged.lengths(device)
        pool = paged.spread(k, table, used, torch.nan)

        def call(b: slice) -> tuple[Tensor, Tensor]:
            where = {name: None if x is None else x[b] for name, x in lengths.items()}
            mine = given if given.dim() == 1 else given[b]
            return fn(q[b], pool, mine, **where, pool=case.pool, block_table=table[b], layout=paged.layout)

        got, again = call(slice(None)), call(slice(None))
        width = paged.max_blocks * paged.block_size
        for name, x in zip(("accumulated", "normalized"), got, strict=True):
            assert x.shape[-1] == width, f"{name}: expected {width} columns, got shape {list(x.shape)}"
            assert not x[..., case.N :].any(), f"{name}: expected exactly 0 in columns that are not used"
        of_rows = got[0][..., : case.N], got[1][..., : case.N]
        assert_scores(of_rows, case, clean_q, clean_k, rows, case.D**-0.5, paged.bounds)
        for b in range(case.B):
            alone = call(slice(b, b + 1))
            for name, g, rerun, single in zip(("accumulated", "normalized"), got, again, alone, strict=True):
                assert_same_bits(f"{name}, run again", g, rerun)
                assert_same_bits(f"{name}, sequence {b} alone", g[b : b + 1], single)

    cases = paged_cases(head_dims, max_tokens, block_sizes)
    for_each(cases, test, max_examples=max_examples, derandomize=derandomize)
