"""`score_tokens`: how much attention each token gets from the probe rows."""

import torch
from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def score_tokens(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    pool: str = "layer",
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """Column sums of the probe rows' attention (ZipVL, arXiv 2410.08584: accumulated and normalised attention scores).

    `A[b, h, r, :]` is the causal softmax of probe row `r` over the valid columns it sees. A probe that falls on
    padding, or a row number outside `[0, M)`, contributes nothing.

    Args:
        q: `[B, Hq, M, D]`, fp16, bf16 or fp32; packed `[T, Hq, D]`.
        k: `[B, Hkv, N, D]`, as `q`; packed `[T, Hkv, D]`. With `block_table`, a pool of pages in `layout`.
        probe_rows: int32 `[P]` or `[B, P]`, row numbers of `q`, packed those within a sequence.
        scale: of the scores, default `D ** -0.5`.
        q_start: int32 `[B]`, the column of query row 0; default `N - M`; with `block_table`, `seqused_k - M`.
        leftpad_k, seqused_k: int32 `[B]`, valid columns are `[leftpad_k, seqused_k)`; default `[0, N)`.
            With `block_table`, `seqused_k` has to be given: the used rows, those of the queries included.
        pool: "layer" sums over all heads (`G = 1`), "kv_head" over the query heads of each KV head (`G = Hkv`).
        backend: "auto", "reference", "triton" or "cuda".
        cu_seqlens, max_seqlen: int32 `[B + 1]` and a whole number, for packed sequences. The padding arguments and
            `q_start` are then None.
        block_table: int32 `[B, max_blocks]`: row `j` of sequence `b` is row `j % block_size` of page
            `block_table[b, j // block_size]`, and `N` is `max_blocks * block_size`. Entries past the used rows are not
            read into the result. With `ZIPVL_CHECK=1` in the environment the others are checked on the host first.
        layout: of the pools, "NHD" `[num_blocks, block_size, Hkv, D]` or "HND" `[num_blocks, Hkv, block_size, D]`.

    Returns:
        `accumulated`, fp32 `[B, G, N]`, packed `[G, T]`: sum of `A` over the heads of the group and the probes.
        `normalized`, of the same shape: `accumulated / (heads in the group * number of valid probes that see the
        column)`, 0 where none does.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate_where.layout(layout)
    if block_table is None:
        _validate.heads(q=q, k=k, packed=cu_seqlens is not None)
    else:
        _validate_where.paged(q, block_table, seqused_k, cu_seqlens, layout, k=k)
    places = {"q_start": q_start, "leftpad_k": leftpad_k, "seqused_k": seqused_k}
    max_seqlen = _validate_where.sequences(cu_seqlens, max_seqlen, q.shape[0], q.device, **places)
    B = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _validate.probe_numbers(probe_rows, B, q.device)
    _validate.scale(scale)
    _validate.per_sequence(q, **places)
    _validate.pool(pool)
    where = q_start, leftpad_k, seqused_k, pool, backend, cu_seqlens, max_seqlen, block_table, layout
    scores: tuple[Tensor, Tensor] = _score_tokens(q, k, probe_rows, scale, *where)
    return scores


def _fake(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    Hkv = k.shape[2 if block_table is not None and layout == "NHD" else 1]
    G = 1 if pool == "layer" else Hkv
    shape: tuple[int, ...]
    if cu_seqlens is not None:
        shape = G, q.shape[0]
    elif block_table is not None:
        shape = q.shape[0], G, block_table.shape[1] * k.shape[1 if layout == "NHD" else 2]
    else:
        shape = q.shape[0], G, k.shape[2]
    accumulated = q.new_empty(shape, dtype=torch.float32)
    return accumulated, torch.empty_like(accumulated)


@operator(
    "score_tokens(Tensor q, Tensor k, Tensor probe_rows, float? scale, Tensor? q_start, Tensor? leftpad_k, "
    "Tensor? seqused_k, str pool, str backend, Tensor? cu_seqlens=None, SymInt? max_seqlen=None, "
    'Tensor? block_table=None, str layout="NHD") -> (Tensor, Tensor)',
    _fake,
)
def _score_tokens(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    if _checking.enabled():
        if cu_seqlens is not None:
            _checking.sequences(cu_seqlens, max_seqlen, q.shape[0])
        if block_table is not None and seqused_k is not None:
            _checking.pages(block_table, seqused_k, k, layout)
    implementation = resolve("score_tokens", backend, q.device.type)
    scores: tuple[Tensor, Tensor] = implementation(
        q,
        k,
        probe_rows,
        scale=scale,
        q_start=q_start,
        leftpad_k=leftpad_k,
        seqused_k=seqused_k,
        pool=pool,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        block_table=block_table,
        layout=layout,
    )
    return scores
