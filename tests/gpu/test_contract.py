"""Every operator and backend against float64 and exact oracles, within the contract's budget."""

import pytest
import torch
import zipvl_reference.testing
from cases import DEVICE, EXAMPLES, PAIRS, REAL, function

DTYPES = [torch.bfloat16, torch.float16, torch.float32] if REAL else [torch.float32]
ALL_ALIKE = ("probe_rows", "select_tokens")  # take no tensors with a dtype and head dim of their own
ATTENDING = [pair for pair in PAIRS if pair[0] not in ALL_ALIKE]


def check_of(operator):
    return getattr(zipvl_reference.testing, f"check_{operator.removesuffix('_')}")


@pytest.mark.parametrize(("operator", "backend"), [pair for pair in PAIRS if pair[0] in ALL_ALIKE], ids=lambda x: x)
def test_contract_of_what_has_no_dtype(operator, backend):
    sizes = {} if operator == "probe_rows" else {"max_tokens": 40 if REAL else 12}
    check_of(operator)(function(operator, backend), device=DEVICE, derandomize=True, max_examples=EXAMPLES, **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("operator", "backend"), ATTENDING, ids=lambda x: x)
def test_contract(operator, backend, dtype):
    # Few head dims, for each is a kernel to compile.
    options = {"dtype": dtype, "head_dims": (64, 128) if REAL else (16,), "max_tokens": 300 if REAL else 24}
    check_of(operator)(function(operator, backend), device=DEVICE, derandomize=True, max_examples=EXAMPLES, **options)


@pytest.mark.parametrize("D", [80, 96, 256] if REAL else [24])
@pytest.mark.parametrize(("operator", "backend"), ATTENDING, ids=lambda x: x)
def test_other_head_dims(operator, backend, D):
    options = {"dtype": DTYPES[0], "head_dims": (D,), "max_tokens": 100 if REAL else 9}
    check_of(operator)(function(operator, backend), device=DEVICE, derandomize=True, max_examples=2, **options)
