"""Checks of `zipvl_prefill_`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zipvl_reference.probe_rows import probe_rows
from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, one_sequence
from zipvl_reference.testing.score_tokens import exact_scores
from zipvl_reference.testing.sparse_attention import as_indices, exact_sparse_attention

KEEP_FIRST, KEEP_RECENT = 1, 2


def check_zipvl_prefill(
    fn: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 40,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """All steps as one call: a set that the exact scores justify, its rows in front of `k, v`, and its attention.

    A float error of the scores within their budget may move the count, or swap tokens whose scores are that close; no
    more. The same bits at a rerun, and alone as in a batch.
    """

    def test(case: AttentionCase) -> None:
        q = case.tensor(case.Hkv * case.group, case.M, device, dtype)
        k, v = (case.tensor(case.Hkv, case.N, device, dtype) for _ in range(2))
        by_tau, share = case.seed % 2 == 0, (0.3, 0.7, 0.9, 1.0)[case.seed % 4]
        probes: dict[str, Any] = {"num_recent": 3, "num_random": 3, "seed": case.seed % 5}
        options: dict[str, Any] = {
            ("tau" if by_tau else "keep_ratio"): share,
            **probes,
            **case.lengths(device),
            "pool": case.pool,
            "keep_first": KEEP_FIRST,
            "keep_recent": KEEP_RECENT,
        }
        clean = q.clone(), k.clone(), v.clone()
        case.poison(q, k, v)
        before = case.lay(k), case.lay(v)  # `clone` would drop the layout
        out, indices, counts = fn(q, k, v, **options)

        rows = probe_rows(case.M, **probes).expand(case.B, -1)
        assert_prefill(case, rows, share, by_tau, clean, before, (k, v), (out, indices, counts))

        for b in range(case.B):
            given = {name: o[b : b + 1] if isinstance(o, Tensor) else o for name, o in options.items()}
            alone = fn(*one_sequence(b, q, *before), **given)
            for name, batch, single in zip(("out", "indices", "counts"), (out, indices, counts), alone, strict=True):
                assert_same_bits(f"{name}, sequence {b} alone", batch[b : b + 1], single)

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def assert_prefill(
    case: AttentionCase,
    rows: Tensor,
    share: float,
    by_tau: bool,
    clean: tuple[Tensor, Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    result: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`result` is right for probes `rows [B, P]`, `q, k, v` that are `clean` of poison, `k, v` `before` and `after`."""
    scale, dtype, (out, indices, counts) = case.D**-0.5, clean[0].dtype, result
    exact, plain = (exact_scores(case, *clean[:2], rows, scale, t) for t in (torch.float64, dtype))
    slack = [
        2 * (p.double() - e).abs().max().item() + atom(*clean[:2], scale, e.max().item(), torch.float32)
        for p, e in zip(plain, exact, strict=True)
    ]
    member = _members(case, indices, counts)
    for b, (first, end, _) in enumerate(zip(*case.bounds, strict=True)):
        for g in range(case.groups):
            columns = slice(first, max(first, end))
            scores = exact[0][b, g, columns], exact[1][b, g, columns]
            _assert_justified(*scores, member[b, g, columns], share, by_tau, slack, f"[{b}, {g}]")
    for name, now, old in (("k", after[0], before[0]), ("v", after[1], before[1])):
        for b in range(case.B):
            for h in range(case.Hkv):
                kept = old[b, h, member[b, h % case.groups].to(old.device)]
                assert_same_bits(f"{name}[{b}, {h}], compacted", kept, now[b, h, : kept.shape[0]])
    wanted, usual = (exact_sparse_attention(*clean, member, case.bounds[2], scale, t) for t in (torch.float64, dtype))
    assert_within("out", out, wanted, usual, atom(*clean[:2], scale, clean[2].abs().max().item(), dtype))


def _members(case: AttentionCase, indices: Tensor, counts: Tensor) -> Tensor:
    """The returned set as booleans `[B, G, N]`, after a check of its form."""
    member = torch.zeros(case.B, case.groups, case.N + 1, dtype=torch.bool)
    member.scatter_(-1, indices.cpu().long() % (case.N + 1), True)  # -1 falls on the column that is cut off
    member = member[..., : case.N]
    wanted = as_indices(member, "cpu")
    assert_same_bits("indices, ascending and then -1", wanted[0], indices.cpu())
    assert_same_bits("counts", wanted[1], counts.cpu())
    return member


def _assert_justified(
    accumulated: Tensor,
    normalized: Tensor,
    kept: Tensor,
    share: float,
    by_tau: bool,
    slack: list[float],
    where: str,
) -> None:
    """The valid columns `kept` of one sequence and group follow the rule, for scores at most `slack` off."""
    n, p = kept.numel(), int(kept.sum())
    forced = torch.zeros(n, dtype=torch.bool)
    forced[:KEEP_FIRST] = True
    forced[max(0, n - KEEP_RECENT) :] = True
    low = high = math.ceil(share * n)
    if by_tau:
        sums = accumulated.sort(descending=True).values.cumsum(0)
        total = float(sums[-1]) if n else 0.0
        off = n * (slack[0] + 2.0**-32)  # of any sum of scores; a mass drops less than one unit
        low = int((sums < share * total - 2 * off).sum()) + 1
        high = int((sums < share * total + 2 * off).sum()) + 1
        if total == 0:
            low = high = n
    low, high = (min(max(x, KEEP_FIRST + KEEP_RECENT, 1), n) for x in (low, high))
    assert low <= p <= high, f"counts{where}: expected {low} to {high}, got {p}"
    assert bool(kept[forced].all()), f"indices{where}: expected the first {KEEP_FIRST} and last {KEEP_RECENT} columns"
    chosen, left = normalized[kept & ~forced], normalized[~kept]
    if chosen.numel() and left.numel():
        least, best = chosen.min().item(), left.max().item()
        assert least >= best - 2 * slack[1], f"indices{where}: column of {least:.6g} kept before one of {best:.6g}"
