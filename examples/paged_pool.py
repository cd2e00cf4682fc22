"""The memory of a small serving engine: pages of keys and values, and who has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

NULL_PAGE = 0  # nobody's: what the unused columns of a block table name, as in vLLM


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than were asked for."""


class BlockAllocator:
    """Free list and reference counts of the pages `1 ... num_blocks - 1`. Lives on the host; moves no data."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: expected at least 2, page 0 is never given out; got {num_blocks}")
        self._free = deque(range(1, num_blocks))
        self._users = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that can be allocated when all are free."""
        return len(self._users) - 1

    def users(self, page: int) -> int:
        """How many sequences have the page; one that more than one has must not be written."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """`count` pages for one sequence alone. Raises OutOfPagesError, and takes none, where there are fewer."""
        if count > len(self._free):
            raise OutOfPagesError(f"expected {count} free pages, there are {len(self._free)}")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence has these pages (a cached prefix). Raises ValueError where nobody has one of them."""
        for page in self._checked(pages):
            self._users[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One sequence less has these pages; what nobody has is free. Raises ValueError where nobody had one before."""
        for page in self._checked(pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def _checked(self, pages: Iterable[int]) -> list[int]:
        """Before anything changes: that somebody has each page, as often as it is named."""
        named = list(pages)
        for page in named:
            if not 0 < page < len(self._users):
                raise ValueError(f"pages: expected pages of 1 to {len(self._users) - 1}, got {page}")
            if self._users[page] < named.count(page):
                raise ValueError(f"pages: page {page} is free already, or named too often")
        return named


class PagedCache:
    """Keys and values of all layers in pages of `block_size` rows, `[num_pages, block_size, Hkv, D]` (NHD).

    With one table a sequence, as most engines have it, page `p` is one page in each layer's own tensors: it comes free
    when no layer needs it. With a table for each layer, all layers draw from the same tensors, each for itself. Both
    take `num_blocks * num_layers` pages of a layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_blocks: int,
        block_size: int,
        table_per_layer: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        text = config.get_text_config(decoder=True)
        self.num_layers: int = text.num_hidden_layers
        self.num_tables = self.num_layers if table_per_layer else 1  # of a sequence
        tensors = self.num_layers // self.num_tables
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (tensors, num_blocks * self.num_tables, block_size, text.num_key_value_heads, head_dim)
        self._k = torch.zeros(shape, dtype=dtype, device=device)
        self._v = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.allocator = BlockAllocator(shape[1])

    def pages_for(self, rows: int) -> int:
        """Pages of a table that hold so many rows."""
        return -(-rows // self.block_size)

    @property
    def share_in_use(self) -> float:
        """Of the pages that can be given out, in [0, 1]."""
        return 1 - self.allocator.num_free / self.allocator.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._k.nbytes + self._v.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The pools of a layer's keys and values, as the operators take them."""
        return self._k[index % len(self._k)], self._v[index % len(self._v)]

    def block_tables(self, tables: list[list[list[int]]]) -> Tensor:
        """`tables[b][t]` as int32 `[num_layers, B, max_blocks]`, the block table of each layer."""
        width = max(len(table) for of_sequence in tables for table in of_sequence)
        rows = [[of_sequence[t] + [NULL_PAGE] * (width - len(of_sequence[t])) for of_sequence in tables]
                for t in range(self.num_tables)]  # fmt: skip
        filled = torch.tensor(rows, dtype=torch.int32, device=self._k.device)
        return filled.expand(self.num_layers, -1, -1)

    def write(self, index: int, block_table: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores `k, v [B, Hkv, n, D]` of a layer in rows `rows` int32 `[B, n]` of each sequence."""
        pages = block_table.gather(1, (rows // self.block_size).long()).long()  # [B, n]
        for pool, new in zip(self.layer(index), (k, v), strict=True):
            pool[pages, (rows % self.block_size).long()] = new.transpose(1, 2)
