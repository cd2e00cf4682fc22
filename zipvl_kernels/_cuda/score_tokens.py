"""`score_tokens` in CUDA C for Hopper: fp16 and bf16, head dims 64 and 128. The .cu says how."""

import math
import struct
from functools import cache, lru_cache

import torch
from cupy.cuda.function import Function
from torch import Tensor

from zipvl_kernels._cuda import common
from zipvl_kernels._cuda.packed import as_batch, fewest, ways
from zipvl_kernels._cuda.pages import lacks as no_pages
from zipvl_kernels._cuda.tensor_map import lacks as no_copies
from zipvl_kernels._cuda.tensor_map import tensor_map

THREADS = 640
TILE = 128  # probes, and columns
HEAD_DIMS = (64, 128)
MAX_PROBES = 512
MAX_ITEMS = 32  # tiles of probes, over the heads of a block
MAX_SPAN = 16  # tiles of columns of a block
LISTED = 1024  # tiles of a packed sequence for which shares are worked out at once
AT_ONCE = 132  # blocks that run at a time, one a multiprocessor of an H100 or H200
# Scratch of a column stays at 56 bytes, where that leaves enough blocks: the log-sum-exps of all probes, heads and
# splits; and 4 for every part of a group's heads, less those for which the outputs serve.
ROW_BYTES, MAX_PARTS, MAX_SPLITS = 24, 10, 32
_ADDRESSES, _NUMBERS = struct.Struct("=128s12Q"), struct.Struct("=Q7q12if7i16x")


def lacks(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    pool: str = "layer",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> str:
    """What keeps this kernel from these arguments, "" where nothing does."""
    if block_table is not None:
        if why := no_pages(k, seqused_k, block_table, layout):
            return why
        if leftpad_k is not None:
            return "leftpad_k: expected None with a block_table, since tiles begin with a page"
    if q.dtype == torch.float32:
        return "q: expected float16 or bfloat16, got torch.float32"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q: expected a head dim of 64 or 128, got shape {list(q.shape)}"
    if scale is not None and scale < 0:
        return f"scale: expected at least 0, got {scale!r}"
    if probe_rows.shape[-1] > MAX_PROBES:
        return f"probe_rows: expected at most {MAX_PROBES} rows, got shape {list(probe_rows.shape)}"
    for name, x in (("q", q), ("k", k)):
        if why := no_copies(name, x):
            return why
    if common.capability(q.device) != (9, 0):
        return f"expected a GPU of compute capability 9.0, got {common.capability(q.device)}"
    return ""


def score_tokens(
    q: Tensor,  # [B, Hq, M, D], or [T, Hq, D] with `cu_seqlens`
    k: Tensor,  # [B, Hkv, N, D], or [T, Hkv, D]
    probe_rows: Tensor,  # int32 [P] or [B, P]
    *,
    scale: float | None = None,
    q_start: Tensor | None = None,  # int32 [B]
    leftpad_k: Tensor | None = None,  # int32 [B]
    seqused_k: Tensor | None = None,  # int32 [B]
    pool: str = "layer",
    cu_seqlens: Tensor | None = None,  # int32 [B + 1]
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """Column sums of the probes' causal softmax, and their mean over the heads and probes that see it.

    Both `[B, G, N]`, or `[G, T]` with `cu_seqlens`.
    """
    where = cu_seqlens, max_seqlen, block_table, layout
    return launch(q, k, probe_rows, scale, q_start, leftpad_k, seqused_k, pool, None, *where)


def launch(
    q: Tensor,
    k: Tensor,
    probe_rows: Tensor,
    scale: float | None,
    q_start: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    pool: str,
    shares: tuple[int, int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_table: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """The operator on arguments that it can take; `shares` in place of those that `plan` gives."""
    packed = table = None
    if cu_seqlens is not None and max_seqlen is not None:
        packed = cu_seqlens.shape[0] - 1, max_seqlen
        q, k = as_batch(q), as_batch(k)
    if block_table is not None:
        if layout == "NHD":
            k = k.transpose(1, 2)
        table = block_table.shape[1], *block_table.stride()
    device, q_shape, k_shape, rows_shape = q.device, q.shape, k.shape, probe_rows.shape
    G = 1 if pool == "layer" else k_shape[1]
    shape = (q_shape[0], G, k_shape[2] if table is None else k_shape[2] * table[0])
    accumulated = torch.empty(shape[1:] if packed else shape, dtype=torch.float32, device=device)
    normalized = torch.empty_like(accumulated)
    if not accumulated.numel() or not min(q_shape[2], rows_shape[-1], *(packed or ())):
        return accumulated.zero_(), normalized.zero_()
    shapes = q_shape, k_shape, rows_shape, q.stride(), probe_rows.stride()
    launches, sizes = prepared(device, q.dtype == torch.float16, *shapes, G, scale, shares, packed, table)
    scratch = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    at = scratch.data_ptr()
    given = [None if x is None else x.contiguous() for x in (q_start, leftpad_k, seqused_k, cu_seqlens)]
    start, *padding, cu_seqlens = given
    addresses: tuple[int | bytes, ...] = (
        tensor_map(k, TILE if table is None else min(TILE, k_shape[2])),
        q.data_ptr(),
        probe_rows.data_ptr(),
        common.address(start),
        *map(common.address, padding),
        at,
        at + 4 * sizes[0],
        at + 4 * (sizes[0] + sizes[1]),
        accumulated.data_ptr(),
        normalized.data_ptr(),
        common.address(cu_seqlens),
        common.address(block_table),
    )
    for step in launches:
        common.launch(step, *addresses)
    return accumulated, normalized


@lru_cache(maxsize=256)
def prepared(
    device: torch.device,
    half: bool,
    q_shape: torch.Size,
    k_shape: torch.Size,
    rows_shape: torch.Size,
    q_stride: tuple[int, ...],
    rows_stride: tuple[int, ...],
    G: int,
    scale: float | None,
    shares: tuple[int, int, int] | None = None,
    packed: tuple[int, int] | None = None,
    table: tuple[int, int, int] | None = None,
) -> tuple[tuple[common.Launch, ...], tuple[int, int, int]]:
    """The two launches, which take the same addresses, and the sizes of their scratch.

    That is, in 4 bytes: the log-sum-exps, the sums of each part of the heads, and the counters of blocks. `packed` is
    how many sequences one batch of all holds, and the longest; `table` a block table's width and strides.
    """
    (B, Hq, M, D), (num_blocks, Hkv, N, _), P, page = q_shape, k_shape, rows_shape[-1], 0
    if table is not None:
        N, page = N * table[0], N
    shared = 1024 + 6 * TILE * D * 2 + 28672  # alignment, two tiles of queries and four of K, the rest
    lengths, given, places = 0, (0, 0), [0, 0, 0, 0]
    if packed:
        q_stride, given, tiles = (0, *q_stride[1:]), packed, -(-packed[1] // TILE)
        # Few tables, since the first call with each copies it to the device; small ones go with few probes.
        listed = tiles if tiles * TILE <= MAX_PROBES else max(LISTED, 1 << (tiles - 1).bit_length())
        lengths = _shares(device, listed, P, Hq, G, shares).data_ptr()
        row_tiles, column_tiles, parts, in_rows, in_columns = _places(tiles, P, Hq, G, shares)
        (splits, *row_places), (spans, *column_places) = (fewest(x, N, packed[0]) for x in (in_rows, in_columns))
        blocks = Hq * -(-P // TILE) * splits, G * spans
        places = [*row_places, *column_places]
    else:
        row_tiles, column_tiles, parts = shares or plan(N, P, Hq, G)
        splits, spans = (-(-N // (tiles * TILE)) for tiles in (row_tiles, column_tiles))
        blocks = B * Hq * -(-P // TILE) * splits, B * G * parts * spans
    numbers = _NUMBERS.pack(
        lengths,
        *q_stride[:3],
        0 if len(rows_shape) == 1 else rows_stride[0],
        rows_stride[-1],
        *((0, 0) if table is None else table[1:]),
        B,
        Hq,
        G,
        M,
        N,
        P,
        Hq // Hkv,
        row_tiles * TILE,
        splits,
        column_tiles * TILE,
        spans,
        parts,
        (D**-0.5 if scale is None else scale) * math.log2(math.e) or 1e-30,  # times -inf, 0 would be NaN
        *given,
        *places,
        num_blocks,
    )
    sizes = B * Hq * splits * P, B * G * max(0, parts - 2) * N, B * G * spans
    kernels = zip(_kernels(device, D, half, shared, packed is not None, page), blocks, strict=True)
    return tuple(common.Launch(x, device, grid, THREADS, _ADDRESSES, numbers, shared) for x, grid in kernels), sizes


@cache
def plan(N: int, P: int, Hq: int, G: int) -> tuple[int, int, int]:
    """Tiles of columns of a block in each launch, and parts of a group's heads: the fewest steps until all are done.

    Of the shape of one sequence alone, so that its bits do not depend on the batch. Of `N`, and of `P` beyond a tile,
    the number of tiles counts, so that packed sequences can look it up. A step is two tiles.
    """
    tiles, blocks, heads = -(-N // TILE), -(-P // TILE), Hq // G
    probes = P if blocks == 1 else blocks * TILE
    most_splits = max(1, min(MAX_SPLITS, ROW_BYTES * tiles * TILE // (4 * Hq * probes)))
    row_tiles = {-(-tiles // splits) for splits in range(1, most_splits + 1)}

    def row_steps(row_tiles: int) -> float:
        rounds = -(-Hq * blocks * -(-tiles // row_tiles) // AT_ONCE)
        return rounds * (2 + -(-row_tiles // 2))

    def column_steps(share: tuple[int, int]) -> float:
        column_tiles, parts = share
        rounds = -(-G * parts * -(-tiles // column_tiles) // AT_ONCE)
        return rounds * (4 + -(-heads // parts) * blocks * (column_tiles / 2 + 0.3))

    least = _least_parts(P, heads)
    parts = range(least, min(heads, max(least, MAX_PARTS)) + 1)
    shares = [(t, part) for part in parts for t in range(2, MAX_SPAN + 1, 2)]
    return min(sorted(row_tiles), key=row_steps), *min(shares, key=column_steps)


def _least_parts(P: int, heads: int) -> int:
    return -(-heads // (MAX_ITEMS // -(-P // TILE)))


@cache
def _plans(tiles: int, P: int, Hq: int, G: int, shares: tuple[int, int, int] | None) -> list[tuple[int, int, int]]:
    """What `plan` says of a sequence of so many tiles, or fewer, with the probes that it has alone."""
    # For all probes, which are there, though not valid. More than MAX_PARTS only for more than 80 heads with more than
    # 128 probes: there a sequence with fewer rows than that has more parts than it has alone.
    least = _least_parts(P, Hq // G)

    def of(rows: int) -> tuple[int, int, int]:
        row_tiles, column_tiles, parts = plan(rows, min(P, rows), Hq, G)
        return row_tiles, column_tiles, max(parts, least)

    return [shares or of(max(t, 1) * TILE) for t in range(tiles + 1)]


@cache  # for good: launches hold its address
def _shares(device: torch.device, tiles: int, P: int, Hq: int, G: int, shares: tuple[int, int, int] | None) -> Tensor:
    """What bits depend on, by the tiles of a sequence: columns of a split, and parts; int32 `[tiles + 1, 2]`."""
    plans = _plans(tiles, P, Hq, G, shares)
    return torch.tensor([(row * TILE, parts) for row, _, parts in plans], dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _places(
    tiles: int, P: int, Hq: int, G: int, shares: tuple[int, int, int] | None
) -> tuple[int, int, int, list[tuple[int, int]], list[tuple[int, int]]]:
    """For sequences of so many tiles or fewer: tiles of a block in each launch, most parts, and `ways` of each."""
    plans = _plans(tiles, P, Hq, G, shares)
    row_tiles, column_tiles, _ = plans[-1]
    rows = [-(-t // row) for t, (row, _, _) in enumerate(plans)]
    columns = [-(-t // column_tiles) * parts for t, (_, _, parts) in enumerate(plans)]
    return row_tiles, column_tiles, max(parts for *_, parts in plans), ways(rows, TILE), ways(columns, TILE)


@cache
def _kernels(
    device: torch.device, D: int, half: bool, shared: int, packed: bool, page: int
) -> tuple[Function, Function]:
    """The two kernels, compiled and loaded on `device`."""
    macros = {"HEAD_DIM": D, "HALF": int(half), "PACKED": int(packed), "PAGE": page}
    module = common.load_module("score_tokens", "sm_90a", device, **macros)
    row_sums, column_sums = module.get_function("row_sums"), module.get_function("column_sums")
    common.allow_shared(row_sums, device, shared)
    common.allow_shared(column_sums, device, shared)
    return row_sums, column_sums
