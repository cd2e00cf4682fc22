"""When a result that is timed is right: against float64 on the very inputs, within the contract's budget."""

import torch
from torch import Tensor

SAMPLED_ROWS = 128  # whose attention is compared with float64


def scores(q: Tensor, k: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both scores `[1, 1, N]` by the definition in `dtype`, a KV head at a time."""
    (Hkv, N), group = k.shape[1:3], q.shape[1] // k.shape[1]
    hidden = torch.arange(N, device=q.device) > rows[:, None]
    accumulated = torch.zeros(N, dtype=torch.promote_types(dtype, torch.float32), device=q.device)
    for h in range(Hkv):
        Q = q[0, h * group : (h + 1) * group].index_select(1, rows).to(dtype)
        weights = (Q @ k[0, h].to(dtype).mT * q.shape[3] ** -0.5).masked_fill_(hidden, -torch.inf).softmax(-1)
        accumulated += weights.sum((0, 1))
    return accumulated.view(1, 1, N), (accumulated / (q.shape[1] * (~hidden).sum(0))).view(1, 1, N)


def attended(q: Tensor, k: Tensor, v: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `q [Hq, S, D]` that stand at `at [S]`, over `k, v [Hkv, n, D]`, in `dtype`, a KV head at a time."""
    group, later = q.shape[0] // k.shape[0], torch.arange(k.shape[1], device=q.device) > at[:, None]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for h in range(k.shape[0]):
        Q, K, V = q[h * group : (h + 1) * group].to(dtype), k[h].to(dtype), v[h].to(dtype)
        weights = (Q @ K.mT * q.shape[2] ** -0.5).masked_fill_(later, -torch.inf).softmax(-1)
        out[h * group : (h + 1) * group] = weights @ V
    return out


def check_attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> None:
    """Some rows of every head against float64, the first and the last among them; zeros in all that are not kept."""
    p = len(kept)
    at = torch.randperm(p, device=q.device)[:SAMPLED_ROWS]
    at[0], at[-1] = 0, p - 1
    exact, plain = (attended(q[0, :, kept[at]], k[0], v[0], at, t) for t in (torch.float64, q.dtype))
    assert_within("out", out[0, :, kept[at]], exact, plain, rounding_of(q, k) * float(v.abs().max()), q.dtype)
    dropped = torch.ones(q.shape[2], dtype=torch.bool, device=q.device)
    dropped[kept] = False
    assert bool((out[0, :, dropped] == 0).all()), "out: expected exactly 0 in rows that are not kept"
    assert bool(out.isfinite().all()), "out: expected finite values"


def check_choice(exact: Tensor, plain: Tensor, kept: Tensor) -> None:
    """No dropped token has a better normalised score than a kept one, but for what rounding may change."""
    exact, plain = exact.flatten(), plain.flatten()
    slack = 2 * float((plain.double() - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.max())
    dropped = torch.ones(len(exact), dtype=torch.bool, device=exact.device)
    dropped[kept] = False
    assert int(kept[-1]) == len(exact) - 1, "indices: expected the last token among the kept"
    if bool(dropped.any()) and len(kept) > 1:
        least, best = float(exact[kept[:-1]].min()), float(exact[dropped].max())
        assert least >= best - 2 * slack, f"indices: a token of {least:.6g} kept before one of {best:.6g}"


def rounding_of(q: Tensor, k: Tensor) -> float:
    """What roundings to fp32 can change in a softmax average, relatively: see `zipvl_reference.testing.budget.atom`."""
    largest = q.abs().amax((0, 1, 2)).double() @ k.abs().amax((0, 1, 2)).double() * q.shape[3] ** -0.5
    return float(2 * largest + 4) * torch.finfo(torch.float32).eps


def assert_within(name: str, got: Tensor, exact: Tensor, plain: Tensor, rounding: float, dtype: torch.dtype) -> None:
    """At most twice the error of the plain computation, plus what a rounding can change, as the contract has it.

    Each row has a budget of its own: the first ones are large, and would hide that the last are wrong.
    """
    assert got.shape == exact.shape, f"{name}: expected shape {list(exact.shape)}, got {list(got.shape)}"
    assert bool(got.isfinite().all()), f"{name}: expected finite values"
    largest, usual, error = (x.double().abs().amax(-1) for x in (exact, plain.double() - exact, got.double() - exact))
    allowed = 2 * usual + rounding + torch.finfo(dtype).eps / 2 * largest
    worst = int((error - allowed).argmax())
    error, allowed = error.flatten()[worst], allowed.flatten()[worst]
    assert bool(error <= allowed), f"{name}: error {float(error):.3g} is over the budget of {float(allowed):.3g}"
