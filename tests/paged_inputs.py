"""Inputs over pages, and the same in one buffer."""

import torch
from zipvl_reference.pages import in_rows


def over_pages(page, layout, device, *, M=12, used=(22, 17), dtype=torch.float32):
    """`q`, two pools that are the halves of one tensor, and the arguments that say where sequences are in them.

    Two sequences of `used` rows, 4 and 2 heads of 16; rows and pages that are not used hold NaN.
    """
    random = torch.Generator().manual_seed(0)
    blocks, Hkv, D = -(-max(used) // page), 2, 16
    pools = torch.full((2, 2 * blocks + 2, page, Hkv, D), torch.nan, dtype=dtype)
    table = torch.randperm(2 * blocks + 2, generator=random)[: 2 * blocks].view(2, blocks)
    for b, length in enumerate(used):
        j = torch.arange(length)
        pools[:, table[b, j // page], j % page] = torch.randn(2, length, Hkv, D, generator=random).to(dtype)
        table[b, -(-length // page) :] = 2**31 - 1
    if layout == "HND":
        pools = pools.transpose(2, 3).contiguous()
    q = torch.randn(2, 2 * Hkv, M, D, generator=random).to(dtype)
    seqused_k = torch.tensor(used, dtype=torch.int32, device=device)
    return (
        q.to(device),
        pools.to(device).unbind(),
        {
            "seqused_k": seqused_k,
            "block_table": table.int().to(device),
            "layout": layout,
        },
    )


def in_one_buffer(pools, paged):
    """Keys and values `[B, Hkv, N, D]`."""
    return [in_rows(pool, paged["block_table"], paged["layout"]) for pool in pools]
