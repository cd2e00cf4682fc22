"""Packed sequences, rows `[cu_seqlens[b], cu_seqlens[b + 1])` each, as a padded batch for the operators' dense form.

Built on the device: nothing is read on the host. `cu_seqlens` may hold anything; no row outside of a tensor is touched.
"""

import torch
from torch import Tensor


class Packed:
    """Where the rows of `B` sequences, of at most `N` rows each, lie among `T` packed ones."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None, T: int) -> None:  # int32 [B + 1]
        assert max_seqlen is not None
        self.T, N = T, min(max_seqlen, T)
        bounds = cu_seqlens.clamp(0, T)
        self.lengths = (bounds[1:] - bounds[:-1]).clamp(0, N)  # int32 [B]
        column = torch.arange(N, device=cu_seqlens.device)
        self.used = column < self.lengths[:, None]  # [B, N]
        self.rows = bounds[:-1, None] + column  # int64 [B, N], beyond `used` those of other sequences or of none

    def heads(self, x: Tensor) -> Tensor:
        """`[B, heads, N, D]` of `x [T, heads, D]`; 0 in the padding."""
        taken = x.index_select(0, torch.where(self.used, self.rows, 0).flatten())
        return torch.where(self.used[..., None, None], taken.view(*self.rows.shape, *x.shape[1:]), 0).transpose(1, 2)

    def groups(self, x: Tensor) -> Tensor:
        """`[B, G, N]` of `x [G, T]`; 0 in the padding."""
        return self.heads(x.T[..., None])[..., 0]

    def packed_heads(self, x: Tensor) -> Tensor:
        """`[T, heads, D]` of `x [B, heads, N, D]`; 0 in rows of no sequence."""
        out = x.new_zeros(self.T + 1, x.shape[1], x.shape[3])  # padding goes to the last row
        rows = torch.where(self.used, self.rows, self.T).flatten()
        return out.index_copy_(0, rows, x.transpose(1, 2).flatten(0, 1))[: self.T]

    def packed_groups(self, x: Tensor) -> Tensor:
        """`[G, T]` of `x [B, G, N]`; 0 in rows of no sequence."""
        return self.packed_heads(x[..., None])[..., 0].T.contiguous()
