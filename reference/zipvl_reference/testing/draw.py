"""What is drawn: shapes, strides, padding and values of attention inputs, from one small description each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

try:
    import hypothesis
    import hypothesis.strategies
except ImportError as error:  # pragma: no cover
    raise ImportError("zipvl_reference.testing needs hypothesis: pip install 'zipvl-kernels[test]'") from error

st = hypothesis.strategies


def for_each(
    cases: "st.SearchStrategy[Any]", test: Callable[[Any], None], *, max_examples: int, derandomize: bool
) -> None:
    """Run `test` on drawn cases and raise with the smallest failing one."""

    @hypothesis.settings(
        max_examples=max_examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def example(case: Any) -> None:
        test(case)

    example()


@dataclass(frozen=True)
class AttentionCase:
    """One drawn input. Equal cases give equal tensors; what is random in them comes from `seed`."""

    B: int
    Hkv: int
    group: int  # query heads of a KV head
    M: int
    N: int
    D: int
    layout: str  # "dense", "transposed" ([B, N, H, D] in memory) or "sliced" (rows of a wider buffer)
    values: str  # "normal", "equal" (all scores tie), "peaked" (softmax near one-hot)
    padding: str  # "none", "left", "right" or "both"
    pool: str
    seed: int

    @property
    def groups(self) -> int:
        """Selection groups."""
        return 1 if self.pool == "layer" else self.Hkv

    @cached_property
    def random(self) -> torch.Generator:
        """On the CPU, so that every device sees the same values."""
        return torch.Generator().manual_seed(self.seed)

    def tensor(self, heads: int, rows: int, device: str, dtype: torch.dtype) -> Tensor:
        """`[B, heads, rows, D]` in the case's layout and values."""
        factor = {"normal": 1.0, "equal": 0.0, "peaked": 12.0}[self.values]
        x = torch.randn(self.B, heads, rows, self.D, generator=self.random) * factor + (factor == 0)
        return self.lay(x.to(device, dtype))

    def lay(self, x: Tensor) -> Tensor:
        """A copy of `x` in the case's layout."""
        if self.layout == "transposed":
            return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        if self.layout == "sliced":
            return torch.cat([x, x, x[..., :1]], -1)[..., : self.D]
        return x.clone(memory_format=torch.contiguous_format)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 in `[low, high]`, on the CPU."""
        return torch.randint(low, max(high, low) + 1, shape, generator=self.random, dtype=torch.int32)

    @cached_property
    def bounds(self) -> tuple[list[int], list[int], list[int]]:
        """Per sequence: `leftpad_k`, `seqused_k` and `q_start`."""
        first, end, start = [0] * self.B, [self.N] * self.B, [self.N - self.M] * self.B
        if self.padding in ("left", "both"):
            first = self.integers(0, self.N, self.B).tolist()
        if self.padding in ("right", "both"):
            end = self.integers(0, self.N, self.B).tolist()
            start = self.integers(-1, self.N - self.M + 1, self.B).tolist()
        return first, end, start

    def lengths(self, device: str) -> dict[str, Tensor | None]:
        """The bounds as keyword arguments, None where the default says the same."""
        first, end, start = (torch.tensor(x, dtype=torch.int32, device=device) for x in self.bounds)
        if self.layout == "sliced":
            first, end, start = (strided(x) for x in (first, end, start))
        right = self.padding in ("right", "both")
        return {
            "leftpad_k": first if self.padding in ("left", "both") else None,
            "seqused_k": end if right else None,
            "q_start": start if right else None,
        }

    def poison(self, q: Tensor, *kv: Tensor) -> None:
        """NaN and inf where nothing may be read into a result: padding columns, and query rows that stand on them."""
        for b, (first, end, start) in enumerate(zip(*self.bounds, strict=True)):
            for x in kv:
                x[b, :, :first] = torch.nan
                x[b, :, end:] = torch.inf
            for row in range(self.M):
                if not first <= start + row < end:
                    q[b, :, row] = torch.nan


def attention_cases(
    head_dims: Sequence[int], max_tokens: int, *, max_rows: int | None = None
) -> "st.SearchStrategy[AttentionCase]":
    """Small inputs first, so that a failing example shrinks to few heads and tokens."""

    def finish(fields: dict[str, Any]) -> AttentionCase:
        fields["M"] = min(fields["M"], fields["N"])
        return AttentionCase(**fields)

    return st.fixed_dictionaries(
        {
            "B": st.integers(1, 3),
            "Hkv": st.integers(1, 3),
            "group": st.sampled_from([1, 2, 4, 7]),
            "M": st.integers(1, max_rows or max_tokens),
            "N": st.integers(1, max_tokens),
            "D": st.sampled_from(sorted(head_dims)),
            "layout": st.sampled_from(["dense", "transposed", "sliced"]),
            "values": st.sampled_from(["normal", "equal", "peaked"]),
            "padding": st.sampled_from(["none", "left", "right", "both"]),
            "pool": st.sampled_from(["layer", "kv_head"]),
            "seed": st.integers(0, 2**32 - 1),
        }
    ).map(finish)


def strided(x: Tensor) -> Tensor:
    """The values of `x [B]` with others between them."""
    return torch.stack([x, x - 7], 1)[:, 0]


def one_sequence(b: int, *tensors: Tensor | None) -> list[Any]:
    """Sequence `b` alone: each tensor cut to a batch of one, strides kept, in memory of its own.

    A kernel may be chosen by strides, and another kernel gives other bits; `clone` alone would make gaps disappear.
    """
    return [
        None
        if x is None
        else torch.empty_strided((1, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device).copy_(x[b : b + 1])
        for x in tensors
    ]
