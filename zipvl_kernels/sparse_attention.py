"""`sparse_attention`: attention among the kept tokens alone."""

from torch import Tensor

from zipvl_kernels import _validate
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
) -> Tensor:
    """Causal softmax attention among the tokens of the set (ZipVL, arXiv 2410.08584: sparse attention of the prefill).

    A query row whose column is in the set attends over the set's columns at or before it. Every other row is exactly 0.

    Args:
        q: `[B, Hq, M, D]`, fp16, bf16 or fp32.
        k, v: `[B, Hkv, N, D]`, as `q`.
        indices: int32 `[B, G, N]`, the set's columns, ascending; `G` is 1 or `Hkv`. Entries past `counts` are not read.
        counts: int32 `[B, G]`, how many columns are in the set.
        scale: of the scores, default `D ** -0.5`.
        q_start: int32 `[B]`, the column of query row 0; default `N - M` with the `N` of `indices`.
        kv_compacted: rows `[0, counts)` of `k, v` already hold the set in order. Their number of rows may then differ
            from `N`, as long as it is at least the largest count.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        `[B, Hq, M, D]`, dtype of `q`.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate.heads(q=q, k=k, v=v)
    _validate.selection(indices, counts, k, any_width=kv_compacted)
    _validate.scale(scale)
    _validate.per_sequence(q, q_start=q_start)
    out: Tensor = _sparse_attention(q, k, v, indices, counts, scale, q_start, kv_compacted, backend)
    return out


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


@operator(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, float? scale, Tensor? q_start, "
    "bool kv_compacted, str backend) -> Tensor",
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
) -> Tensor:
    implementation = resolve("sparse_attention", backend, q.device.type)
    out: Tensor = implementation(q, k, v, indices, counts, scale=scale, q_start=q_start, kv_compacted=kv_compacted)
    return out
