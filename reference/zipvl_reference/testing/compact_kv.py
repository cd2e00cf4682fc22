"""Checks of `compact_kv_`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zipvl_reference.testing.budget import assert_same_bits
from zipvl_reference.testing.draw import AttentionCase, attention_cases, for_each, strided
from zipvl_reference.testing.sparse_attention import as_indices, draw_set


def check_compact_kv(
    fn: Callable[..., None],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """Every bit pattern, NaN included, arrives where it should; rows before `dst_start` stay as they are."""

    def test(case: AttentionCase) -> None:
        k, v = (case.lay(_bits(case, case.B, case.N, dtype, device)) for _ in range(2))
        member = draw_set(case)
        indices, counts = as_indices(member, device)
        starts = [0] * case.B
        if case.seed % 2:  # anywhere up to the first source, which differs per sequence
            firsts = [int(m.nonzero().min()) if m.any() else 0 for m in member.any(1)]
            starts = [int(case.integers(0, first, 1)) for first in firsts]
        before = k.clone(), v.clone()
        at = strided(torch.tensor(starts, dtype=torch.int32, device=device))
        fn(k, v, indices, counts, **({"dst_start": at} if case.seed % 2 else {}))
        for name, now, old in (("k", k, before[0]), ("v", v, before[1])):
            for b, start in enumerate(starts):
                for h in range(case.Hkv):
                    kept = old[b, h, member[b, h % case.groups].to(device)]
                    assert_same_bits(f"{name}[{b}, {h}], the set", kept, now[b, h, start : start + kept.shape[0]])
                    assert_same_bits(f"{name}[{b}, {h}], before dst_start", old[b, h, :start], now[b, h, :start])

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_packed_compact_kv(
    fn: Callable[..., None],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
) -> None:
    """`compact_kv_` over packed sequences: as `check_compact_kv`, and nothing but rows of sequences is written."""

    def test(case: AttentionCase) -> None:
        lengths = case.integers(0, case.N, case.B).long()
        ends = lengths.cumsum(0)
        T = int(ends[-1]) + case.seed % 3  # rows of no sequence, now and then
        starts = (ends - lengths).tolist()
        # Of memory [T, Hkv, D], [Hkv, T, D], or of wider rows.
        k, v = (case.lay(_bits(case, 1, T, dtype, device))[0].transpose(0, 1) for _ in range(2))
        share = (0, 0.2, 0.5, 0.8, 1.1)[case.seed % 5]
        member = torch.rand(case.B, case.groups, case.N, generator=case.random) < share
        member &= torch.arange(case.N) < lengths[:, None, None]
        counts = member.sum(-1, dtype=torch.int32).to(device)
        indices = torch.full((case.groups, T), -1, dtype=torch.int32, device=device)
        for b, g in torch.cartesian_prod(torch.arange(case.B), torch.arange(case.groups)).tolist():
            columns = member[b, g].nonzero().flatten().int().to(device)
            indices[g, starts[b] : starts[b] + len(columns)] = columns
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int().to(device)
        max_seqlen = int(lengths.max()) if case.seed % 2 else case.N + 1000
        before, rest = (k.clone(), v.clone()), torch.ones(T, dtype=torch.bool)
        fn(k, v, indices, counts, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        for b, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
            rest[start:end] = False
            for h in range(case.Hkv):
                columns = member[b, h % case.groups].nonzero().flatten().to(device)
                for name, now, old in (("k", k, before[0]), ("v", v, before[1])):
                    kept = old[start + columns, h]
                    assert_same_bits(f"{name}, head {h}, sequence {b}, the set", kept, now[start:, h][: len(kept)])
        for name, now, old in (("k", k, before[0]), ("v", v, before[1])):
            assert_same_bits(f"{name}, rows of no sequence", old[rest.to(device)], now[rest.to(device)])

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def check_compact_kv_of_layers(
    fn: Callable[..., None],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_examples: int = 50,
    derandomize: bool = False,
    head_dims: Sequence[int] = (4, 16, 64),
    max_tokens: int = 48,
    layers: Sequence[int] = (1, 2, 5),
) -> None:
    """`compact_kv_` over lists of layers, each with a set of its own, their number one of `layers`."""

    def test(case: AttentionCase) -> None:
        L = layers[case.seed % len(layers)]
        k, v = ([case.lay(_bits(case, case.B, case.N, dtype, device)) for _ in range(L)] for _ in range(2))
        members = [draw_set(case) for _ in range(L)]
        indices, counts = (list(x) for x in zip(*(as_indices(member, device) for member in members), strict=True))
        before = [[x.clone() for x in buffers] for buffers in (k, v)]
        fn(k, v, indices, counts)
        for name, now, old in (("k", k, before[0]), ("v", v, before[1])):
            for layer, member in enumerate(members):
                for b in range(case.B):
                    for h in range(case.Hkv):
                        kept = old[layer][b, h, member[b, h % case.groups].to(device)]
                        got = now[layer][b, h, : kept.shape[0]]
                        assert_same_bits(f"{name}[{layer}][{b}, {h}], the set", kept, got)

    for_each(attention_cases(head_dims, max_tokens), test, max_examples=max_examples, derandomize=derandomize)


def _bits(case: AttentionCase, B: int, N: int, dtype: torch.dtype, device: str) -> Tensor:
    """`[B, Hkv, N, D]` of any bit patterns."""
    shape = (B, case.Hkv, N, torch.finfo(dtype).bits // 8 * case.D)
    return torch.randint(256, shape, generator=case.random, dtype=torch.uint8).view(dtype).to(device)
