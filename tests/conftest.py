"""Makes test helpers and examples importable, wherever the tests are run from; without a GPU, Triton interprets."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]

# Fixtures of several files.
from cuda_by_cpu import compiled, on_cpu  # noqa: E402, F401
from cuda_over_nothing import cuda  # noqa: E402, F401
