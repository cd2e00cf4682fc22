"""Calls every operator once at each of a few small shapes, for compute-sanitizer to watch.

Run: python tests/gpu/sanitized.py OPERATOR...    where "packed" is prefills of packed sequences
"""

import sys

import torch
from cases import DEVICE, DTYPE, HEADS, D, chosen, function, inputs, results

SHAPES = ((150,), (300, 41), (1, 200, 129)) if DEVICE == "cuda" else ((9,), (12, 4))

BOUNDS = ((0, 150, 150, 151, 300), (7, -5, 2**31 - 1, 290, 300)) if DEVICE == "cuda" else ((0, 9, 9, 12),)


def packed():
    """With bounds as they should be, and with some that lead nowhere."""
    total, (Hq, Hkv) = max(BOUNDS[0]), HEADS
    for backend in chosen("zipvl_prefill_"):
        for bounds in BOUNDS:
            x = torch.randn(total, Hq + 2 * Hkv, D, device=DEVICE).to(DTYPE)
            where = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE), "max_seqlen": total}
            function("zipvl_prefill_", backend)(*x.split((Hq, Hkv, Hkv), 1), tau=0.8, **where)
        print("packed", backend, flush=True)


if __name__ == "__main__":
    for operator in sys.argv[1:]:
        if operator == "packed":
            packed()
            continue
        for backend in chosen(operator):
            for lengths in SHAPES:
                arguments, options = inputs(operator, lengths)
                results(operator, function(operator, backend), arguments, options)
                if operator == "select_tokens":
                    results(
                        operator, function(operator, backend), arguments, {**options, "tau": None, "keep_ratio": 0.4}
                    )
            print(operator, backend, flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
