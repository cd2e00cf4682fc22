"""Property checks that hold an implementation of the operators, yours or ours, to their contract.

    from zipvl_reference.testing import check_select_tokens
    check_select_tokens(my_select_tokens, device="cuda")

Each check draws shapes, strides, padding and values with hypothesis, compares with an oracle of its own in float64 or
plain Python, and on failure raises AssertionError with the smallest failing example. `fn` has the signature of the
operator less `backend` (use `functools.partial` to fix one). Common to all of them:

- `device`, `dtype`: of the tensors handed to `fn`.
- `max_examples`: how many examples are drawn. `derandomize=True` draws the same ones at every run.
- `head_dims`, `max_tokens`, where there: the head dims to draw from and the longest sequence.
- `same_bits`, of packed sequences: whether floats are compared bit for bit with each sequence alone; not for what pads.
- `block_sizes`, where there: the rows of a page to draw from.

Index outputs and moved rows have to be exact. Float outputs may be off by twice the error of the plain PyTorch
computation in the same dtype, plus what one rounding can change; see `zipvl_reference.testing.budget`.
"""

from zipvl_reference.testing.compact_kv import check_compact_kv, check_compact_kv_of_layers, check_packed_compact_kv
from zipvl_reference.testing.compact_paged_kv import check_compact_paged_kv, check_compact_paged_kv_of_layers
from zipvl_reference.testing.decode_attention import check_decode_attention, check_paged_decode_attention
from zipvl_reference.testing.packed import (
    check_packed_probe_rows,
    check_packed_score_tokens,
    check_packed_select_tokens,
    check_packed_sparse_attention,
    check_packed_zipvl_prefill,
)
from zipvl_reference.testing.probe_rows import check_probe_rows
from zipvl_reference.testing.score_tokens import check_paged_score_tokens, check_score_tokens
from zipvl_reference.testing.select_tokens import check_select_tokens
from zipvl_reference.testing.sparse_attention import check_paged_sparse_attention, check_sparse_attention
from zipvl_reference.testing.zipvl_prefill import check_zipvl_prefill

__all__ = [
    "check_compact_kv",
    "check_compact_kv_of_layers",
    "check_compact_paged_kv",
    "check_compact_paged_kv_of_layers",
    "check_decode_attention",
    "check_packed_compact_kv",
    "check_packed_probe_rows",
    "check_packed_score_tokens",
    "check_packed_select_tokens",
    "check_packed_sparse_attention",
    "check_packed_zipvl_prefill",
    "check_paged_decode_attention",
    "check_paged_score_tokens",
    "check_paged_sparse_attention",
    "check_probe_rows",
    "check_score_tokens",
    "check_select_tokens",
    "check_sparse_attention",
    "check_zipvl_prefill",
]
