"""Move the kept keys and values to the front of each sequence's pages (ZipVL in an engine with a paged KV cache)."""

import torch
from torch import Tensor

from zipvl_reference.compact_kv import Layers, layers

ROWS = 1024  # rows moved at a time: the extra memory


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
    """In place: row `indices[b, g, i]` of a sequence moves to its row `i`. Returns new lengths and freed blocks.

    Lists have a tensor of each layer, and what is returned then has a row of each.
    """
    given = layers(k_cache, v_cache, indices, counts, block_table, seqused_k)
    found = [_one_layer(*layer, layout=layout, first_writable=first_writable) for layer in given]
    if isinstance(k_cache, Tensor):
        return found[0]
    seqused, freed = zip(*found, strict=True)
    return torch.stack(seqused), torch.stack(freed)


def _one_layer(
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_table: Tensor,
    seqused_k: Tensor,
    *,
    layout: str,
    first_writable: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator for one layer.

    Rows only ever move towards the front, as in `compact_kv_`. Rows before `first_writable`, and what is not a row of
    a sequence, stay as they are whatever the arguments say.
    """
    if layout == "NHD":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    (num_blocks, Hkv, size), (B, G, W) = k_cache.shape[:3], indices.shape
    capacity = block_table.shape[1] * size
    used = (seqused_k if seqused_k.dim() == 2 else seqused_k[:, None]).clamp(0, capacity).expand(B, G)
    kept = torch.minimum(counts.clamp(0, W), used)
    for b in range(B):
        first = 0 if first_writable is None else first_writable[b]
        for begin in range(0, min(W, capacity), ROWS):
            to = torch.arange(begin, min(begin + ROWS, W, capacity), device=k_cache.device)
            for h in range(Hkv):
                g = h % G
                source = indices[b, g, begin : begin + len(to)]
                moves = (to >= first) & (to < kept[b, g]) & (source >= 0) & (source < used[b, g])
                pages = [block_table[b, at.clamp(0, capacity - 1) // size] for at in (source, to)]
                for page in pages:
                    moves = moves & (page >= 0) & (page < num_blocks)
                # A row that does not move does what the first moving one does; without any, a row moves onto itself.
                like = torch.where(moves, torch.arange(len(to), device=to.device), moves.int().argmax())
                read_page, write_page = (page[like].clamp(0, num_blocks - 1) for page in pages)
                read_row, write_row = source[like] % size, to[like] % size
                read_page = torch.where(moves.any(), read_page, write_page)
                read_row = torch.where(moves.any(), read_row, write_row)
                for cache in (k_cache[:, h], v_cache[:, h]):
                    cache.index_put_((write_page, write_row), cache[read_page, read_row])
    blocks = (torch.stack([used.amax(1), kept.amax(1)]) + size - 1) // size
    return kept[:, 0] if G == 1 else kept, blocks[0] - blocks[1]
