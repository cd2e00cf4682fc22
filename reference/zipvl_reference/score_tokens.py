"""How much attention each token gets from the probe rows (ZipVL: accumulated and normalised attention scores)."""

import torch
from torch import Tensor

from zipvl_reference.packed import Packed
from zipvl_reference.pages import in_rows
from zipvl_reference.sparse_attention import fp32_copy

TILE = 4096  # key columns scored at a time, so that no P x N score matrix is ever stored


def score_tokens(
    q: Tensor,  # [B, Hq, M, D]
    k: Tensor,  # [B, Hkv, N, D]
    probe_rows: Tensor,  # int32 [P] or [B, P]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    pool: str = "layer",
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,  # int32 [B, max_blocks]; k is then a pool of pages
    layout: str = "NHD",  # [num_blocks, block_size, Hkv, D], or "HND": [num_blocks, Hkv, block_size, D]
) -> tuple[Tensor, Tensor]:
    """Column sums of the probes' causal softmax, and their mean over the heads and probes that see it, `[B, G, N]`.

    With `cu_seqlens` of packed `q [T, Hq, D]` and `k [T, Hkv, D]`, `[G, T]`.
    """
    if cu_seqlens is not None:
        packed = Packed(cu_seqlens, max_seqlen, q.shape[0])
        padded = packed.heads(q), packed.heads(k), probe_rows
        a, n = score_tokens(*padded, scale=scale, seqused_k=packed.lengths, pool=pool)
        return packed.packed_groups(a), packed.packed_groups(n)
    if block_table is not None and seqused_k is not None:
        k = in_rows(k, block_table, layout)
        seqused_k = seqused_k.clamp(max=k.shape[2])
        q_start = seqused_k - q.shape[2] if q_start is None else q_start
    (B, Hq, M, D), Hkv, N = q.shape, k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    heads = Hq if pool == "layer" else Hq // Hkv  # that share a group
    accumulated = torch.zeros(B, Hq // heads, N, dtype=torch.float32, device=q.device)
    normalized = torch.zeros_like(accumulated)
    if M == 0 or N == 0 or probe_rows.shape[-1] == 0:
        return accumulated, normalized

    for b, row in enumerate(probe_rows.expand(B, -1)):  # one sequence at a time: the same bits alone or in a batch
        first = 0 if leftpad_k is None else leftpad_k[b]
        end = N if seqused_k is None else seqused_k[b].clamp(max=N)
        at = row + (N - M if q_start is None else q_start[b])  # the column that each probe stands at
        valid = (row >= 0) & (row < M) & (at >= first) & (at < end)
        probes = q[b].index_select(1, row.clamp(0, M - 1))
        sees_up_to = torch.where(valid, at, -1)
        a, nnz = _column_sums(probes, k[b], sees_up_to, first, scale)
        a = sum_heads(a.view(-1, heads // (Hq // Hkv), N))
        accumulated[b] = a
        normalized[b] = torch.where(nnz > 0, a / (heads * nnz), 0)
    return accumulated, normalized


def sum_heads(x: Tensor) -> Tensor:
    """Sum over the heads of `[..., H, N]`: neighbours first, then their sums.

    The order depends on `H` alone, and not on how the heads are split over ranks: see `add_neighbours`.
    """
    while x.shape[-2] > 1:
        x = add_neighbours(x)
    return x[..., 0, :]


def add_neighbours(x: Tensor) -> Tensor:
    """`[..., H, N]` as `[..., ceil(H / 2), N]`: heads 0 and 1, 2 and 3, ...; a last one without neighbour stays.

    Ranks with an even number of heads each may do this before they exchange them: no pair lies across two ranks.
    """
    *batch, H, N = x.shape
    if H % 2:
        return torch.cat([add_neighbours(x[..., :-1, :]), x[..., -1:, :]], -2)
    return x.reshape(*batch, H // 2, 2, N).sum(-2)


def _column_sums(
    probes: Tensor,  # [Hq, P, D]
    k: Tensor,  # [Hkv, N, D]
    sees_up_to: Tensor,  # [P], the last column that each probe sees, -1 for none
    first: Tensor | int,  # the first valid column
    scale: float,
) -> tuple[Tensor, Tensor]:
    """For one sequence: the attention each column gets, per KV head `[Hkv, N]`, and how many probes see it `[N]`."""
    (Hq, P, D), (Hkv, N, _) = probes.shape, k.shape
    Q = fp32_copy(probes).view(Hkv, -1, D)  # query heads that read the same KV head side by side

    def tile(begin: int) -> tuple[Tensor, Tensor]:
        column = torch.arange(begin, min(begin + TILE, N), device=k.device)
        sees = (column >= first) & (column <= sees_up_to[:, None])  # [P, tile]
        scores = Q @ fp32_copy(k[:, begin : begin + TILE]).mT * scale
        return scores.view(Hkv, Hq // Hkv, P, -1).masked_fill(~sees, -torch.inf), sees

    # A_P = softmax(Q_P K^T / sqrt(d)), causal: its row maxima and row sums ...
    highest = torch.full((Hkv, Hq // Hkv, P, 1), torch.finfo(torch.float32).min, device=k.device)
    total = torch.zeros_like(highest)
    for begin in range(0, N, TILE):
        scores, _ = tile(begin)
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        total = total * (highest - higher).exp() + (scores - higher).exp().sum(-1, keepdim=True)
        highest = higher
    total = total.clamp(min=1)  # exp(0) or more where a column is seen; where none is, A is 0 and not 0 / 0

    # ... and its columns: a_j = sum over the probes c of A_P[c, j]; nnz_j = how many probes stand at j or after it.
    a, nnz = torch.empty(Hkv, N, device=k.device), torch.empty(N, dtype=torch.int64, device=k.device)
    for begin in range(0, N, TILE):
        scores, sees = tile(begin)
        a[:, begin : begin + TILE] = ((scores - highest).exp() / total).sum((1, 2))
        nnz[begin : begin + TILE] = sees.sum(0)
    return a, nnz
