"""Calls every operator once at each of a few small shapes, for compute-sanitizer to watch.

Run: python tests/gpu/sanitized.py OPERATOR...
"""

import sys

import torch
from cases import DEVICE, DTYPE, HEADS, D, chosen, function, inputs, results

SHAPES = ((150,), (300, 41), (1, 200, 129)) if DEVICE == "cuda" else ((9,), (12, 4))


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
        for backend in chosen(operator):
            for lengths in SHAPES:
                arguments, options = inputs(operator, lengths)
                results(operator, function(operator, backend), arguments, options)
                if operator == "select_tokens":
                    results(
                        operator, function(operator, backend), arguments, {**options, "tau": None, "keep_ratio": 0.4}
                    )
            if operator in ("score_tokens", "sparse_attention"):
                over_pages(operator, function(operator, backend))
            print(operator, backend, flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
