"""Checks of `select_tokens`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipvl_reference.testing.draw import for_each, st, strided

MAX = 2**63 - 1


@dataclass(frozen=True)
class SelectCase:
    """One drawn selection for `B` sequences and `G` groups of `N` columns."""

    accumulated: list[list[list[float]]]
    normalized: list[list[list[float]]]
    tau: float | None
    keep_ratio: float | None
    keep_first: int
    keep_recent: int
    leftpad: list[int] | None
    seqused: list[int] | None


def expected_selection(
    accumulated: list[float], normalized: list[float], first: int, end: int, case: SelectCase
) -> list[int]:
    """The contract's four steps for one sequence and group, in Python's exact integers."""
    valid = list(range(first, end))
    n = len(valid)
    if case.tau is not None:
        masses = [mass(accumulated[j]) for j in valid]
        total = min(sum(masses), MAX)
        need = min(math.ceil(case.tau * float(total)), total)
        p = n
        if total > 0:
            reached = 0
            for p, m in enumerate(sorted(masses, reverse=True), start=1):  # noqa: B007
                reached = min(reached + m, MAX)
                if reached >= need:
                    break
    else:
        assert case.keep_ratio is not None
        p = math.ceil(case.keep_ratio * float(n))
    p = min(max(p, case.keep_first + case.keep_recent, 1), n)
    chosen = {*valid[: case.keep_first], *(valid[-case.keep_recent :] if case.keep_recent else [])}
    for j in sorted(valid, key=lambda j: (math.isnan(normalized[j]), -normalized[j], j)):
        if len(chosen) < p:
            chosen.add(j)
    return sorted(chosen)


def mass(a: float) -> int:
    """The integer mass of one accumulated score."""
    return min(math.floor(a * 2.0**32), MAX) if math.isfinite(a) and a > 0 else 0


def _floats() -> "st.SearchStrategy[float]":
    ties = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0])
    odd = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 2.0**-32, 2.0**-33, 2.0**31, 2.0**30, 3e38, 1e-45])
    return st.one_of(ties, st.floats(0, 8, width=32), odd, st.floats(width=32))


@st.composite
def _cases(draw: Any, max_tokens: int) -> SelectCase:
    B, G, N = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, max_tokens))
    values = draw(st.sampled_from([_floats(), st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0])]))
    table = st.lists(st.lists(st.lists(values, min_size=N, max_size=N), min_size=G, max_size=G), min_size=B, max_size=B)
    accumulated, normalized = draw(table), draw(table)
    share = draw(st.one_of(st.sampled_from([0.5, 0.9, 0.96, 0.975, 0.99, 1.0]), st.floats(0, 1, exclude_min=True)))
    masses = sorted((mass(a) for a in accumulated[0][0]), reverse=True)
    if draw(st.booleans()) and 0 < sum(masses) < MAX:  # a share that some number of columns reaches to the last bit
        share = min(1.0, sum(masses[: draw(st.integers(1, N))]) / sum(masses)) or share
    by_tau = draw(st.booleans())
    free = draw(st.booleans())  # without forced columns and padding, which hide what the scores decide
    forced = st.just(0) if free else st.integers(0, 3)
    bounds = st.none() if free else st.one_of(st.none(), st.lists(st.integers(0, N), min_size=B, max_size=B))
    return SelectCase(
        accumulated,
        normalized,
        share if by_tau else None,
        None if by_tau else share,
        draw(forced),
        draw(forced),
        draw(bounds),
        draw(bounds),
    )


def check_select_tokens(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 200,
    derandomize: bool = False,
    max_tokens: int = 12,
) -> None:
    """The contract's rule, exactly: ties, NaN, infinities, zero and overflowing mass, padding, forced columns.

    Scores are fp32; another `dtype` rounds their values first, as scores of a low-precision model would be. Also: a
    larger tau keeps a superset, and permuted columns give the permuted set.
    """

    def per_sequence(numbers: list[int]) -> Tensor:
        return strided(torch.tensor(numbers, dtype=torch.int32, device=device))

    def call(case: SelectCase, accumulated: Tensor, normalized: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
        options = {
            "keep_first": case.keep_first,
            "keep_recent": case.keep_recent,
            "leftpad_k": None if case.leftpad is None else per_sequence(case.leftpad),
            "seqused_k": None if case.seqused is None else per_sequence(case.seqused),
            "tau": case.tau,
            "keep_ratio": case.keep_ratio,
            **changed,
        }
        indices, counts = fn(accumulated, normalized, **options)
        assert indices.dtype == counts.dtype == torch.int32
        assert indices.shape == accumulated.shape, f"indices: expected {accumulated.shape}, got {indices.shape}"
        assert counts.shape == accumulated.shape[:2], f"counts: expected {accumulated.shape[:2]}, got {counts.shape}"
        return indices, counts

    def test(case: SelectCase) -> None:
        accumulated, normalized = (
            torch.tensor(x, dtype=torch.float32).to(dtype).float() for x in (case.accumulated, case.normalized)
        )
        indices, counts = call(case, accumulated.to(device), normalized.to(device))
        B, G, N = accumulated.shape
        for b in range(B):
            first = 0 if case.leftpad is None else case.leftpad[b]
            end = N if case.seqused is None else case.seqused[b]
            for g in range(G):
                wanted = expected_selection(
                    accumulated[b, g].tolist(), normalized[b, g].tolist(), first, max(first, end), case
                )
                got = indices[b, g].tolist()
                assert got == wanted + [-1] * (N - len(wanted)), (
                    f"indices[{b}, {g}]: expected {wanted} then -1, got {got}"
                )
                assert counts[b, g].item() == len(wanted), f"counts[{b}, {g}]: expected {len(wanted)}"
        if case.tau is not None:
            _larger_tau_keeps_more(case, indices, call(case, accumulated.to(device), normalized.to(device), tau=1.0)[0])

    # Equal columns, and a share that a number of them reaches to the last bit: in fp32, 1/3 and 2/3 are above it.
    for share in (1 / 3, 2 / 3):
        test(SelectCase([[[1.0] * 3]], [[[0.5] * 3]], share, None, 0, 0, None, None))
    for_each(_cases(max_tokens), test, max_examples=max_examples, derandomize=derandomize)

    random = torch.Generator().manual_seed(0)
    for N in (1, 7, 100, 3000):
        scores, order = torch.rand(1, 1, N, generator=random).to(device), torch.randperm(N, generator=random).to(device)
        kept, kept_moved = (fn(x, x, tau=0.6, keep_recent=0) for x in (scores, scores[..., order]))
        members, moved = (indices[0, 0, : int(counts)].long() for indices, counts in (kept, kept_moved))
        assert torch.equal(members, order[moved].sort().values), f"{N} permuted columns give another set"


def _larger_tau_keeps_more(case: SelectCase, some: Tensor, most: Tensor) -> None:
    for a, b in zip(some.flatten(0, 1).tolist(), most.flatten(0, 1).tolist(), strict=True):
        assert set(a) - {-1} <= set(b), f"tau={case.tau} keeps {a}, of which tau=1 loses some: {b}"
