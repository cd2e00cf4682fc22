"""Calls every operator once at each of a few small shapes, for compute-sanitizer to watch.

Run: python tests/gpu/sanitized.py OPERATOR...    where "packed" is prefills of packed sequences
"""

import sys

import torch
from cases import DEVICE, DTYPE, HEADS, D, chosen, function, inputs, results

SHAPES = ((150,), (300, 41), (1, 200, 129)) if DEVICE == "cuda" else ((9,), (12, 4))

BOUNDS = ((0, 150, 150, 151, 300), (7, -5, 2**31 - 1, 290, 300)) if DEVICE == "cuda" else ((0, 9, 9, 12),)


def packed():
    """With bounds as they should be, and with some that lead nowhere; attention among sets of any numbers, too."""
    total, (Hq, Hkv) = max(BOUNDS[0]), HEADS
    for backend in chosen("zipvl_prefill_"):
        for bounds in BOUNDS:
            q, k, v = torch.randn(total, Hq + 2 * Hkv, D, device=DEVICE).to(DTYPE).split((Hq, Hkv, Hkv), 1)
            where = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE), "max_seqlen": total}
            function("zipvl_prefill_", backend)(q, k, v, tau=0.8, **where)
            sets = torch.randint(-(2**31), 2**31, (1, total), device=DEVICE).int()
            sets[:, ::5] = torch.arange(total, device=DEVICE)[::5] % 4
            counts = torch.full((len(bounds) - 1, 1), total, dtype=torch.int32, device=DEVICE)
            attend = function("sparse_attention", backend)
            attend(q, k, v, sets, counts, kv_compacted=backend == "auto", **where)  # which CUDA C has alone
        print("packed", backend, flush=True)


def compact_pages(fn):
    """Three layers of two sequences in pages, and one layer alone; tables and sets also with wrong numbers."""
    for wrong in (0, 7):
        pools = [[torch.randn(20, 16, 2, 64, device=DEVICE).bfloat16() for _ in range(3)] for _ in range(2)]
        sets = [torch.arange(wrong, 140 + wrong, device=DEVICE, dtype=torch.int32).expand(2, 1, 140) for _ in range(3)]
        counts = [torch.full((2, 1), 130 - 40 * i, device=DEVICE, dtype=torch.int32) for i in range(3)]
        table = torch.randperm(20, device=DEVICE)[:18].int().view(2, 9) + wrong
        used = torch.tensor([140, 99 + 99 * wrong], device=DEVICE, dtype=torch.int32)
        fn(*pools, sets, counts, table, used)
        fn(pools[0][0], pools[1][0], sets[0], counts[0], table, used)


def over_pages(operator, fn):
    """The operator over pages, of a sequence that is right and one whose table, length and set lead nowhere."""
    q = torch.randn(2, HEADS[0], 40, D, device=DEVICE).to(DTYPE)
    k, v = torch.randn(2, 9, 16, HEADS[1], D, device=DEVICE).to(DTYPE).unbind()
    for number in (0, -1, 2**31 - 1, -(2**31)):
        table = torch.tensor([[number] * 4, [3, 1, 4, 8]], dtype=torch.int32, device=DEVICE)
        pages = {"seqused_k": torch.tensor([number, 57], dtype=torch.int32, device=DEVICE), "block_table": table}
        if operator == "score_tokens":
            fn(q, k, torch.tensor([0, 21, 39], dtype=torch.int32, device=DEVICE), **pages)
            continue
        indices = torch.arange(64, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
        indices[0, 0, 5:9] = number
        counts = torch.tensor([[max(number, 60)], [50]], dtype=torch.int32, device=DEVICE)
        for kv_compacted in (False, True):
            fn(q, k, v, indices, counts, kv_compacted=kv_compacted, **pages)


if __name__ == "__main__":
    for operator in sys.argv[1:]:
        if operator == "packed":
            packed()
            continue
        for backend in chosen(operator):
            if operator == "compact_paged_kv_":
                compact_pages(function(operator, backend))
                print(operator, backend, flush=True)
                continue
            for lengths in SHAPES:
                arguments, options = inputs(operator, lengths)
                results(operator, function(operator, backend), arguments, options)
                if operator == "compact_kv_":
                    lists = [[x.clone() for _ in range(3)] for x in arguments]
                    function(operator, backend)(*lists, **options)
                if operator == "select_tokens":
                    results(
                        operator, function(operator, backend), arguments, {**options, "tau": None, "keep_ratio": 0.4}
                    )
            if operator in ("score_tokens", "sparse_attention"):
                over_pages(operator, function(operator, backend))
            print(operator, backend, flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
