"""What the kernels that read pages of a pool share."""

import triton
import triton.language as tl


def stages(num_stages: int, loads: int) -> int:
    """Stages of a loop that keep as many tiles in flight when it has to load `loads` numbers first to find each."""
    return (num_stages - 1) * (loads + 1) + 1


@triton.jit  # type: ignore[untyped-decorator]
def in_pool(  # type: ignore[no-untyped-def]
    table,  # of one sequence: the page of every PAGE rows
    row,  # int32, below the table's rows
    there,  # which of them there are
    table_n,
    num_blocks,
    PAGE: tl.constexpr,
):
    """The page that each row is in, and its row there: int64, and in the pool whatever the table holds."""
    page = tl.load(table + (row // PAGE).to(tl.int64) * table_n, mask=there, other=0)
    return tl.minimum(tl.maximum(page, 0), num_blocks - 1).to(tl.int64), (row % PAGE).to(tl.int64)
