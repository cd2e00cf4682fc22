"""Checks of `compact_kv_`."""

from collections.abc import Callable, Sequence

import torch

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
        size = torch.finfo(dtype).bits // 8 * case.D
        shape = (case.B, case.Hkv, case.N, size)
        k, v = (
            case.lay(torch.randint(256, shape, generator=case.random, dtype=torch.uint8).view(dtype).to(device))
            for _ in range(2)
        )
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
