"""What the Triton launchers share."""

import os

from torch import Tensor


def interpreting() -> bool:
    """Kernels run on the CPU. Arithmetic in bf16 is wrong there, so they upcast first."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dense(x: Tensor | None) -> Tensor | None:
    """`x` with stride 1, as kernels read what there is one of a sequence; a copy where it has another stride."""
    return None if x is None else x.contiguous()
