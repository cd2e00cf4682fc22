"""What is timed: each operator on shapes of real models, a check on those very inputs, and what it is compared with.

A batch of one unless the operator decodes, bf16, causal, random inputs as a model hands them over: views of
`[B, N, H, D]`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
import zipvl_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import zipvl_kernels as zk
from zipvl_adapters.cli.exact import assert_within, attended, check_attention, check_choice, rounding_of, scores
from zipvl_adapters.cli.timing import Call, sets_of

DEVICE, DTYPE = "cuda", torch.bfloat16
KEEP_RATIO = 0.367  # what ZipVL keeps of LLaVA-NeXT-13B's tokens at tau = 0.975
TAU = 0.975
CUDNN, RECIPE, FLASH = "cuDNN dense", "recipe in torch", "flash-attn-4"

Fn = Callable[..., Any]  # of an operator's signature, less `backend`


@dataclass(frozen=True)
class Geometry:
    """The heads of a model's attention, and the lengths that it is measured at."""

    name: str
    Hq: int
    Hkv: int
    lengths: tuple[int, ...] = (2880, 8192, 32768)
    D: int = 128

    @property
    def heads(self) -> str:
        """Query and key/value heads, as the tables name them."""
        return f"{self.Hq}/{self.Hkv}"


GEOMETRIES = (
    Geometry("LLaVA-NeXT-13B", 40, 40),
    Geometry("Qwen2-VL-7B", 28, 4, (2880, 8192, 32768, 131072)),
    Geometry("InternVL2-8B", 32, 8),
)


@dataclass
class Problem:
    """One operator on one shape, with everything that is needed to check and time an implementation of it."""

    operator: str
    geometry: Geometry
    shape: dict[str, int]
    sets: int  # of inputs, used in turn
    call: Callable[[Fn], Call]  # how an implementation is called
    check: Callable[[Fn], None]  # raises AssertionError
    dense: str | None = None  # the baseline that "x dense" is taken from
    baselines: dict[str, Call] = field(default_factory=dict)
    restore: Callable[[], object] | None = None
    cold: bool = True  # its inputs come from memory, not from L2
    num_bytes: int | None = None  # that have to be read and written
    flops: int | None = None


def score_problem(geometry: Geometry, N: int) -> Problem:
    """The probes' scores of all tokens; the bytes are those of reading K once."""
    sets = sets_of(2 * N * geometry.D * (geometry.Hq + geometry.Hkv))
    inputs: list[tuple[Any, ...]] = [
        (draw(1, geometry.Hq, N, geometry.D), draw(1, geometry.Hkv, N, geometry.D)) for _ in range(sets)
    ]
    rows = zk.probe_rows(N, device=DEVICE)

    def check(fn: Fn) -> None:
        q, k = inputs[0]
        got = fn(q, k, rows)
        exact, plain = (scores(q, k, rows, t) for t in (torch.float64, DTYPE))
        for name, g, e, p in zip(("accumulated", "normalized"), got, exact, plain, strict=True):
            assert_within(name, g, e, p, rounding_of(q, k) * float(e.max()), torch.float32)

    return Problem(
        "score_tokens",
        geometry,
        {"B": 1, "Hq": geometry.Hq, "Hkv": geometry.Hkv, "N": N, "D": geometry.D, "P": len(rows)},
        sets,
        lambda fn: lambda i: fn(*inputs[i], rows),
        check,
        baselines={RECIPE: lambda i: _recipe_scores(rows, *inputs[i])},
        num_bytes=2 * geometry.Hkv * N * geometry.D + 2 * geometry.Hq * len(rows) * geometry.D + 8 * N,
        flops=2 * 2 * geometry.Hq * len(rows) * N * geometry.D,
    )


def select_problem(geometry: Geometry, N: int) -> Problem:
    """Selection by tau. The scores stay in L2, where the operator before has just left them."""
    sets = sets_of(8 * N)
    accumulated = [torch.randn(1, 1, N, device=DEVICE).mul(2).exp() for _ in range(sets)]
    inputs: list[tuple[Any, ...]] = [(a, a / torch.arange(N, 0, -1, device=DEVICE)) for a in accumulated]
    p = ceil(KEEP_RATIO * N)

    def check(fn: Fn) -> None:
        for tau, keep_ratio in ((TAU, None), (None, KEEP_RATIO)):
            got = fn(*inputs[0], tau=tau, keep_ratio=keep_ratio)
            wanted = zipvl_reference.select_tokens(*inputs[0], tau=tau, keep_ratio=keep_ratio)
            for name, g, w in zip(("indices", "counts"), got, wanted, strict=True):
                assert torch.equal(g, w), f"{name}: expected those of the reference"

    def recipe(i: int) -> object:
        sums = inputs[i][0].sort(-1, descending=True).values.cumsum(-1)
        return (sums < TAU * sums[..., -1:]).sum(), inputs[i][1].topk(p).indices.sort(-1).values

    return Problem(
        "select_tokens",
        geometry,
        {"B": 1, "G": 1, "N": N},
        sets,
        lambda fn: lambda i: fn(*inputs[i], tau=TAU),
        check,
        baselines={RECIPE: recipe},
        restore=lambda: [x.mul_(1) for pair in inputs for x in pair],
        cold=False,
    )


def compact_problem(geometry: Geometry, N: int) -> Problem:
    """Moving the kept rows to the front. Run again it moves as many, for it goes by the indices alone."""
    p = ceil(KEEP_RATIO * N)
    sets = sets_of(4 * N * geometry.D * geometry.Hkv)
    inputs: list[tuple[Any, ...]] = [
        (*(draw(1, geometry.Hkv, N, geometry.D) for _ in range(2)), *random_set(N, p)) for _ in range(sets)
    ]
    kept = [indices[0, 0, :p].long() for *_, indices, _ in inputs]

    def check(fn: Fn) -> None:
        k, v, indices, counts = (x.clone() for x in inputs[0])
        fn(k, v, indices, counts)
        for name, now, old in (("k", k, inputs[0][0]), ("v", v, inputs[0][1])):
            assert torch.equal(now[:, :, :p], old[:, :, kept[0]]), f"{name}: expected the rows of the set in order"

    return Problem(
        "compact_kv_",
        geometry,
        {"B": 1, "Hkv": geometry.Hkv, "N": N, "D": geometry.D, "kept": p},
        sets,
        lambda fn: lambda i: fn(*inputs[i]),
        check,
        baselines={RECIPE: lambda i: [x.index_select(2, kept[i]) for x in inputs[i][:2]]},
        num_bytes=2 * 2 * 2 * geometry.Hkv * p * geometry.D + 4 * p,
    )


def sparse_problem(geometry: Geometry, N: int) -> Problem:
    """Attention of the kept tokens over compacted keys; dense: as many tokens, and nothing to gather or scatter."""
    Hq, Hkv, D, p = geometry.Hq, geometry.Hkv, geometry.D, ceil(KEEP_RATIO * N)
    sets = sets_of(2 * D * (2 * N * Hq + 2 * p * Hkv))
    inputs: list[tuple[Any, ...]] = [
        (draw(1, Hq, N, D), *(draw(1, Hkv, N, D)[:, :, :p] for _ in range(2)), *random_set(N, p)) for _ in range(sets)
    ]
    dense: list[tuple[Any, ...]] = [
        (q[:, :, ix[0, 0, :p].long()].contiguous(), k.contiguous(), v.contiguous()) for q, k, v, ix, _ in inputs
    ]

    def check(fn: Fn) -> None:
        q, k, v, indices, counts = inputs[0]
        check_attention(fn(q, k, v, indices, counts, kv_compacted=True), q, k, v, indices[0, 0, :p].long())

    return Problem(
        "sparse_attention",
        geometry,
        {"B": 1, "Hq": Hq, "Hkv": Hkv, "M": N, "N": N, "D": D, "kept": p},
        sets,
        lambda fn: lambda i: fn(*inputs[i], kv_compacted=True),
        check,
        CUDNN,
        {CUDNN: lambda i: cudnn(*dense[i]), **_flash(dense)},
        flops=attention_flops(Hq, p, D),
    )


def decode_problem(geometry: Geometry, N: int, B: int = 1) -> Problem:
    """One new row over a cache of `N` used rows; dense is cuDNN's."""
    Hq, Hkv, D = geometry.Hq, geometry.Hkv, geometry.D
    sets = sets_of(4 * B * N * D * Hkv)
    inputs: list[tuple[Any, ...]] = [(draw(B, Hq, 1, D), *(draw(B, Hkv, N, D) for _ in range(2))) for _ in range(sets)]
    used = torch.full((B,), N, dtype=torch.int32, device=DEVICE)

    def check(fn: Fn) -> None:
        q, k, v = inputs[0]
        out = fn(q, k, v, used)
        last = torch.tensor([N - 1], device=DEVICE)
        for b in range(B):
            exact, plain = (attended(q[b], k[b], v[b], last, t) for t in (torch.float64, DTYPE))
            assert_within("out", out[b], exact, plain, rounding_of(q, k) * float(v.abs().max()), DTYPE)

    return Problem(
        "decode_attention",
        geometry,
        {"B": B, "Hq": Hq, "Hkv": Hkv, "M": 1, "N": N, "D": D},
        sets,
        lambda fn: lambda i: fn(*inputs[i], used),
        check,
        CUDNN,
        {CUDNN: lambda i: cudnn(*inputs[i], causal=False)},
        num_bytes=4 * B * Hkv * N * D + 4 * B * Hq * D,
    )


def prefill_problem(geometry: Geometry, N: int, keep_ratio: float = KEEP_RATIO) -> Problem:
    """The whole prefill of a layer against dense attention over everything."""
    Hq, Hkv, D, p = geometry.Hq, geometry.Hkv, geometry.D, ceil(keep_ratio * N)
    sets = sets_of(2 * D * N * (2 * Hq + 2 * Hkv))
    clean = [draw(1, Hkv, N, D) for _ in range(2)]
    inputs: list[tuple[Any, ...]] = [(draw(1, Hq, N, D), *(torch.clone(x) for x in clean)) for _ in range(sets)]
    rows = zk.probe_rows(N, device=DEVICE)

    def restore() -> None:  # what is timed compacts k and v, and compacted tokens would be selected otherwise
        for _, *kv in inputs:
            for x, old in zip(kv, clean, strict=True):
                x.copy_(old)

    def check(fn: Fn) -> None:
        restore()
        q, k, v = inputs[0]
        out, indices, counts = fn(q, k, v, keep_ratio=keep_ratio)
        kept = indices[0, 0, :p].long()
        assert counts.tolist() == [[p]], f"counts: expected {p}, got {counts.tolist()}"
        assert bool((indices[0, 0, p:] == -1).all()), "indices: expected -1 behind the set"
        assert bool((kept.diff() > 0).all() & (kept >= 0).all()), "indices: expected ascending columns"
        check_choice(scores(q, clean[0], rows, torch.float64)[1], scores(q, clean[0], rows, DTYPE)[1], kept)
        for name, now, old in (("k", k, clean[0]), ("v", v, clean[1])):
            assert torch.equal(now[:, :, :p], old[:, :, kept]), f"{name}: expected the rows of the set in order"
        check_attention(out, q, k[:, :, :p], v[:, :, :p], kept)

    return Problem(
        "zipvl_prefill_",
        geometry,
        {"B": 1, "Hq": Hq, "Hkv": Hkv, "M": N, "N": N, "D": D, "kept": p, "P": len(rows)},
        sets,
        lambda fn: lambda i: fn(*inputs[i], keep_ratio=keep_ratio),
        check,
        CUDNN,
        {
            CUDNN: lambda i: cudnn(*inputs[i]),
            RECIPE: lambda i: recipe(rows, p, *inputs[i]),
            **_flash(inputs),
        },
        restore,
        flops=attention_flops(Hq, p, D) + 2 * 2 * Hq * len(rows) * N * D,
    )


PROBLEMS: dict[str, Callable[[Geometry, int], list[Problem]]] = {
    "zipvl_prefill_": lambda geometry, N: [prefill_problem(geometry, N)],
    "score_tokens": lambda geometry, N: [score_problem(geometry, N)],
    "select_tokens": lambda geometry, N: [select_problem(geometry, N)],
    "compact_kv_": lambda geometry, N: [compact_problem(geometry, N)],
    "sparse_attention": lambda geometry, N: [sparse_problem(geometry, N)],
    "decode_attention": lambda geometry, N: [decode_problem(geometry, N, B) for B in (1, 8)],
}


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """cuDNN's attention through torch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def recipe(rows: Tensor, p: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ZipVL's prefill as torch's operators offer it, with `p` tokens kept: output, kept keys, kept values."""
    accumulated, normalized = _recipe_scores(rows, q, k)
    sums = accumulated.sort(-1, descending=True).values.cumsum(-1)
    (sums < TAU * sums[-1:]).sum()  # the count, if it were not forced
    normalized[-1:] = torch.inf
    kept = normalized.topk(p, -1).indices.sort(-1).values
    Q, K, V = (x.index_select(2, kept) for x in (q, k, v))
    out = F.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return torch.zeros_like(q).index_copy_(2, kept, out), K, V


def _recipe_scores(rows: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores `[N]` by way of a P x N matrix a head."""
    (Hkv, N), P = k.shape[1:3], len(rows)
    hidden = torch.arange(N, device=q.device) > rows[:, None]  # [P, N]
    grouped = q.index_select(2, rows).view(1, Hkv, -1, q.shape[3])  # [1, Hkv, heads of a group * P, D]
    weights = (grouped @ k.mT * q.shape[3] ** -0.5).view(-1, P, N).masked_fill_(hidden, -torch.inf)
    accumulated = weights.softmax(-1, dtype=torch.float32).sum((0, 1))
    return accumulated, accumulated / (q.shape[1] * (~hidden).sum(0))


def _flash(inputs: list[tuple[Any, ...]]) -> dict[str, Call]:
    """flash-attn-4, where it is installed, on the first three tensors of each input set."""
    try:
        from flash_attn.cute import flash_attn_func
    except Exception:  # not installed, or built for another torch
        return {}
    return {FLASH: lambda i: flash_attn_func(*(x.transpose(1, 2) for x in inputs[i][:3]), causal=True)}


def draw(B: int, heads: int, rows: int, D: int) -> Tensor:
    """Random `[B, heads, rows, D]`, in memory as a model's projection leaves it: heads side by side."""
    return torch.randn(B, rows, heads, D, dtype=DTYPE, device=DEVICE).transpose(1, 2)


def random_set(N: int, p: int) -> tuple[Tensor, Tensor]:
    """`indices [1, 1, N]` and `counts [1, 1]` of `p` random tokens."""
    indices = torch.full((1, 1, N), -1, dtype=torch.int32, device=DEVICE)
    indices[0, 0, :p] = torch.randperm(N, device=DEVICE)[:p].sort().values
    return indices, torch.tensor([[p]], dtype=torch.int32, device=DEVICE)


def attention_flops(Hq: int, n: int, D: int) -> int:
    """Of causal attention among `n` tokens: two products over the lower triangle."""
    return 4 * D * Hq * n * (n + 1) // 2
