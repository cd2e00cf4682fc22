"""What the Triton launchers share."""

import os


def interpreting() -> bool:
    """Kernels run on the CPU. Arithmetic in bf16 is wrong there, so they upcast first."""
    return os.environ.get("TRITON_INTERPRET") == "1"
