"""Checks of arguments: each raises TypeError or ValueError that names the argument, what was expected and what came."""

import math
from types import EllipsisType

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_DECODE_ROWS = 16


def heads(*, q: Tensor, k: Tensor, v: Tensor | EllipsisType = ..., packed: bool | None = None) -> None:
    """`q [B, Hq, M, D]` with `k, v [B, Hkv, N, D]`: one dtype and device, `Hq % Hkv == 0`, last dim contiguous.

    With `packed`, `q [T, Hq, D]` and `k, v [T, Hkv, D]`; `packed` is None for an operator that has no such form, and
    `v` is left out for one that has none.
    """
    rows = _FORMS[packed]
    q_shape, k_shape = _heads("q", q, "q", q, rows), _heads("k", k, "q", q, rows)
    if k_shape[0] != q_shape[0] or k_shape[-1] != q_shape[-1]:
        wanted, first = ("[T, Hkv, D]", "T") if packed else ("[B, Hkv, N, D]", "B")
        raise ValueError(
            f"k: expected {wanted} with {first} = {q_shape[0]} and D = {q_shape[-1]} as in q, got shape {_shape(k)}"
        )
    Hq, Hkv = q_shape[1], k_shape[1]
    if Hq % Hkv:
        raise ValueError(f"k: expected a number of heads that divides the {Hq} heads of q, got {Hkv} ({_shape(k)})")
    if not isinstance(v, EllipsisType):
        _same_as_k(v, k, wanted=rows)


def pair(k: Tensor, v: Tensor, packed: bool | None = None) -> None:
    """`k, v [B, Hkv, N, D]`, or `[T, Hkv, D]` with `packed`: one shape, dtype and device, last dim contiguous."""
    _heads("k", k, "k", k, _FORMS[packed])
    _same_as_k(v, k, wanted=_FORMS[packed])


def own_memory(k: Tensor, v: Tensor, suffix: str = "") -> None:
    """Arguments `k` and `v` with `suffix` that are to be written: two buffers, neither broadcast."""
    if k is v:
        raise ValueError(f"v{suffix}: expected a buffer of its own, got the same tensor as k{suffix}")
    if 0 not in k.stride() and 0 not in v.stride():
        return
    for name, x in ((f"k{suffix}", k), (f"v{suffix}", v)):
        if any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"{name}: expected memory of its own for every row, since it is written in place, "
                f"got an expanded tensor of shape {_shape(x)} and strides {x.stride()}"
            )


def int32(name: str, x: Tensor, device: torch.device, *shapes: tuple[int, ...], meaning: str) -> None:
    """`x` is int32 on `device` and of one of `shapes`, which `meaning` spells in letters."""
    _tensor(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32 {meaning}, got {x.dtype} of shape {_shape(x)}")
    # `torch.compile` finds no tuple of symbolic sizes in another, hence the comparison one by one.
    if tuple(x.shape) not in shapes and not any(_same(x.shape, shape) for shape in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected int32 {meaning}, here {wanted}, got shape {_shape(x)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the others, got one on {x.device}")


def per_sequence(like: Tensor, **given: Tensor | None) -> None:
    """Each of `given`, unless None, is int32 `[B]`, with the batch size and device of `like`."""
    for name, x in given.items():
        if x is not None:
            int32(name, x, like.device, (like.shape[0],), meaning="[B]")


def probe_numbers(probe_rows: Tensor, B: int, device: torch.device) -> None:
    """int32 `[P]` or `[B, P]`."""
    _tensor("probe_rows", probe_rows)
    P = probe_rows.shape[-1] if probe_rows.dim() else 0
    int32("probe_rows", probe_rows, device, (P,), (B, P), meaning="[P] or [B, P]")


def selection(indices: Tensor, counts: Tensor, k: Tensor, *, any_width: bool = False) -> None:
    """`indices [B, G, N]` and `counts [B, G]` for `k [B, Hkv, N, D]`; with `any_width`, `N` of `k` may be another."""
    B, Hkv = k.shape[:2]
    _tensor("indices", indices)
    N = indices.shape[-1] if any_width and indices.dim() else k.shape[2]
    int32("indices", indices, k.device, (B, 1, N), (B, Hkv, N), meaning="[B, G, N] with G = 1 or Hkv")
    int32("counts", counts, k.device, (B, indices.shape[1]), meaning="[B, G]")


def scores(accumulated: Tensor, normalized: Tensor, packed: bool = False) -> None:
    """Two fp32 `[B, G, N]`, or `[G, T]` with `packed`, of one shape and device."""
    wanted = "[G, T] with cu_seqlens" if packed else "[B, G, N], or [G, T] with cu_seqlens"
    for name, x in (("accumulated", accumulated), ("normalized", normalized)):
        _tensor(name, x)
        if x.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32 {wanted}, got {x.dtype}")
        if x.dim() != (2 if packed else 3):
            raise ValueError(f"{name}: expected float32 {wanted}, got shape {_shape(x)}")
    if normalized.shape != accumulated.shape:
        raise ValueError(
            f"normalized: expected the shape of accumulated, {_shape(accumulated)}, got {_shape(normalized)}"
        )
    if normalized.device != accumulated.device:
        raise ValueError(
            f"normalized: expected a tensor on {accumulated.device} like accumulated, got {normalized.device}"
        )


def forced(keep_first: int, keep_recent: int) -> tuple[int, int]:
    """Whole numbers of columns that are not negative; lowered to what int32 holds, which no sequence has."""
    not_negative(keep_first=keep_first, keep_recent=keep_recent)
    return min(keep_first, 2**31 - 1), min(keep_recent, 2**31 - 1)


def device(x: object) -> torch.device | None:
    """What `torch.device` takes, or None."""
    if x is None or isinstance(x, torch.device):
        return x
    if isinstance(x, bool) or not isinstance(x, (str, int)):
        raise TypeError(f"device: expected a torch.device, a string such as 'cuda:0' or None, got {_type(x)}")
    try:
        return torch.device(x)
    except RuntimeError as error:
        raise ValueError(f"device: expected a torch.device, a string such as 'cuda:0' or None, got {x!r}") from error


def ratio(name: str, x: float | None) -> None:
    """A number in (0, 1]."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number in (0, 1], got {x!r}")
    if not 0 < x <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {x!r}")


def one_ratio(tau: float | None, keep_ratio: float | None) -> None:
    """Exactly one of the two, and that in (0, 1]."""
    if (tau is None) == (keep_ratio is None):
        raise ValueError(
            f"tau, keep_ratio: expected exactly one of them, got tau={tau!r} and keep_ratio={keep_ratio!r}"
        )
    ratio("tau", tau) if keep_ratio is None else ratio("keep_ratio", keep_ratio)


def not_negative(**given: int) -> None:
    """Whole numbers of at least 0."""
    for name, x in given.items():
        if type(x) is not int:
            whole_number(name, x)
        if x < 0:
            raise ValueError(f"{name}: expected a whole number of at least 0, got {x!r}")


def whole_number(name: str, x: int) -> None:
    """An int, or a symbolic one under `torch.compile`; not a bool."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {x!r}")


def probes(num_recent: int, num_random: int) -> None:
    """At least one probe in all."""
    not_negative(num_recent=num_recent, num_random=num_random)
    if num_recent + num_random < 1:
        raise ValueError("num_recent, num_random: expected at least one probe in all, got 0 and 0")


def scale(x: float | None) -> None:
    """None or a finite number."""
    if x is None:
        return
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {x!r}")
    if not math.isfinite(x):
        raise ValueError(f"scale: expected a finite number or None, got {x!r}")


def pool(x: str) -> None:
    """ "layer" or "kv_head"."""
    if x not in ("layer", "kv_head"):
        raise ValueError(f"pool: expected 'layer' or 'kv_head', got {x!r}")


def decode_rows(q: Tensor) -> None:
    """At most 16 query rows."""
    if q.shape[2] > MAX_DECODE_ROWS:
        raise ValueError(f"q: expected at most {MAX_DECODE_ROWS} query rows (M), got shape {_shape(q)}")


_ROWS, _PACKED = "[batch, heads, rows, head dim]", "[rows, heads, head dim] with cu_seqlens"
_FORMS = {None: _ROWS, False: f"{_ROWS}, or {_PACKED}", True: _PACKED}


def _heads(name: str, x: Tensor, other: str, like: Tensor, wanted: str = _ROWS) -> torch.Size:
    """The shape of a float tensor, as `wanted`, last dim contiguous, with dtype and device of `like`, named `other`."""
    if not isinstance(x, Tensor):
        _tensor(name, x)
    shape, dtype = x.shape, x.dtype
    if len(shape) != (3 if wanted is _PACKED else 4):
        raise ValueError(f"{name}: expected {wanted}, got shape {_shape(x)}")
    if x is like or dtype != like.dtype:
        if dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {dtype}")
        if dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} like {other}, got {dtype}")
    if x is not like and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like {other}, got one on {x.device}")
    if shape[1] < 1 or shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one head and a head dim of at least 1, got shape {_shape(x)}")
    if x.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dim, got strides {x.stride()} for shape {_shape(x)}")
    return shape


def _same_as_k(v: Tensor, k: Tensor, suffix: str = "", wanted: str = _ROWS) -> None:
    if _heads(f"v{suffix}", v, f"k{suffix}", k, wanted) != k.shape:
        raise ValueError(f"v{suffix}: expected the shape of k{suffix}, {_shape(k)}, got {_shape(v)}")


def _tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_type(x)}")


def _type(x: object) -> str:
    return type(x).__name__


def _same(shape: torch.Size, wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(n == m for n, m in zip(shape, wanted, strict=True))


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
