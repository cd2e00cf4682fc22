"""`compact_paged_kv_` in Triton: `compact_kv_`, whose rows lie in pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zipvl_reference.compact_kv import Layers, layers

from zipvl_kernels._tickets import tickets
from zipvl_kernels._triton import common
from zipvl_kernels._triton.common import dense
from zipvl_kernels._triton.compact_kv import finish, wait_for_readers

ROWS = 64  # of a tile


def compact_paged_kv_(
    k_cache: Layers,  # "NHD": [num_blocks, block_size, Hkv, D], "HND": [num_blocks, Hkv, block_size, D]
    v_cache: Layers,
    indices: Layers,  # int32 [B, G, W]
    counts: Layers,  # int32 [B, G]
    block_table: Layers,  # int32 [B, max_blocks]
    seqused_k: Layers,  # int32 [B] or [B, G]
    *,
    layout: str = "NHD",
    first_writable: Tensor | None = None,  # int32 [B]
) -> tuple[Tensor, Tensor]:
    """In place: row `indices[b, g, i]` of a sequence moves to row `i`. Returns new lengths and freed blocks.

    Lists have a tensor of each layer, and what is returned then has a row of each; a launch a layer.
    """
    given = layers(k_cache, v_cache, indices, counts, block_table, seqused_k)
    (B, G), device = given[0][3].shape, given[0][3].device
    seqused = torch.empty((len(given), B) if G == 1 else (len(given), B, G), dtype=torch.int32, device=device)
    freed = torch.empty(len(given), B, dtype=torch.int32, device=device)
    for layer, lengths, blocks in zip(given, seqused, freed, strict=True):
        _launch(*layer, layout=layout, first_writable=first_writable, seqused=lengths, freed=blocks)
    return (seqused[0], freed[0]) if isinstance(k_cache, Tensor) else (seqused, freed)


def _launch(
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    *,
    layout: str,
    first_writable: Tensor | None,
    seqused: Tensor,
    freed: Tensor,
) -> None:
    """One layer, into `seqused` and `freed`."""
    if layout == "NHD":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    (num_blocks, Hkv, page, D), (B, G, W) = k_cache.shape, indices.shape
    if B == 0:
        return
    capacity = block_table.shape[1] * page
    tiles = max(1, common.pieces(min(W, capacity), ROWS))  # one for the lengths, at least
    programs = tiles * B * Hkv
    row_bytes = common.power_of_2(D) * k_cache.element_size()
    common.launch(
        _kernel,
        (programs,),
        (
            k_cache,
            v_cache,
            indices,
            counts,
            block_table,
            seqused_k,
            dense(first_writable),
            seqused,
            freed,
            tickets(k_cache.device, programs + 2),
        ),
        (
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *indices.stride(),
            *counts.stride(),
            *block_table.stride(),
            seqused_k.stride(0),
            seqused_k.stride(1) if seqused_k.dim() == 2 else 0,
            W,
            capacity,
            num_blocks,
            W.bit_length(),
            Hkv,
            G,
            tiles,
            programs,
        ),
        D=D,
        BLOCK_D=common.power_of_2(D),
        ROWS=ROWS,
        PAGE=page,
        num_warps=min(16, max(4, row_bytes // 64)),  # a thread's part of a tile fits its registers
    )


@triton.jit
def _lengths(seqused_k, used_g, counts, counts_g, g, W, capacity):  # type: ignore[no-untyped-def]
    """Rows of group `g` that are used, and that are kept: no more than there can be, whatever the arguments say."""
    used = tl.maximum(tl.minimum(tl.load(seqused_k + g * used_g), capacity), 0).to(tl.int32)
    kept = tl.maximum(tl.minimum(tl.load(counts + g * counts_g), W), 0).to(tl.int32)
    return used, tl.minimum(kept, used)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    k,  # [num_blocks, Hkv, PAGE, D]
    v,  # [num_blocks, Hkv, PAGE, D]
    indices,  # [B, G, W]
    counts,  # [B, G]
    block_table,  # [B, capacity / PAGE]
    seqused_k,  # [B] or [B, G]
    first_writable,  # [B] or None
    seqused,  # [B, G], dense: written
    freed,  # [B], dense: written
    counters,  # the next ticket, how many are done, and which tiles have been read [tiles, B * Hkv]
    k_p,
    k_h,
    k_n,
    v_p,
    v_h,
    v_n,
    indices_b,
    indices_g,
    indices_n,
    counts_b,
    counts_g,
    table_b,
    table_n,
    used_b,
    used_g,
    W,
    capacity,
    num_blocks,
    steps,  # of a binary search
    Hkv,
    G,
    tiles,
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
):
    ticket = tl.atomic_add(counters, 1)
    chains = programs // tiles
    tile = ticket // chains
    chain = ticket % chains
    b = (chain // Hkv).to(tl.int64)
    h = (chain % Hkv).to(tl.int64)
    g = h % G
    columns = indices + b * indices_b + g * indices_g
    counts += b * counts_b
    block_table += b * table_b
    seqused_k += b * used_b
    used, count = _lengths(seqused_k, used_g, counts, counts_g, g, W, capacity)
    if tile * ROWS < count:
        to = tile * ROWS + tl.arange(0, ROWS)  # [R]
        d = tl.arange(0, BLOCK_D)  # [D]
        source = tl.load(columns + to.to(tl.int64) * indices_n, mask=to < count, other=0)  # [R]
        moves = (to < count) & (source != to) & (source >= 0) & (source < used)
        if first_writable is not None:
            moves = moves & (to >= tl.load(first_writable + b))
        from_page = tl.load(block_table + (source // PAGE).to(tl.int64) * table_n, mask=moves, other=0)
        to_page = tl.load(block_table + (to // PAGE).to(tl.int64) * table_n, mask=moves, other=0)
        moves = moves & (from_page >= 0) & (from_page < num_blocks) & (to_page >= 0) & (to_page < num_blocks)
        mask = moves[:, None] & (d < D)
        keys = k + h * k_h + d
        values = v + h * v_h + d
        page = from_page.to(tl.int64)
        row = (source % PAGE).to(tl.int64)
        K = tl.load(keys + (page * k_p + row * k_n)[:, None], mask=mask)  # [R, D]
        V = tl.load(values + (page * v_p + row * v_n)[:, None], mask=mask)
        wait_for_readers(columns, indices_n, count, tile * ROWS, steps, counters + 2, tile, chain, chains, ROWS)
        page = to_page.to(tl.int64)
        row = (to % PAGE).to(tl.int64)
        tl.store(keys + (page * k_p + row * k_n)[:, None], K, mask=mask)
        tl.store(values + (page * v_p + row * v_n)[:, None], V, mask=mask)

    if (tile == 0) & (h == 0):
        longest = used * 0
        longest_kept = used * 0
        for other in range(0, G):
            used, count = _lengths(seqused_k, used_g, counts, counts_g, other, W, capacity)
            tl.store(seqused + b * G + other, count)
            longest = tl.maximum(longest, used)
            longest_kept = tl.maximum(longest_kept, count)
        tl.store(freed + b, (longest + PAGE - 1) // PAGE - (longest_kept + PAGE - 1) // PAGE)
    finish(counters, programs)
