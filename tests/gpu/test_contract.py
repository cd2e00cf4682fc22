"""Every operator and backend against float64 and exact oracles, within the contract's budget."""

import pytest
import torch
import zipvl_reference.testing
from cases import DEVICE, EXAMPLES, REAL, every, function

DTYPES = [torch.bfloat16, torch.float16, torch.float32] if REAL else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every
def test_contract(operator, backend, dtype):
    if operator in ("select_tokens", "probe_rows") and dtype != DTYPES[0]:
        pytest.skip("takes no such tensors")
    check = getattr(zipvl_reference.testing, f"check_{operator.removesuffix('_')}")
    options = {"device": DEVICE, "derandomize": True, "max_examples": EXAMPLES}
    if operator == "select_tokens":
        options["max_tokens"] = 40 if REAL else 12
    elif operator != "probe_rows":  # few head dims, for each is a kernel to compile
        options |= {"dtype": dtype, "head_dims": (64, 128) if REAL else (16,), "max_tokens": 300 if REAL else 24}
    check(function(operator, backend), **options)


@pytest.mark.parametrize("D", [80, 96, 256] if REAL else [24])
@every
def test_other_head_dims(operator, backend, D):
    if operator in ("select_tokens", "probe_rows"):
        pytest.skip("has no head dim")
    check = getattr(zipvl_reference.testing, f"check_{operator.removesuffix('_')}")
    dtype = DTYPES[0]
    fn = function(operator, backend)
    check(
        fn, device=DEVICE, derandomize=True, max_examples=2, dtype=dtype, head_dims=(D,), max_tokens=100 if REAL else 9
    )
