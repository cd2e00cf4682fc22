"""Checks of packed sequences: each is right, and has the bits of the dense form on this sequence alone.

`same_bits=False` leaves out the comparison of floats with the dense form, for an implementation that pads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zipvl_reference.probe_rows import probe_rows
from zipvl_reference.testing.budget import assert_same_bits, assert_within, atom
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, st, strided
from zipvl_reference.testing.score_tokens import exact_scores
from zipvl_reference.testing.sparse_attention import as_indices, exact_sparse_attention
from zipvl_reference.testing.zipvl_prefill import KEEP_FIRST, KEEP_RECENT, assert_prefill


@dataclass(frozen=True)
class Sequences:
    """Drawn packed sequences, among them an empty one and one of length 1."""

    case: AttentionCase
    lengths: list[int]

    @property
    def rows(self) -> list[slice]:
        """The rows of each."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - n, end) for n, end in zip(self.lengths, ends, strict=True)]

    @property
    def total(self) -> int:
        """Rows, now and then some of no sequence."""
        return sum(self.lengths) + self.case.seed % 3

    def where(self, device: str) -> dict[str, Any]:
        """`cu_seqlens`, and a `max_seqlen` that is the longest length or more."""
        bounds = torch.tensor([0, *(rows.stop for rows in self.rows)], dtype=torch.int32, device=device)
        longest = max(self.lengths)
        return {"cu_seqlens": strided(bounds), "max_seqlen": longest if self.case.seed % 2 else longest + 1000}

    def tensor(self, heads: int, device: str, dtype: torch.dtype) -> Tensor:
        """`[T, heads, D]`, with heads or rows next to each other in memory, or a slice of a buffer of more heads."""
        factor = {"normal": 1.0, "equal": 0.0, "peaked": 12.0}[self.case.values]
        x = torch.randn(self.total, heads, self.case.D, generator=self.case.random) * factor + (factor == 0)
        return self.lay(x.to(device, dtype))

    def lay(self, x: Tensor) -> Tensor:
        """A copy of `x` in the case's layout; NaN in rows of no sequence, and between the heads of a slice."""
        x = x.clone()
        x[sum(self.lengths) :] = torch.nan
        if self.case.layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.case.layout == "sliced":
            return torch.nn.functional.pad(x, (0, 0, 1, 2), value=torch.nan)[:, 1:-2]
        return x.contiguous()

    def without_others(self, b: int, x: Tensor) -> Tensor:
        """`x` with NaN and inf in all rows but those of sequence `b`."""
        poisoned = self.lay(x)
        poisoned[: self.rows[b].start] = torch.nan
        poisoned[self.rows[b].stop :] = torch.inf
        return poisoned

    def one(self, b: int) -> tuple[AttentionCase, slice]:
        """Sequence `b` as a dense case of its own, and its rows."""
        n = self.lengths[b]
        return replace(self.case, B=1, M=n, N=n, padding="none"), self.rows[b]


def dense(x: Tensor, rows: slice) -> Tensor:
    """These rows of `x [T, heads, D]` as `[1, heads, n, D]`, in the same memory."""
    return x[rows].transpose(0, 1)[None]


def sequences(head_dims: Sequence[int], max_tokens: int) -> "st.SearchStrategy[Sequences]":
    """Packed sequences of at most `max_tokens` tokens each."""

    def finish(case: AttentionCase, lengths: list[int], at: tuple[int, int]) -> Sequences:
        lengths = [min(n, max_tokens) for n in lengths]
        for special, place in zip((0, 1), at, strict=True):
            lengths.insert(min(place, len(lengths)), special)
        return Sequences(case, lengths)

    places = st.tuples(st.integers(0, 3), st.integers(0, 3))
    lengths = st.lists(st.integers(1, max_tokens), min_size=1, max_size=3)
    return st.builds(finish, attention_cases(head_dims, max_tokens), lengths, places)


def check_packed_probe_rows(
    fn: Callable[..., Tensor], *, device: str = "cpu", max_examples: int = 50, derandomize: bool = False
) -> None:
    """Each sequence has the rows that `probe_rows` draws for its length, and then -1."""

    def test(drawn: tuple[Sequences, int, int, int]) -> None:
        packed, num_recent, num_random, seed = drawn
        where = packed.where(device)
        options: dict[str, Any] = {"num_recent": num_recent, "num_random": num_random, "seed": seed}
        rows = fn(where["max_seqlen"], **options, cu_seqlens=where["cu_seqlens"])
        assert rows.dtype == torch.int32
        assert rows.shape == (len(packed.lengths), min(where["max_seqlen"], num_recent + num_random))
        for b, n in enumerate(packed.lengths):
            wanted = probe_rows(n, **options)
            wanted = torch.nn.functional.pad(wanted, (0, rows.shape[1] - len(wanted)), value=-1)
            assert_same_bits(f"the rows of sequence {b} of length {n}", wanted, rows[b].cpu())

    sizes = st.tuples(sequences((4,), 300), st.integers(0, 80), st.integers(0, 80), st.integers(0, 2**40))
    for_each(sizes.filter(lambda c: c[1] + c[2] > 0), test, max_examples=max_examples, derandomize=derandomize)


def check_packed_score_tokens(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    same_bits: bool = True,
) -> None:
    """Both scores against float64, and against the dense form; other sequences never leak."""

    def test(packed: Sequences) -> None:
        case, where = packed.case, packed.where(device)
        q, k = packed.tensor(case.Hkv * case.group, device, dtype), packed.tensor(case.Hkv, device, dtype)
        probes: dict[str, Any] = {"num_recent": 3, "num_random": 4, "seed": case.seed % 5}
        if case.seed % 2:  # one list of probes for all sequences, some of which have not all of the rows
            rows = torch.randperm(max(packed.lengths), generator=case.random)[:6].int()
        else:
            rows = probe_rows(where["max_seqlen"], **probes, cu_seqlens=where["cu_seqlens"].cpu())
        options: dict[str, Any] = {"pool": case.pool, **({} if case.seed % 3 else {"scale": 0.3})}
        scale = options.get("scale", case.D**-0.5)
        got = fn(q, k, rows.to(device), **where, **options)
        hidden = case.seed % len(packed.lengths)
        shown = packed.without_others(hidden, q), packed.without_others(hidden, k)
        poisoned = fn(*shown, rows.to(device), **where, **options)
        for b, n in enumerate(packed.lengths):
            one, at = packed.one(b)
            Q, K = dense(q, at), dense(k, at)
            mine = rows if rows.dim() == 1 else probe_rows(n, **probes)
            alone = fn(Q, K, mine.to(device), **options)
            inside = mine[mine < n][None]
            exact, plain = (exact_scores(one, Q, K, inside, scale, t) for t in (torch.float64, dtype))
            for i, name in enumerate((f"accumulated, sequence {b}", f"normalized, sequence {b}")):
                mine_packed = got[i][:, at][None]
                largest = exact[i].max().item() if n else 0.0
                allowed = atom(Q, K, scale, largest, torch.float32) if n else 0.0
                assert_within(name, mine_packed, exact[i], plain[i], allowed)
                if same_bits:
                    assert_same_bits(f"{name} alone", alone[i], mine_packed)
                if b == hidden:
                    assert_same_bits(f"{name} among others", poisoned[i][:, at][None], mine_packed)

    for_each(sequences(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_packed_select_tokens(
    fn: Callable[..., tuple[Tensor, Tensor]],
    *,
    device: str = "cpu",
    max_examples: int = 50,
    derandomize: bool = False,
    max_tokens: int = 48,
) -> None:
    """The dense form's sets, counted within each sequence, with many ties, NaN and any strides of the scores."""

    def test(packed: Sequences) -> None:
        case, where = packed.case, packed.where(device)
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0**-33, torch.nan, torch.inf, -1.0])
        pick = torch.randint(8, (2, packed.total, case.groups), generator=case.random)
        scores = torch.where(pick < 5, torch.rand(pick.shape, generator=case.random), values[pick]).to(device)
        a, n = scores.mT if case.layout == "transposed" else scores.mT.contiguous()
        share = (0.3, 0.7, 0.9, 1.0)[case.seed % 4]
        forced = {"keep_first": case.seed % 3, "keep_recent": case.seed % 5}
        options = {("tau" if case.seed % 2 else "keep_ratio"): share, **forced}
        indices, counts = fn(a, n, **where, **options)
        assert indices.shape == (case.groups, packed.total), f"indices: got shape {list(indices.shape)}"
        for b, at in enumerate(packed.rows):
            wanted = fn(a[None, :, at], n[None, :, at], **options)
            assert_same_bits(f"indices, sequence {b}", wanted[0], indices[None, :, at])
            assert_same_bits(f"counts, sequence {b}", wanted[1], counts[b : b + 1])

    for_each(sequences((4,), max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_packed_sparse_attention(
    fn: Callable[..., Tensor],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    same_bits: bool = True,
) -> None:
    """Against masked dense attention in float64, and against the dense form, with keys in place and compacted.

    Columns and rows outside of the sets hold NaN, and so do other sequences: nothing leaks.
    """

    def test(packed: Sequences) -> None:
        case, where = packed.case, packed.where(device)
        q = packed.tensor(case.Hkv * case.group, device, dtype)
        k, v = (packed.tensor(case.Hkv, device, dtype) for _ in range(2))
        clean, scale = (q.clone(), k.clone(), v.clone()), case.D**-0.5
        small_k, small_v = packed.lay(torch.full_like(k, torch.nan)), packed.lay(torch.full_like(v, torch.nan))
        indices = torch.full((case.groups, packed.total), -1, dtype=torch.int32, device=device)
        counts = torch.zeros(len(packed.lengths), case.groups, dtype=torch.int32, device=device)
        share = (0.0, 0.2, 0.5, 0.8, 1.1)[case.seed % 5]
        members, shared = [], case.Hkv * case.group // case.groups
        for b, (n, at) in enumerate(zip(packed.lengths, packed.rows, strict=True)):
            member = torch.rand(1, case.groups, n, generator=case.random) < share
            members.append(member)
            indices[:, at], counts[b] = (x[0] for x in as_indices(member, device))
            q[at].mT[(~member[0]).T.repeat_interleave(shared, 1).to(device)[:, None].expand_as(q[at].mT)] = torch.nan
            for x, small in ((k, small_k), (v, small_v)):
                for h in range(case.Hkv):
                    kept = member[0, h % case.groups].to(device)
                    small[at, h][: int(kept.sum())] = x[at, h][kept]
                    x[at, h] = x[at, h].masked_fill(~kept[:, None], torch.nan)
        hidden = case.seed % len(packed.lengths)
        for name, keys, options in (
            ("out", (k, v), {}),
            ("out of compacted", (small_k, small_v), {"kv_compacted": True}),
        ):
            out = fn(q, *keys, indices, counts, **where, **options)
            shown = [packed.without_others(hidden, x) for x in (q, *keys)]
            poisoned = fn(*shown, indices, counts, **where, **options)
            assert out.shape == q.shape
            for b, (member, at) in enumerate(zip(members, packed.rows, strict=True)):
                got, (Q, K, V) = dense(out, at), (dense(x, at) for x in clean)
                exact, plain = (exact_sparse_attention(Q, K, V, member, [0], scale, t) for t in (torch.float64, dtype))
                allowed = atom(Q, K, scale, V.abs().max().item(), dtype) if packed.lengths[b] else 0.0
                assert_within(f"{name}, sequence {b}", got, exact, plain, allowed)
                dropped = ~member.repeat_interleave(shared, 1)
                assert bool((got.cpu()[dropped] == 0).all()), f"{name}, sequence {b}: expected 0 outside of the set"
                if same_bits:
                    given = [dense(x, at) for x in (q, *keys)]
                    alone = fn(*given, indices[None, :, at], counts[b : b + 1], **options)
                    assert_same_bits(f"{name}, sequence {b} alone", alone, got)
                if b == hidden:
                    assert_same_bits(f"{name}, sequence {b} among others", dense(poisoned, at), got)

    for_each(sequences(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_packed_zipvl_prefill(
    fn: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 40,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    same_bits: bool = True,
) -> None:
    """All steps as one call: as `check_zipvl_prefill` for each sequence, and as the dense form on it alone."""

    def test(packed: Sequences) -> None:
        case, where = packed.case, packed.where(device)
        q = packed.tensor(case.Hkv * case.group, device, dtype)
        k, v = (packed.tensor(case.Hkv, device, dtype) for _ in range(2))
        by_tau, share = case.seed % 2 == 0, (0.3, 0.7, 0.9, 1.0)[case.seed % 4]
        probes: dict[str, Any] = {"num_recent": 3, "num_random": 3, "seed": case.seed % 5}
        options: dict[str, Any] = {
            ("tau" if by_tau else "keep_ratio"): share,
            **probes,
            "pool": case.pool,
            "keep_first": KEEP_FIRST,
            "keep_recent": KEEP_RECENT,
        }
        before = packed.lay(k), packed.lay(v)
        out, indices, counts = fn(q, k, v, **where, **options)
        for b, n in enumerate(packed.lengths):
            one, at = packed.one(b)
            result = dense(out, at), indices[None, :, at], counts[b : b + 1]
            if not n:
                assert not counts[b].any(), f"counts, empty sequence {b}: got {counts[b].tolist()}"
                continue
            old = dense(before[0], at), dense(before[1], at)
            now = dense(k, at), dense(v, at)
            rows = probe_rows(n, **probes)[None]
            assert_prefill(one, rows, share, by_tau, (dense(q, at), *old), old, now, result)
            if same_bits:
                copies = (dense(packed.lay(x), at) for x in before)
                alone = fn(dense(q, at), *copies, **options)
                for name, single, mine in zip(("out", "indices", "counts"), alone, result, strict=True):
                    assert_same_bits(f"{name}, sequence {b} alone", single, mine)

    for_each(sequences(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)
