"""Move the kept keys and values to the front of their buffers (ZipVL: the KV cache holds the important tokens only)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 1024  # rows moved at a time: the extra memory
Layers = Tensor | Sequence[Tensor]


def compact_kv_(
    k: Layers,  # [B, Hkv, N, D]; packed: [T, Hkv, D]
    v: Layers,  # the same
    indices: Layers,  # int32 [B, G, N]; packed: [G, T]
    counts: Layers,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]: packed
    max_seqlen: int | None = None,
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`; of every layer, where they are lists."""
    for keys, values, sets, sizes in layers(k, v, indices, counts):
        for b in range(len(sizes)):
            if cu_seqlens is None:
                start = 0 if dst_start is None else dst_start[b]
                _move(keys[b], values[b], sets[b], sizes[b], start, keys.shape[2])
            else:
                first, end = cu_seqlens[b : b + 2].clamp(0, len(keys))
                heads_first = keys.transpose(0, 1), values.transpose(0, 1)
                _move(*heads_first, sets, sizes[b], 0, (end - first).clamp(max=max_seqlen), first, max_seqlen)


def layers(*given: Any) -> list[tuple[Any, ...]]:
    """What is given of each layer: of one, or lists of as many as there are layers, and tensors that all share."""
    if isinstance(given[0], Tensor):
        return [given]
    return list(zip(*([x] * len(given[0]) if isinstance(x, Tensor) else x for x in given), strict=True))


def _move(
    k: Tensor,  # [Hkv, N, D]
    v: Tensor,  # [Hkv, N, D]
    indices: Tensor,  # [G, N]
    counts: Tensor,  # [G]
    start: Tensor | int,
    length: Tensor | int,
    first: Tensor | int = 0,
    longest: int | None = None,
) -> None:
    """One sequence, which is rows `[first, first + length)` of the buffers.

    Rows only ever move towards the front: the i-th row of the set stands at `start + i` or later. So rows that are read
    in order and written behind the reader never overwrite one that is still to be read.
    """
    N, G = indices.shape[1], len(counts)
    longest = N if longest is None else min(longest, N)
    for begin in range(0, longest, ROWS):
        i = torch.arange(begin, min(begin + ROWS, longest), device=k.device)
        to, column = (first + start + i).clamp(0, N - 1), (first + i).clamp(max=N - 1)
        for h in range(k.shape[0]):
            source = indices[h % G, column]
            moves = (i < counts[h % G]) & (i < length) & (source < length) & (source > start + i)
            source = torch.where(moves, first + source, to)  # what does not move is written onto itself
            for buffer in (k[h], v[h]):
                buffer.index_copy_(0, to, buffer.index_select(0, source))
