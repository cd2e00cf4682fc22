"""What the benchmarks share: the device, realistic shapes, inputs, and a timer that waits for the GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
KEEP_RATIO = 0.367  # what ZipVL keeps of LLaVA-NeXT-13B's tokens at tau = 0.975


@dataclass(frozen=True)
class Geometry:
    """The attention of one layer for a batch of one."""

    name: str
    Hq: int
    Hkv: int
    D: int
    N: int

    def qkv(self, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Random `q, k, v` as a model hands them over: views of `[B, N, H, D]`. `rows` query rows, default all."""
        random = torch.Generator(DEVICE).manual_seed(0)

        def draw(heads: int, length: int) -> Tensor:
            x = torch.randn(1, length, heads, self.D, generator=random, device=DEVICE)
            return x.to(DTYPE).transpose(1, 2)

        return draw(self.Hq, rows or self.N), draw(self.Hkv, self.N), draw(self.Hkv, self.N)


GPU = [
    Geometry("LLaVA-NeXT-13B", 40, 40, 128, 2880),
    Geometry("Qwen2-VL-7B", 28, 4, 128, 8192),
    Geometry("InternVL2-8B", 32, 8, 128, 8192),
]
CPU = [Geometry("small", 8, 2, 64, 768), Geometry("small", 8, 2, 64, 2880)]
geometries = pytest.mark.parametrize(
    "geometry", GPU if DEVICE == "cuda" else CPU, ids=lambda g: f"{g.name}-{g.Hq}q{g.Hkv}kv-{g.N}"
)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The baseline: causal attention over everything, by whichever SDPA kernel torch picks."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(benchmark: Any, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Time `fn`; on a GPU each round waits for the device."""
    call = partial(fn, *args, **options)

    def finished() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=10, warmup_rounds=2)


def random_set(N: int, share: float = KEEP_RATIO) -> tuple[Tensor, Tensor]:
    """`indices [1, 1, N]` and `counts [1, 1]` of a random set of tokens that ends with the last."""
    kept = torch.randperm(N - 1, generator=torch.Generator().manual_seed(0))[: round(share * N) - 1]
    chosen = torch.cat([kept.sort().values, torch.tensor([N - 1])])
    indices = torch.full((1, 1, N), -1, dtype=torch.int32)
    indices[0, 0, : len(chosen)] = chosen
    return indices.to(DEVICE), torch.tensor([[len(chosen)]], dtype=torch.int32, device=DEVICE)
