"""Checks of arguments: each raises TypeError or ValueError that names the argument, what was expected and what came."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_DECODE_ROWS = 16
LAYOUTS = {"NHD": "[num_blocks, block_size, Hkv, D]", "HND": "[num_blocks, Hkv, block_size, D]"}


def heads(*, q: Tensor, k: Tensor, v: Tensor | None = None, packed: bool | None = None) -> None:
    """`q [B, Hq, M, D]` with `k, v [B, Hkv, N, D]`: one dtype and device, `Hq % Hkv == 0`, last dim contiguous.

    With `packed`, `q [T, Hq, D]` and `k, v [T, Hkv, D]`; `packed` is None for an operator that has no such form.
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
    if v is not None:
        _same_as_k(v, k, wanted=rows)


def pair(k: Tensor, v: Tensor, packed: bool | None = None) -> None:
    """`k, v [B, Hkv, N, D]`, or `[T, Hkv, D]` with `packed`: one shape, dtype and device, last dim contiguous."""
    _heads("k", k, "k", k, _FORMS[packed])
    _same_as_k(v, k, wanted=_FORMS[packed])


def sequence_bounds(cu_seqlens: Tensor, device: torch.device | None) -> torch.device:
    """int32 `[B + 1]` on `device`, or on any; returns on which."""
    _tensor("cu_seqlens", cu_seqlens)
    bounds = cu_seqlens.shape[0] if cu_seqlens.dim() == 1 else 0
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    int32("cu_seqlens", cu_seqlens, device or cu_seqlens.device, (max(bounds, 1),), meaning="[B + 1]")
    return cu_seqlens.device


def sequences(
    cu_seqlens: Tensor | None, max_seqlen: int | None, T: int | None, device: torch.device, **padded: Tensor | None
) -> int | None:
    """`max_seqlen`, at most `T`, for int32 `cu_seqlens [B + 1]` on `device`; None where both are None.

    `padded` are the arguments that only sequences of one length have, and packed ones leave None.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen!r}")
        return None
    sequence_bounds(cu_seqlens, device)
    if max_seqlen is None:
        raise ValueError("max_seqlen: expected a whole number with cu_seqlens, got None")
    not_negative(max_seqlen=max_seqlen)
    for name, x in padded.items():
        if x is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens, which says where sequences are, got {_type(x)}")
    return max_seqlen if T is None else min(max_seqlen, T)


def layout(x: str) -> None:
    """ "NHD" or "HND"."""
    if x not in LAYOUTS:
        raise ValueError(f"layout: expected 'NHD' or 'HND', got {x!r}")


def pools(k: Tensor, v: Tensor | None, layout: str, *, q: Tensor | None = None, suffix: str = "") -> int:
    """Pools of pages, arguments `k` and `v` with `suffix`, that fit `q [B, Hq, M, D]` if given; returns `Hkv`."""
    name, shape = f"k{suffix}", LAYOUTS[layout]
    if q is None:
        _heads(name, k, name, k, shape)
    else:
        _heads("q", q, "q", q)
        _heads(name, k, "q", q, shape)
    if 0 in k.shape:
        raise ValueError(f"{name}: expected {shape} of at least one block, row and head, got shape {_shape(k)}")
    if v is not None:
        _same_as_k(v, k, suffix, shape)
    Hkv = k.shape[2 if layout == "NHD" else 1]
    if q is not None and (k.shape[3] != q.shape[3] or q.shape[1] % Hkv):
        raise ValueError(
            f"{name}: expected {shape} with D = {q.shape[3]} as in q and a number of heads that divides the "
            f"{q.shape[1]} heads of q, got shape {_shape(k)}"
        )
    return Hkv


def block_table(x: Tensor, device: torch.device, B: int | None = None) -> int:
    """int32 `[B, max_blocks]`, for any number of sequences where `B` is None; returns `B`."""
    _tensor("block_table", x)
    height, width = tuple(x.shape) if x.dim() == 2 else (0, 0)
    B = height if B is None else B
    int32("block_table", x, device, (B, width), meaning="[B, max_blocks]")
    return B


def paged(
    q: Tensor,
    table: Tensor,
    seqused_k: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
    *,
    k: Tensor,
    v: Tensor | None = None,
) -> int:
    """Pools `k, v` in `layout` that fit `q [B, Hq, M, D]`, with a block table and used lengths; returns `Hkv`."""
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: expected None with a block_table, got {_type(cu_seqlens)}")
    Hkv = pools(k, v, layout, q=q)
    block_table(table, q.device, q.shape[0])
    if seqused_k is None:
        raise ValueError("seqused_k: expected int32 [B] with a block_table, got None")
    return Hkv


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


def packed_selection(indices: Tensor, counts: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    """`indices [G, T]` and `counts [B, G]` for `k [T, Hkv, D]` and `cu_seqlens [B + 1]`."""
    T, Hkv = k.shape[:2]
    int32("indices", indices, k.device, (1, T), (Hkv, T), meaning="[G, T] with G = 1 or Hkv")
    int32("counts", counts, k.device, (cu_seqlens.shape[0] - 1, indices.shape[0]), meaning="[B, G]")


def selection(indices: Tensor, counts: Tensor, k: Tensor, *, any_width: bool = False) -> None:
    """`indices [B, G, N]` and `counts [B, G]` for `k [B, Hkv, N, D]`; with `any_width`, `N` of `k` may be another."""
    B, Hkv = k.shape[:2]
    _tensor("indices", indices)
    N = indices.shape[-1] if any_width and indices.dim() else k.shape[2]
    int32("indices", indices, k.device, (B, 1, N), (B, Hkv, N), meaning="[B, G, N] with G = 1 or Hkv")
    int32("counts", counts, k.device, (B, indices.shape[1]), meaning="[B, G]")


def paged_selection(indices: Tensor, counts: Tensor, B: int, Hkv: int, device: torch.device) -> int:
    """`indices [B, G, W]` and `counts [B, G]` with `G` = 1 or `Hkv`, any `W`; returns `G`."""
    _tensor("indices", indices)
    W = indices.shape[-1] if indices.dim() else 0
    int32("indices", indices, device, (B, 1, W), (B, Hkv, W), meaning="[B, G, W] with G = 1 or Hkv")
    G = indices.shape[1]
    int32("counts", counts, device, (B, G), meaning="[B, G]")
    return G


def layers(shared: Mapping[str, Any] | None = None, **given: Any) -> tuple[list[Tensor], ...]:
    """One tensor for each of as many layers in each of `given`; alike in shape, strides, dtype and device.

    A tensor in `shared` stands for one of every layer.
    """
    (first, some), *_ = given.items()
    for name, x in (shared or {}).items():
        given[name] = [x] * len(some) if isinstance(x, Tensor) and isinstance(some, Sequence) else x
    for name, tensors in given.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            wanted = "a tensor or a sequence of tensors" if name == first else f"a sequence of tensors like {first}"
            raise TypeError(f"{name}: expected {wanted}, got {_type(tensors)}")
        if not tensors:
            raise ValueError(f"{name}: expected a tensor of each layer, at least one, got 0")
        if len(tensors) != len(some):
            raise ValueError(f"{name}: expected a tensor of each layer, as many as {first} has, got {len(tensors)}")
        _tensor(f"{name}[0]", tensors[0])
        like = tensors[0]
        wanted = like.shape, like.stride(), like.dtype, like.device
        for i, x in enumerate(tensors):
            if x is like:
                continue
            _tensor(f"{name}[{i}]", x)
            if (x.shape, x.stride(), x.dtype, x.device) != wanted:
                raise ValueError(
                    f"{name}[{i}]: expected shape, strides, dtype and device of {name}[0], {_shape(like)}, "
                    f"{like.stride()}, {like.dtype} and {like.device}, got {_shape(x)}, {x.stride()}, {x.dtype} "
                    f"and {x.device}"
                )
    return tuple(list(tensors) for tensors in given.values())


def own_memory_of_layers(suffix: str = "", **given: list[Tensor]) -> None:
    """No tensor of `given`, whose names get `suffix`, twice."""
    seen: dict[int, str] = {}
    for name, tensors in given.items():
        for i, x in enumerate(tensors):
            here = f"{name}{suffix}[{i}]"
            if seen.setdefault(id(x), here) != here:
                raise ValueError(f"{here}: expected a buffer of its own, got the same tensor as {seen[id(x)]}")


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
