"""Checks of what is in tensors, on the host: `ZIPVL_CHECK=1` in the environment turns them on, to find an engine's bug.

They wait for the device, so they are slow and nothing can be captured in a CUDA graph meanwhile. Each raises ValueError
that names the sequence, and the page where there is one, before anything is written.
"""

import os
from itertools import pairwise

from torch import Tensor


def enabled() -> bool:
    """Whether the environment asks for them, now."""
    return os.environ.get("ZIPVL_CHECK") == "1"


def sequences(cu_seqlens: Tensor, max_seqlen: int | None, T: int | None = None) -> None:
    """Packed sequences start at row 0, one at the end of another, end at row `T` or before, and none is too long."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected sequence 0 to start at row 0, got {bounds[0]}")
    for b, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens: sequence {b} starts at row {start} and ends before it, at {end}")
        if T is not None and end > T:
            raise ValueError(f"cu_seqlens: sequence {b} ends at row {end}, and there are {T} rows")
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(f"max_seqlen: sequence {b} has length {end - start}, which is more than {max_seqlen}")


def pages(
    block_table: Tensor, seqused_k: Tensor, pool: Tensor, layout: str, name: str = "seqused_k"
) -> list[list[int]]:
    """The pages that each sequence uses: as many as its length, argument `name`, needs, in the pool, no page twice."""
    num_blocks, size = pool.shape[0], pool.shape[1 if layout == "NHD" else 2]
    table, lengths = block_table.tolist(), _per_group(seqused_k)
    used = []
    for b, (row, of_groups) in enumerate(zip(table, lengths, strict=True)):
        for length in of_groups:
            if not 0 <= length <= len(row) * size:
                raise ValueError(
                    f"{name}: sequence {b} has length {length}, and {len(row)} pages of {size} rows "
                    f"hold 0 to {len(row) * size}"
                )
        mine: dict[int, int] = {}
        for i, page in enumerate(row[: -(-max(of_groups) // size)]):
            where = f"block_table[{b}, {i}] is page {page}"
            if page < 0:
                raise ValueError(
                    f"block_table: sequence {b} of length {max(of_groups)} needs a page for rows from {i * size} on, "
                    f"and {where}, which is none: was a page of the pool free when it grew?"
                )
            if page >= num_blocks:
                raise ValueError(f"block_table: sequence {b} has a page outside of the pool of {num_blocks}: {where}")
            if mine.setdefault(page, i) < i:
                raise ValueError(f"block_table: sequence {b} has a page twice: {where}, and so is entry {mine[page]}")
        used.append(list(mine))
    return used


def compaction(
    pool: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    layout: str,
    first_writable: Tensor | None,
) -> None:
    """As `pages`; a page that may be written belongs to one sequence; each set is ascending and has what it has to."""
    used, size = pages(block_table, seqused_k, pool, layout), pool.shape[1 if layout == "NHD" else 2]
    first = [0] * len(used) if first_writable is None else [max(0, x) for x in first_writable.tolist()]
    lengths = _per_group(seqused_k)
    users: dict[int, list[int]] = {}
    for b, mine in enumerate(used):
        for page in mine:
            users.setdefault(page, []).append(b)
    for b, mine in enumerate(used):
        writable = mine[first[b] // size :] if max(lengths[b]) > first[b] else []
        for page in writable:
            others = [other for other in users[page] if other != b]
            if others:
                raise ValueError(
                    f"block_table: sequence {b} may write page {page} (first_writable is {first[b]}), which belongs "
                    f"to sequence {others[0]} too"
                )
    for b, (sets, sizes) in enumerate(zip(indices.tolist(), counts.tolist(), strict=True)):
        for g, (columns, count) in enumerate(zip(sets, sizes, strict=True)):
            _one_set(f"sequence {b}, group {g}", columns, count, lengths[b][g % len(lengths[b])], first[b])


def sets(
    pool: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    layout: str,
    compacted: bool,
) -> None:
    """As `pages`, of the rows that are read; each set is ascending and below the used length."""
    if compacted:
        pages(block_table, counts, pool, layout, "counts")
    else:
        pages(block_table, seqused_k, pool, layout)
    lengths = seqused_k.tolist()
    for b, (of_groups, sizes) in enumerate(zip(indices.tolist(), counts.tolist(), strict=True)):
        for g, (columns, count) in enumerate(zip(of_groups, sizes, strict=True)):
            _one_set(f"sequence {b}, group {g}", columns, count, lengths[b], 0)


def _one_set(whose: str, columns: list[int], count: int, used: int, first: int) -> None:
    if not 0 <= count <= min(len(columns), used):
        raise ValueError(
            f"counts: {whose} keeps {count} rows, and may keep 0 to {min(len(columns), used)} "
            f"of {used} used ones and {len(columns)} indices"
        )
    kept = columns[:count]
    for i, (before, column) in enumerate(zip([-1, *kept], kept, strict=False)):
        if not before < column < used:
            raise ValueError(
                f"indices: {whose} expected rows below {used}, ascending, got {column} after {before} at place {i}"
            )
    protected = min(first, used)
    if kept[:protected] != list(range(protected)):
        missing = min(set(range(protected)) - set(kept))
        raise ValueError(
            f"indices: {whose} has to keep its rows below first_writable, {first}, and lacks row {missing}"
        )


def _per_group(seqused_k: Tensor) -> list[list[int]]:
    """Lengths of each sequence: one, or one of each group."""
    lengths: list[list[int]] = (seqused_k if seqused_k.dim() == 2 else seqused_k[:, None]).tolist()
    return lengths
