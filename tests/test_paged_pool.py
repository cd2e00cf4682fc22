"""An engine's page pool, at random: sequences grow, are compacted, share prefixes and end. Beside it a plain model.

Every row of the pool that holds a token holds the number of that token, so what is lost or overwritten shows. Pages are
counted by how many sequences use them. All calls run under ZIPVL_CHECK=1: what an engine does right raises nothing.
"""

import importlib.util
import os
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import zipvl_kernels as zk

D, HKV = 2, 2
picks = st.integers(0, 2**32 - 1)


class Sequence:
    """The pages of a sequence, and the tokens that each head holds, in order."""

    def __init__(self, pages, tokens):
        self.pages = pages
        self.tokens = tokens  # of each head

    @property
    def longest(self):
        return max(map(len, self.tokens))


class Engine(RuleBasedStateMachine):
    backend = "reference"

    @initialize(
        layout=st.sampled_from(["NHD", "HND"]), size=st.sampled_from([1, 2, 3, 5]), groups=st.sampled_from([1, 2])
    )
    def start(self, layout, size, groups):
        self.layout, self.size, self.groups = layout, size, groups
        self.num_blocks = 40 // size
        shape = (self.num_blocks, size, HKV, D) if layout == "NHD" else (self.num_blocks, HKV, size, D)
        self.k, self.v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.free = list(range(self.num_blocks))
        self.users = [0] * self.num_blocks
        self.sequences = []
        self.token = 0

    def teardown(self):
        if hasattr(self, "free"):
            for sequence in list(self.sequences):
                self.release(sequence, len(sequence.pages))
            assert sorted(self.free) == list(range(self.num_blocks)), "pages have leaked"

    # What an engine does.

    @rule(length=st.integers(0, 12))
    def allocate(self, length):
        self.grow_new(Sequence([], [[] for _ in range(HKV)]), length)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, full=st.integers(0, 4), length=st.integers(0, 6))
    def share_a_prefix(self, pick, full, length):
        """A new sequence that begins with full pages of another one, and goes on by itself."""
        other = self.one(pick)
        full = min(full, min(map(len, other.tokens)) // self.size)
        pages = other.pages[:full]
        for page in pages:
            self.users[page] += 1
        self.grow_new(Sequence(list(pages), [tokens[: full * self.size] for tokens in other.tokens]), length)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, length=st.integers(1, 5))
    def append(self, pick, length):
        self.grow(self.one(pick), length)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks)
    def end(self, pick):
        sequence = self.one(pick)
        self.release(sequence, len(sequence.pages))
        self.sequences.remove(sequence)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), more=st.integers(0, 3), everyone=st.booleans())
    def compact(self, pick, share, more, everyone):
        """Drop tokens of some sequences, or of all, in one call; never those on pages that others use too."""
        random = torch.Generator().manual_seed(pick)
        chosen = self.sequences if everyone else [self.one(pick)]
        first, sets = [], []
        for sequence in chosen:
            shared = sum(self.users[page] > 1 for page in sequence.pages)
            assert all(self.users[page] > 1 for page in sequence.pages[:shared]), "shared pages are the first ones"
            first.append(min(shared * self.size + more, min(map(len, sequence.tokens))))
            sets.append([])
            for tokens in sequence.tokens[: self.groups]:
                drawn = (torch.rand(len(tokens), generator=random) < share).tolist()
                sets[-1].append([j for j, keep in enumerate(drawn) if keep or j < first[-1]])
        W = max(len(kept) for groups in sets for kept in groups)
        indices = torch.tensor([[kept + [-1] * (W - len(kept)) for kept in groups] for groups in sets])
        counts = torch.tensor([[len(kept) for kept in groups] for groups in sets], dtype=torch.int32)
        before, writable = (
            (self.k.clone(), self.v.clone()),
            {page for s in chosen for page in s.pages if self.users[page] == 1},
        )
        seqused, freed = zk.compact_paged_kv_(
            self.k,
            self.v,
            indices.int().view(len(chosen), self.groups, W),
            counts,
            self.table(chosen),
            self.lengths(chosen),
            layout=self.layout,
            first_writable=torch.tensor(first, dtype=torch.int32),
            backend=self.backend,
        )
        for page in set(range(self.num_blocks)) - writable:
            for now, old in zip((self.k, self.v), before, strict=True):
                assert torch.equal(now[page].nan_to_num(-1), old[page].nan_to_num(-1)), f"page {page} was written"
        assert seqused.view(len(chosen), self.groups).tolist() == counts.tolist()
        for sequence, groups, pages in zip(chosen, sets, freed.tolist(), strict=True):
            sequence.tokens = [[tokens[j] for j in groups[h % self.groups]] for h, tokens in enumerate(sequence.tokens)]
            assert all(self.users[page] == 1 for page in sequence.pages[len(sequence.pages) - pages :])
            self.release(sequence, pages)

    @precondition(lambda self: self.sequences)
    @rule()
    def decode(self):
        """One query row a sequence, over the pages and over what the model says they hold."""
        q = torch.randn(len(self.sequences), 4, 1, D)
        lengths = self.lengths(self.sequences)
        N = max(sequence.longest for sequence in self.sequences) + 1
        k = torch.zeros(len(self.sequences), HKV, N, D)
        for b, sequence in enumerate(self.sequences):
            for h, tokens in enumerate(sequence.tokens):
                k[b, h, : len(tokens)] = self.rows_of(tokens, h)
        options = {"block_table": self.table(self.sequences), "layout": self.layout, "backend": self.backend}
        got = zk.decode_attention(q, self.k, self.v, lengths, scale=1e-3, **options)
        torch.testing.assert_close(got, zk.decode_attention(q, k, -k, lengths, scale=1e-3))

    # What has to hold after each step.

    @invariant()
    def every_token_is_in_its_place(self):
        for sequence in getattr(self, "sequences", ()):
            for h, tokens in enumerate(sequence.tokens):
                rows = self.rows_of(tokens, h)
                for pool, wanted in ((self.k, rows), (self.v, -rows)):
                    held = pool[sequence.pages] if sequence.pages else pool[:0]
                    held = held[:, :, h] if self.layout == "NHD" else held[:, h]
                    assert torch.equal(held.flatten(0, 1)[: len(tokens)], wanted)

    @invariant()
    def every_page_is_free_or_in_use(self):
        if not hasattr(self, "free"):
            return
        counted = [sum(page in sequence.pages for sequence in self.sequences) for page in range(self.num_blocks)]
        assert counted == self.users
        assert sorted(self.free) == [page for page, users in enumerate(counted) if not users]
        for sequence in self.sequences:
            assert len(sequence.pages) == -(-sequence.longest // self.size)

    # Its parts.

    def one(self, pick):
        return self.sequences[pick % len(self.sequences)]

    def grow_new(self, sequence, length):
        self.sequences.append(sequence)
        self.grow(sequence, length)

    def grow(self, sequence, length):
        """Appends as many tokens as there are pages for. The last page is never shared: only full ones are."""
        for _ in range(length):
            if sequence.longest == len(sequence.pages) * self.size:
                if not self.free:
                    return
                page = self.free.pop(self.token % len(self.free))
                sequence.pages.append(page)
                self.users[page] = 1
            self.token += 1
            for h, tokens in enumerate(sequence.tokens):
                page, row = sequence.pages[len(tokens) // self.size], len(tokens) % self.size
                assert self.users[page] == 1
                at = (page, row, h) if self.layout == "NHD" else (page, h, row)
                tokens.append(self.token)
                self.k[at] = self.rows_of([self.token], h)[0]
                self.v[at] = -self.k[at]

    def release(self, sequence, pages):
        for page in sequence.pages[len(sequence.pages) - pages :]:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
        del sequence.pages[len(sequence.pages) - pages :]

    def rows_of(self, tokens, h):
        """Keys of these tokens, `[n, D]`: numbers that no other token or head has. The values are their negatives."""
        return torch.tensor(tokens, dtype=torch.float32)[:, None] * 10 + h + torch.arange(D) * 3

    def table(self, sequences):
        """Some columns more than are needed, without pages."""
        width = max(len(sequence.pages) for sequence in sequences) + 1
        return torch.tensor([s.pages + [-1] * (width - len(s.pages)) for s in sequences], dtype=torch.int32)

    def lengths(self, sequences):
        lengths = torch.tensor([[len(tokens) for tokens in s.tokens] for s in sequences], dtype=torch.int32)
        return lengths[:, 0] if self.groups == 1 else lengths


class TritonEngine(Engine):
    backend = "triton"


def run(machine, examples, steps, phases=tuple(hypothesis.Phase)):
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with mock.patch.dict(os.environ, ZIPVL_CHECK="1"):
        hypothesis.stateful.run_state_machine_as_test(machine, settings=settings)


def test_nothing_is_lost():
    run(Engine, examples=100, steps=30)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pool of this test is on the CPU")
def test_nothing_is_lost_with_triton():
    run(TritonEngine, examples=8, steps=15)


def test_catches_a_page_freed_too_early(monkeypatch):
    compact = zk.compact_paged_kv_

    def frees_too_many(*args, **options):
        seqused, freed = compact(*args, **options)
        return seqused, freed + (seqused.view(len(freed), -1).amax(1) > 0).int()

    monkeypatch.setattr(zk, "compact_paged_kv_", frees_too_many)
    with pytest.raises(AssertionError):
        run(Engine, examples=30, steps=20, phases=[hypothesis.Phase.generate])  # no search for the smallest
