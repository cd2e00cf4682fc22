"""Operators that make large vision-language models fast by keeping only the tokens that matter (ZipVL).

Importing this needs torch alone. `B` batch, `Hq` query heads, `Hkv` key/value heads (`Hq % Hkv == 0`; query head `h`
reads KV head `h // (Hq // Hkv)`), `M` query rows, `N` key columns, `D` head dim, `P` probe rows, `G` selection groups:
1 with `pool="layer"`, `Hkv` with `pool="kv_head"`.

Common to all operators:

- `q [B, Hq, M, D]` and `k, v [B, Hkv, N, D]` are fp16, bf16 or fp32; their last dim is contiguous, other strides are
  free. Arithmetic accumulates in fp32. No gradient flows.
- Query row `i` of sequence `b` stands at column `q_start[b] + i`; default `N - M` (bottom-right causal).
- Valid columns of sequence `b` are `[leftpad_k[b], seqused_k[b])`; default `[0, N)`. Padding is never attended, scored
  or kept. These three are int32 `[B]` on the device of `q`.
- Packed sequences, for `score_tokens`, `select_tokens`, `compact_kv_`, `sparse_attention` and `zipvl_prefill_`:
  `q [T, Hq, D]` and `k, v [T, Hkv, D]` with `cu_seqlens`, int32 `[B + 1]` on the device, and `max_seqlen`, no less than
  the longest length. Sequence `b` is rows `[cu_seqlens[b], cu_seqlens[b + 1])` of both, with no padding; scores and
  indices are `[G, T]`, and rows and columns count within the sequence. Bounds that are wrong never lead out of a
  tensor; with `ZIPVL_CHECK=1` in the environment they are checked on the host first.
- `scale` of the scores defaults to `D ** -0.5`.
- `backend` is "auto", "reference", "triton" or "cuda". An explicit one never falls back: it raises RuntimeError and
  says what is missing.
- Nothing is read on the host: every operator can be captured in a CUDA graph, and compiles with `fullgraph=True`.
- Results are the same bits from run to run, and for a sequence alone or in a batch.
- A bad argument raises ValueError or TypeError before anything is written, naming the argument, what was expected and
  what came. `B`, `M` or `N` of 0 returns empty results.
"""

from importlib.metadata import PackageNotFoundError, version

from zipvl_kernels._backends import backends
from zipvl_kernels.compact_kv import compact_kv_
from zipvl_kernels.compact_paged_kv import compact_paged_kv_
from zipvl_kernels.decode_attention import decode_attention
from zipvl_kernels.probe_rows import probe_rows
from zipvl_kernels.score_tokens import score_tokens
from zipvl_kernels.select_tokens import select_tokens
from zipvl_kernels.sparse_attention import sparse_attention
from zipvl_kernels.zipvl_prefill import zipvl_prefill_

try:
    __version__ = version("zipvl-kernels")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "backends",
    "compact_kv_",
    "compact_paged_kv_",
    "decode_attention",
    "probe_rows",
    "score_tokens",
    "select_tokens",
    "sparse_attention",
    "zipvl_prefill_",
]
