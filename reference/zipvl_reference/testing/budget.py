"""When a float result is right, and when two results are the same bits."""

import torch
from torch import Tensor


def assert_within(name: str, got: Tensor, exact: Tensor, plain: Tensor, atom: float) -> None:
    """|got - exact| is at most twice |plain - exact| plus `atom`, each the maximum over the tensor.

    `exact` is the result in float64 on the very inputs that `got` came from, `plain` that of ordinary PyTorch operators
    in the dtype of the inputs. The atom keeps the bound from being 0 where the plain computation happens to be exact.
    """
    assert tuple(got.shape) == tuple(exact.shape), f"{name}: expected shape {list(exact.shape)}, got {list(got.shape)}"
    if not exact.numel():
        return
    got, exact, plain = got.double().cpu(), exact.cpu(), plain.double().cpu()
    assert bool(got.isfinite().all()), f"{name}: expected finite values, got {got.flatten().tolist()[:8]}"
    allowed = 2 * (plain - exact).abs().max().item() + atom
    error = (got - exact).abs()
    worst = int(error.argmax())
    assert error.max().item() <= allowed, (
        f"{name}: error {error.max().item():.3g} is over the budget of {allowed:.3g} at flat position {worst}: "
        f"expected {exact.flatten()[worst].item()!r}, got {got.flatten()[worst].item()!r}"
    )


def atom(q: Tensor, k: Tensor, scale: float, magnitude: float, dtype: torch.dtype) -> float:
    """What single roundings can change in a softmax average of values of at most `magnitude`.

    Rounding the largest score once to fp32 moves it by eps * |score|, with |score| <= scale * sum |q| |k|, and each
    weight relatively by twice that; exp, sum, division and product round once each; the result is rounded to `dtype`.
    """
    largest = (q.double().abs().amax((0, 1, 2)) * k.double().abs().amax((0, 1, 2))).sum()
    eps = torch.finfo(torch.float32).eps
    return float((2 * abs(scale) * largest.item() + 4) * eps + torch.finfo(dtype).eps / 2) * magnitude


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, NaN included."""
    a, b = a.contiguous(), b.contiguous()
    assert a.dtype == b.dtype, f"{name}: expected {a.dtype}, got {b.dtype}"
    assert a.shape == b.shape, f"{name}: expected shape {list(a.shape)}, got {list(b.shape)}"
    same = not a.numel() or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert same, f"{name}: expected the same bits, got {a.flatten().tolist()[:8]} and {b.flatten().tolist()[:8]}"
