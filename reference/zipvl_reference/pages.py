"""Rows of a sequence from a pool of pages (an engine's paged KV cache)."""

from torch import Tensor


def in_rows(pool: Tensor, block_table: Tensor, layout: str) -> Tensor:
    """The pages of each sequence of `block_table [B, max_blocks]` in a row, `[B, Hkv, max_blocks * block_size, D]`.

    `pool` is `[num_blocks, block_size, Hkv, D]` with layout "NHD", `[num_blocks, Hkv, block_size, D]` with "HND".
    Entries of the table for rows that are not used may be any number.
    """
    if layout == "NHD":
        pool = pool.transpose(1, 2)
    pages = pool.index_select(0, block_table.flatten().clamp(0, pool.shape[0] - 1))
    return pages.view(*block_table.shape, *pool.shape[1:]).transpose(1, 2).flatten(2, 3)
