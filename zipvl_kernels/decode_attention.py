"""`decode_attention`: attention of a few new tokens over a ragged cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from zipvl_kernels import _checking, _validate, _validate_where
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


@overload
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    block_table: Tensor | None = None,
    layout: str = "NHD",
    backend: str = "auto",
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    block_table: Tensor | None = None,
    layout: str = "NHD",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    layout: str = "NHD",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of a few new rows over a cache whose used length differs per sequence, or per KV head.

    The last query row sits at the last used row, `seqused_k - 1`. A row that sees nothing (an empty cache) is 0.

    Args:
        q: `[B, Hq, M, D]`, fp16, bf16 or fp32, `M <= 16`.
        k, v: `[B, Hkv, N, D]`, as `q`; rows from `seqused_k` on are never read into the result. With `block_table`,
            pools of pages in `layout`.
        seqused_k: int32 `[B]` or `[B, Hkv]`, used rows, the new ones included.
        scale: of the scores, default `D ** -0.5`.
        return_lse: also return the log-sum-exp of the scores, to merge partial results.
        block_table: int32 `[B, max_blocks]`: row `j` of sequence `b` is row `j % block_size` of page
            `block_table[b, j // block_size]`. Entries past the used rows are not read into the result. With
            `ZIPVL_CHECK=1` in the environment the others are checked on the host first.
        layout: of the pools, "NHD" `[num_blocks, block_size, Hkv, D]` or "HND" `[num_blocks, Hkv, block_size, D]`.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        `out [B, Hq, M, D]`, dtype of `q`; with `return_lse` also `lse`, fp32 `[B, Hq, M]`, natural logarithm, -inf for
        a row that sees nothing.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate_where.layout(layout)
    if block_table is None:
        _validate.heads(q=q, k=k, v=v)
        Hkv = k.shape[1]
    else:
        Hkv = _validate_where.pools(k, v, layout, q=q)
        _validate_where.block_table(block_table, q.device, q.shape[0])
    _validate.decode_rows(q)
    B = q.shape[0]
    _validate.int32("seqused_k", seqused_k, q.device, (B,), (B, Hkv), meaning="[B] or [B, Hkv]")
    _validate.scale(scale)
    if return_lse:
        both: tuple[Tensor, Tensor] = _decode_attention_lse(q, k, v, seqused_k, scale, backend, block_table, layout)
        return both
    out: Tensor = _decode_attention(q, k, v, seqused_k, scale, backend, block_table, layout)
    return out


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


def _fake_lse(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor seqused_k, float? scale, str backend, Tensor? block_table=None, "
    'str layout="NHD")'
)


@operator(f"decode_attention{_ARGUMENTS} -> Tensor", _fake)
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    scale: float | None,
    backend: str,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> Tensor:
    if block_table is not None and _checking.enabled():
        _checking.pages(block_table, seqused_k, k, layout)
    implementation = resolve("decode_attention", backend, q.device.type)
    out: Tensor = implementation(q, k, v, seqused_k, scale=scale, block_table=block_table, layout=layout)
    return out


@operator(f"decode_attention_lse{_ARGUMENTS} -> (Tensor, Tensor)", _fake_lse)
def _decode_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqused_k: Tensor,
    scale: float | None,
    backend: str,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    if block_table is not None and _checking.enabled():
        _checking.pages(block_table, seqused_k, k, layout)
    implementation = resolve("decode_attention", backend, q.device.type)
    both: tuple[Tensor, Tensor] = implementation(
        q, k, v, seqused_k, scale=scale, return_lse=True, block_table=block_table, layout=layout
    )
    return both
