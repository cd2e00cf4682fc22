"""`sparse_attention`: attention among the kept tokens alone."""

from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,
    kv_compacted: bool = False,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> Tensor:
    """Causal softmax attention among the tokens of the set (ZipVL, arXiv 2410.08584: sparse attention of the prefill).

    A query row whose column is in the set attends over the set's columns at or before it. Every other row is exactly 0.

    Args:
        q: `[B, Hq, M, D]`, fp16, bf16 or fp32; packed `[T, Hq, D]`.
        k, v: `[B, Hkv, N, D]`, as `q`; packed `[T, Hkv, D]`. With `block_table`, pools of pages in `layout`.
        indices: int32 `[B, G, N]`, packed `[G, T]`, the set's columns, ascending; `G` is 1 or `Hkv`. Entries past
            `counts` are not read.
        counts: int32 `[B, G]`, how many columns are in the set.
        scale: of the scores, default `D ** -0.5`.
        q_start: int32 `[B]`, the column of query row 0; default `N - M` with the `N` of `indices`; with
            `block_table`, `seqused_k - M`.
        kv_compacted: rows `[0, counts)` of `k, v` already hold the set in order. Their number of rows may then differ
            from `N`, as long as it is at least the largest count. Packed, these are the first of each sequence's rows.
        backend: "auto", "reference", "triton" or "cuda".
        cu_seqlens, max_seqlen: int32 `[B + 1]` and a whole number, for packed sequences. `q_start` is then None.
        seqused_k: int32 `[B]`, with `block_table` alone: the used rows, those of the queries included. It is where the
            last query row stands by default, and with `kv_compacted` what it was before the others were dropped.
        block_table: int32 `[B, max_blocks]`: row `j` of sequence `b` is row `j % block_size` of page
            `block_table[b, j // block_size]`; `indices` may then have any width. Entries past the used rows are not
            read into the result. With `ZIPVL_CHECK=1` in the environment the others are checked on the host first.
        layout: of the pools, "NHD" `[num_blocks, block_size, Hkv, D]` or "HND" `[num_blocks, Hkv, block_size, D]`.

    Returns:
        Shape and dtype of `q`.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate_where.layout(layout)
    if block_table is None:
        _validate.heads(q=q, k=k, v=v, packed=cu_seqlens is not None)
    else:
        Hkv = _validate_where.paged(q, block_table, seqused_k, cu_seqlens, layout, k=k, v=v)
    max_seqlen = _validate_where.sequences(cu_seqlens, max_seqlen, q.shape[0], q.device, q_start=q_start)
    if cu_seqlens is not None:
        _validate_where.packed_selection(indices, counts, k, cu_seqlens)
    elif block_table is not None:
        _validate_where.paged_selection(indices, counts, q.shape[0], Hkv, q.device)
    else:
        _validate.selection(indices, counts, k, any_width=kv_compacted)
    if block_table is None and seqused_k is not None:
        raise ValueError("seqused_k: expected None without a block_table; counts say how many columns are used")
    _validate.scale(scale)
    _validate.per_sequence(q, q_start=q_start, seqused_k=seqused_k)
    options = scale, q_start, kv_compacted, backend, cu_seqlens, max_seqlen, seqused_k, block_table, layout
    out: Tensor = _sparse_attention(q, k, v, indices, counts, *options)
    return out


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


@operator(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, float? scale, Tensor? q_start, "
    "bool kv_compacted, str backend, Tensor? cu_seqlens=None, SymInt? max_seqlen=None, Tensor? seqused_k=None, "
    'Tensor? block_table=None, str layout="NHD") -> Tensor',
    _fake,
)
def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    kv_compacted: bool,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> Tensor:
    if _checking.enabled():
        if cu_seqlens is not None:
            _checking.sequences(cu_seqlens, max_seqlen, q.shape[0])
        if block_table is not None and seqused_k is not None:
            _checking.sets(k, indices, counts, block_table, seqused_k, layout, kv_compacted)
    implementation = resolve("sparse_attention", backend, q.device.type)
    out: Tensor = implementation(
        q,
        k,
        v,
        indices,
        counts,
        scale=scale,
        q_start=q_start,
        kv_compacted=kv_compacted,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        seqused_k=seqused_k,
        block_table=block_table,
        layout=layout,
    )
    return out
