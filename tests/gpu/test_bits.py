"""The same bits from run to run, alone as in a batch, and whatever uninitialised memory holds."""

import pytest
import torch
from cases import DEVICE, LENGTHS, REAL, every_on_tensors, function, inputs, results
from cases import one as alone
from zipvl_reference.testing.budget import assert_same_bits

RAGGED = (2880, 1500, 17) if REAL else (40, 23, 3)


@pytest.mark.parametrize("N", LENGTHS)
@every_on_tensors
def test_ten_reruns(operator, backend, N):
    fn, (arguments, options) = function(operator, backend), inputs(operator, [N], padded=False)
    first = results(operator, fn, arguments, options)
    for _ in range(10 if REAL else 1):
        for i, (a, b) in enumerate(zip(first, results(operator, fn, arguments, options), strict=True)):
            assert_same_bits(f"{operator}, result {i}, run again", a, b)


@every_on_tensors
def test_alone_as_in_a_batch(operator, backend):
    fn, (arguments, options) = function(operator, backend), inputs(operator, RAGGED)
    batch = results(operator, fn, arguments, options)
    for b in range(len(RAGGED)):
        for i, (many, single) in enumerate(
            zip(batch, results(operator, fn, *alone(b, arguments, options)), strict=True)
        ):
            assert_same_bits(f"{operator}, result {i}, sequence {b} alone", many[b : b + 1], single)


@pytest.mark.parametrize("lengths", [RAGGED, RAGGED[:1]], ids=["ragged", "one"])
@every_on_tensors
def test_poisoned_memory(operator, backend, lengths, monkeypatch):
    """What `empty` returns is filled with NaN, or with large numbers, while an operator runs."""
    fn, (arguments, options) = function(operator, backend), inputs(operator, lengths)
    wanted = results(operator, fn, arguments, options)
    filled = []

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            filled.append(x.numel())
            return x.fill_(torch.nan if x.dtype.is_floating_point else 0x7F7F7F7F % (torch.iinfo(x.dtype).max + 1))

        return empty

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        got = results(operator, fn, arguments, options)
    assert filled or operator == "compact_kv_", "nothing was allocated by torch.empty: what is poisoned here?"
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert_same_bits(f"{operator}, result {i}, in poisoned memory", a, b)
    assert arguments[0].device.type == DEVICE
