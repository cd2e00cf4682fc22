"""`compact_kv_`: move the kept keys and values to the front of their buffers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def compact_kv_(
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    counts: Tensor | Sequence[Tensor],
    *,
    dst_start: Tensor | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i` (eviction, ZipVL, arXiv 2410.08584).

    Bit-exact. Rows past the set are unspecified afterwards. Extra memory does not grow with `N * D`.

    Packed: `k, v [T, Hkv, D]` with `cu_seqlens`. The kept rows of a sequence move to the front of its own rows.

    Several layers: `k, v, indices, counts` are sequences of tensors, one of each for every layer, alike in all but what
    they hold. In CUDA C, 64 layers are one launch.

    Args:
        k, v: `[B, Hkv, N, D]`, fp16, bf16 or fp32, written in place; two buffers with memory of their own. Packed:
            `[T, Hkv, D]`.
        indices: int32 `[B, G, N]`, the set's columns, ascending; `G` is 1 or `Hkv`. Entries past `counts` are not read.
            Packed: `[G, T]`, columns within the sequence, those of sequence `b` from `cu_seqlens[b]` on.
        counts: int32 `[B, G]`, how many columns are in the set.
        dst_start: int32 `[B]`, where the set goes, never beyond its first column; default 0. Not packed.
        cu_seqlens: int32 `[B + 1]`, ascending from 0: sequence `b` is rows `[cu_seqlens[b], cu_seqlens[b + 1])`.
        max_seqlen: rows of the longest sequence, with `cu_seqlens`.
        backend: "auto", "reference", "triton" or "cuda".

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    if isinstance(k, Tensor):
        max_seqlen = _check(k, v, indices, counts, dst_start, cu_seqlens, max_seqlen)
        _compact_kv_(k, v, indices, counts, dst_start, backend, cu_seqlens, max_seqlen)
        return
    layers = _validate_where.layers(k=k, v=v, indices=indices, counts=counts)
    _validate_where.own_memory_of_layers(k=layers[0], v=layers[1])
    max_seqlen = _check(layers[0][0], layers[1][0], layers[2][0], layers[3][0], dst_start, cu_seqlens, max_seqlen)
    _compact_kv_layers_(*layers, dst_start, backend, cu_seqlens, max_seqlen)


def _check(
    k: Any,
    v: Any,
    indices: Any,
    counts: Any,
    dst_start: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> int | None:
    """Of one layer; returns `max_seqlen` as backends take it."""
    _validate.pair(k, v, packed=cu_seqlens is not None)
    _validate.own_memory(k, v)
    max_seqlen = _validate_where.sequences(cu_seqlens, max_seqlen, k.shape[0], k.device, dst_start=dst_start)
    if cu_seqlens is not None:
        _validate_where.packed_selection(indices, counts, k, cu_seqlens)
    else:
        _validate.selection(indices, counts, k)
        _validate.per_sequence(k, dst_start=dst_start)
    return max_seqlen


def _fake(*args: object) -> None:
    return None


@operator(
    "compact_kv_(Tensor(a!) k, Tensor(b!) v, Tensor indices, Tensor counts, Tensor? dst_start, str backend, "
    "Tensor? cu_seqlens=None, SymInt? max_seqlen=None) -> ()",
    _fake,
)
def _compact_kv_(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    dst_start: Tensor | None,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    if cu_seqlens is not None and _checking.enabled():
        _checking.sequences(cu_seqlens, max_seqlen, len(k))
    resolve("compact_kv_", backend, k.device.type)(
        k, v, indices, counts, dst_start=dst_start, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )


@operator(
    "compact_kv_layers_(Tensor(a!)[] k, Tensor(b!)[] v, Tensor[] indices, Tensor[] counts, Tensor? dst_start, "
    "str backend, Tensor? cu_seqlens=None, SymInt? max_seqlen=None) -> ()",
    _fake,
)
def _compact_kv_layers_(
    k: list[Tensor],
    v: list[Tensor],
    indices: list[Tensor],
    counts: list[Tensor],
    dst_start: Tensor | None,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    if cu_seqlens is not None and _checking.enabled():
        _checking.sequences(cu_seqlens, max_seqlen, len(k[0]))
    resolve("compact_kv_", backend, k[0].device.type)(
        k, v, indices, counts, dst_start=dst_start, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )
