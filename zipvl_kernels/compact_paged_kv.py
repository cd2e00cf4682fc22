"""`compact_paged_kv_`: move the kept keys and values to the front of each sequence's own pages."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def compact_paged_kv_(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    counts: Tensor | Sequence[Tensor],
    block_table: Tensor | Sequence[Tensor],
    seqused_k: Tensor | Sequence[Tensor],
    *,
    layout: str = "NHD",
    first_writable: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """In place: row `indices[b, g, i]` of sequence `b` moves to its row `i` (eviction, ZipVL, arXiv 2410.08584).

    Row `j` of sequence `b` is row `j % block_size` of page `block_table[b, j // block_size]`. Bit-exact. Rows past the
    set are unspecified afterwards; no other row of the pools is written. Extra memory does not grow with the pools.

    Pages that several sequences share are safe behind `first_writable`: the rows of a sequence before it are never
    written, whatever the other arguments hold. Its set has to have all of them, so that they stay in their places; a
    page with rows at or after it, up to the used ones, belongs to this sequence alone.

    Several layers: `k_cache, v_cache, indices, counts` are sequences of tensors, one of each for every layer, alike in
    all but what they hold, and so may be `block_table` and `seqused_k`; a tensor there is that of every layer. What is
    returned has a row of each layer. In CUDA C, 64 layers are one launch.

    With `ZIPVL_CHECK=1` in the environment all of this is checked on the host first.

    Args:
        k_cache, v_cache: the pools, fp16, bf16 or fp32, written in place; two buffers with memory of their own.
        indices: int32 `[B, G, W]`, the set's rows, ascending; `G` is 1 or `Hkv`, any `W`. Entries past `counts` are not
            read.
        counts: int32 `[B, G]`, how many rows are in the set.
        block_table: int32 `[B, max_blocks]`, the pages of each sequence. Entries past the used rows are not read.
        seqused_k: int32 `[B]` or `[B, G]`, used rows.
        layout: "NHD" `[num_blocks, block_size, Hkv, D]` or "HND" `[num_blocks, Hkv, block_size, D]`.
        first_writable: int32 `[B]`, the first row of each sequence that may be written; default 0.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        seqused: int32 `[B]`, or `[B, G]` where `G > 1`: the rows that are used now, as `decode_attention` takes them.
        freed: int32 `[B]`, how many of the pages that held used rows hold none now. They are the last of these in the
            block table, and it is the longest head that counts.
        Of several layers `[layers, B]`, or `[layers, B, G]`.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    if isinstance(k_cache, Tensor):
        _check(k_cache, v_cache, indices, counts, block_table, seqused_k, layout=layout, first_writable=first_writable)
        found: tuple[Tensor, Tensor] = _compact_paged_kv_(
            k_cache, v_cache, indices, counts, block_table, seqused_k, layout, first_writable, backend
        )
        return found
    shared = {"block_table": block_table, "seqused_k": seqused_k}
    layers = _validate_where.layers(shared, k_cache=k_cache, v_cache=v_cache, indices=indices, counts=counts)
    _validate_where.own_memory_of_layers("_cache", k=layers[0], v=layers[1])
    _check(*(x[0] for x in layers), layout=layout, first_writable=first_writable)
    found = _compact_paged_kv_layers_(*layers, layout, first_writable, backend)
    return found


def _check(
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    counts: Any,
    block_table: Any,
    seqused_k: Any,
    *,
    layout: str,
    first_writable: Tensor | None,
) -> None:
    """Of one layer."""
    _validate_where.layout(layout)
    Hkv = _validate_where.pools(k_cache, v_cache, layout, suffix="_cache")
    _validate.own_memory(k_cache, v_cache, suffix="_cache")
    B = _validate_where.block_table(block_table, k_cache.device)
    G = _validate_where.paged_selection(indices, counts, B, Hkv, k_cache.device)
    _validate.int32("seqused_k", seqused_k, k_cache.device, (B,), (B, G), meaning="[B] or [B, G]")
    _validate.per_sequence(seqused_k, first_writable=first_writable)


def _fake(k_cache: Tensor, v_cache: Tensor, indices: Tensor, counts: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    B, G = counts.shape
    return counts.new_empty((B,) if G == 1 else (B, G)), counts.new_empty((B,))


def _fake_of_layers(
    k_cache: list[Tensor], v_cache: list[Tensor], indices: list[Tensor], counts: list[Tensor], *rest: object
) -> tuple[Tensor, Tensor]:
    L, (B, G) = len(counts), counts[0].shape
    return counts[0].new_empty((L, B) if G == 1 else (L, B, G)), counts[0].new_empty((L, B))


@operator(
    "compact_paged_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor indices, Tensor counts, Tensor block_table, "
    "Tensor seqused_k, str layout, Tensor? first_writable, str backend) -> (Tensor, Tensor)",
    _fake,
)
def _compact_paged_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    layout: str,
    first_writable: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if _checking.enabled():
        _checking.compaction(k_cache, indices, counts, block_table, seqused_k, layout, first_writable)
    lengths_and_freed: tuple[Tensor, Tensor] = resolve("compact_paged_kv_", backend, k_cache.device.type)(
        k_cache, v_cache, indices, counts, block_table, seqused_k, layout=layout, first_writable=first_writable
    )
    return lengths_and_freed


@operator(
    "compact_paged_kv_layers_(Tensor(a!)[] k_cache, Tensor(b!)[] v_cache, Tensor[] indices, Tensor[] counts, "
    "Tensor[] block_table, Tensor[] seqused_k, str layout, Tensor? first_writable, str backend) -> (Tensor, Tensor)",
    _fake_of_layers,
)
def _compact_paged_kv_layers_(
    k_cache: list[Tensor],
    v_cache: list[Tensor],
    indices: list[Tensor],
    counts: list[Tensor],
    block_table: list[Tensor],
    seqused_k: list[Tensor],
    layout: str,
    first_writable: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if _checking.enabled():
        for i, layer in enumerate(zip(k_cache, indices, counts, block_table, seqused_k, strict=True)):
            try:
                _checking.compaction(*layer, layout, first_writable)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from None
    lengths_and_freed: tuple[Tensor, Tensor] = resolve("compact_paged_kv_", backend, k_cache[0].device.type)(
        k_cache, v_cache, indices, counts, block_table, seqused_k, layout=layout, first_writable=first_writable
    )
    return lengths_and_freed
