"""What the Hopper kernels take of a pool of pages, whose rows come in boxes of a page or a part of one (TMA)."""

from torch import Tensor

PAGES = (16, 32, 64, 128, 256)  # rows
MAX_TOKENS = 2**30  # of a sequence: a table may have room for any number


def lacks(k: Tensor, seqused_k: Tensor | None, block_table: Tensor, layout: str) -> str:
    """What keeps these kernels from `k`, a pool, and a table of its pages; "" where nothing does."""
    if seqused_k is None:
        return "seqused_k: expected int32 [B] with a block_table, got None"
    page = k.shape[1 if layout == "NHD" else 2]
    if page not in PAGES:
        return f"k: expected pages of {', '.join(map(str, PAGES))} rows, got {page}"
    if page * block_table.shape[1] > MAX_TOKENS:
        return f"block_table: expected at most {MAX_TOKENS} rows of a sequence, got shape {list(block_table.shape)}"
    return ""
