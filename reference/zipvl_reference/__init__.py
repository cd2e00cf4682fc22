"""ZipVL's operators in plain PyTorch: the readable truth that every faster implementation is held to.

One file an operator; names and signatures are those of `zipvl_kernels`, which documents them in full, less `backend`.
`zipvl_reference.testing` checks any implementation of them. The method is that of ZipVL (arXiv 2410.08584).
"""

from zipvl_reference.compact_kv import compact_kv_
from zipvl_reference.compact_paged_kv import compact_paged_kv_
from zipvl_reference.decode_attention import decode_attention
from zipvl_reference.probe_rows import probe_rows
from zipvl_reference.score_tokens import score_tokens
from zipvl_reference.select_tokens import select_tokens
from zipvl_reference.sparse_attention import sparse_attention
from zipvl_reference.zipvl_prefill import zipvl_prefill_

__all__ = [
    "compact_kv_",
    "compact_paged_kv_",
    "decode_attention",
    "probe_rows",
    "score_tokens",
    "select_tokens",
    "sparse_attention",
    "zipvl_prefill_",
]
