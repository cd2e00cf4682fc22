"""Paged inputs: sequences as an `AttentionCase` draws them, spread over the pages of a pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zipvl_reference.testing.draw import AttentionCase, attention_cases, st, strided

BLOCK_SIZES = (1, 2, 3, 8, 16, 256)


@dataclass(frozen=True)
class PagedCase:
    """One drawn input over a pool. What is random in it comes from the seed of `rows`."""

    rows: AttentionCase
    block_size: int
    layout: str  # "NHD" or "HND"
    share: float  # of the pages that every sequence has, how many the first pages of all are

    @property
    def max_blocks(self) -> int:
        """Width of the block table: one more than the longest sequence needs, now and then."""
        return -(-self.rows.N // self.block_size) + self.rows.seed % 2

    @property
    def num_blocks(self) -> int:
        """Pages of the pool: more than the sequences have."""
        return self.rows.B * self.max_blocks + 2

    @cached_property
    def pages(self) -> Tensor:
        """The page of every row block `[B, max_blocks]`, on the CPU; no two alike."""
        order = torch.randperm(self.num_blocks, generator=self.rows.random)
        return order[: self.rows.B * self.max_blocks].view(self.rows.B, self.max_blocks)

    @cached_property
    def bounds(self) -> tuple[list[int], list[int], list[int]]:
        """Per sequence, as those of `rows`: but most often the last query row stands at the last used row."""
        first, end, start = self.rows.bounds
        return first, end, start if self.rows.seed % 3 == 0 else [n - self.rows.M for n in end]

    @property
    def used(self) -> Tensor:
        """The used rows of `bounds`, `[B, Hkv]` on the CPU."""
        return torch.tensor(self.bounds[1])[:, None].expand(-1, self.rows.Hkv)

    def lengths(self, device: str) -> dict[str, Tensor | None]:
        """The bounds as keyword arguments, None where the default says the same."""
        first, end, start = (torch.tensor(x, dtype=torch.int32, device=device) for x in self.bounds)
        if self.rows.layout == "sliced":
            first, end, start = (strided(x) for x in (first, end, start))
        return {
            "seqused_k": end,
            "leftpad_k": first if any(self.bounds[0]) else None,
            "q_start": start if self.rows.seed % 3 == 0 else None,
        }

    def shared(self, used: Tensor) -> int:
        """How many of the first pages, full in all sequences of `used [B, Hkv]` rows, are the same in all."""
        return int(self.share * (int(used.min()) // self.block_size))

    def table(self, used: Tensor, device: str) -> Tensor:
        """int32 `[B, max_blocks]` for `used [B, Hkv]` rows; what is not used names no page, or one of a sequence."""
        table, shared = self.pages.clone(), self.shared(used)
        table[:, :shared] = self.pages[0, :shared]
        anything = torch.tensor([-1, self.num_blocks, -(2**31), 2**31 - 1, int(self.pages[0, 0])])
        for b, length in enumerate(used.amax(1).tolist()):
            unused = slice(-(-length // self.block_size), None)
            drawn = torch.randint(len(anything), table[b, unused].shape, generator=self.rows.random)
            table[b, unused] = anything[drawn]
        width = table.shape[1]
        wide = torch.cat([table, table], 1) if self.rows.layout == "sliced" else table
        return wide.int().to(device)[:, :width]

    def pool(self, filled: Tensor) -> Tensor:
        """`filled [num_blocks, Hkv, block_size, D]` as a pool: in the case's layout, and its memory in one of three."""
        return self.rows.lay(filled.transpose(1, 2) if self.layout == "NHD" else filled)

    def heads_first(self, pool: Tensor) -> Tensor:
        """A view `[num_blocks, Hkv, block_size, D]` of a pool."""
        return pool.transpose(1, 2) if self.layout == "NHD" else pool

    def spread(self, x: Tensor, table: Tensor, used: Tensor, fill: float) -> Tensor:
        """A pool with the first `used [B, Hkv]` rows of `x [B, Hkv, N, D]`, and `fill` in all others."""
        shape = (self.num_blocks, x.shape[1], self.block_size, x.shape[3])
        pool = torch.full(shape, fill, dtype=x.dtype, device=x.device)
        for b in range(x.shape[0]):
            for h in range(x.shape[1]):
                j = torch.arange(int(used[b, h]))
                pages = table.cpu()[b, j // self.block_size].long()
                pool[pages.to(x.device), h, (j % self.block_size).to(x.device)] = x[b, h, : len(j)]
        return self.pool(pool)


def paged_cases(
    head_dims: Sequence[int], max_tokens: int, block_sizes: Sequence[int], *, max_rows: int | None = None
) -> "st.SearchStrategy[PagedCase]":
    """Attention cases over pages of one of `block_sizes`."""
    return st.builds(
        PagedCase,
        rows=attention_cases(head_dims, max_tokens, max_rows=max_rows),
        block_size=st.sampled_from(sorted(block_sizes)),
        layout=st.sampled_from(["NHD", "HND"]),
        share=st.sampled_from([0.0, 0.5, 1.0]),
    )
