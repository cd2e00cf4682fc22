"""`compact_kv_`: move the kept keys and values to the front of their buffers."""

from torch import Tensor

from zipvl_kernels import _validate
from zipvl_kernels._backends import resolve
from zipvl_kernels._library import operator


def compact_kv_(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    dst_start: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """In place: row `indices[b, g, i]` moves to row `dst_start[b] + i` (eviction, ZipVL, arXiv 2410.08584).

    Bit-exact. Rows past the set are unspecified afterwards. Extra memory does not grow with `N * D`.

    Args:
        k, v: `[B, Hkv, N, D]`, fp16, bf16 or fp32, written in place; two buffers with memory of their own.
        indices: int32 `[B, G, N]`, the set's columns, ascending; `G` is 1 or `Hkv`. Entries past `counts` are not read.
        counts: int32 `[B, G]`, how many columns are in the set.
        dst_start: int32 `[B]`, where the set goes, never beyond its first column; default 0.
        backend: "auto", "reference", "triton" or "cuda".

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: `backend` is not available.
    """
    _validate.pair(k, v)
    _validate.own_memory(k, v)
    _validate.selection(indices, counts, k)
    _validate.per_sequence(k, dst_start=dst_start)
    _compact_kv_(k, v, indices, counts, dst_start, backend)


def _fake(*args: object) -> None:
    return None


@operator(
    "compact_kv_(Tensor(a!) k, Tensor(b!) v, Tensor indices, Tensor counts, Tensor? dst_start, str backend) -> ()",
    _fake,
)
def _compact_kv_(k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, dst_start: Tensor | None, backend: str) -> None:
    resolve("compact_kv_", backend, k.device.type)(k, v, indices, counts, dst_start=dst_start)
