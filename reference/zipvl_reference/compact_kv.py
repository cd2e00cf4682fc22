"""Move the kept keys and values to the front of their buffers (ZipVL: the KV cache holds the important tokens only)."""

import torch
from torch import Tensor

ROWS = 1024  # rows moved at a time: the extra memory


def compact_kv_(
    k: Tensor,  # [B, Hkv, N, D]
    v: Tensor,  # [B, Hkv, N, D]
    indices: Tensor,  # int32 [B, G, N]
    counts: Tensor,  # int32 [B, G]
    *,
    dst_start: Tensor | None = None,  # int32 [B]
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i`.

    Rows only ever move towards the front: the i-th row of the set stands at `dst_start + i` or later. So rows that are
    read in order and written behind the reader never overwrite one that is still to be read.
    """
    (B, Hkv, N), G = k.shape[:3], indices.shape[1]
    for b in range(B):
        start = 0 if dst_start is None else dst_start[b]
        for begin in range(0, indices.shape[-1], ROWS):
            i = torch.arange(begin, min(begin + ROWS, indices.shape[-1]), device=k.device)
            to = (i + start).clamp(max=N - 1)
            for h in range(Hkv):
                g = h % G
                taken = i < counts[b, g]
                source = torch.where(taken, indices[b, g, begin : begin + ROWS], to)  # past the set: onto itself
                for buffer in (k[b, h], v[b, h]):
                    buffer.index_copy_(0, to, buffer.index_select(0, source))
