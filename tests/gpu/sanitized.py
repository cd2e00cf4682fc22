"""Calls every operator once at each of a few small shapes, for compute-sanitizer to watch.

Run: python tests/gpu/sanitized.py OPERATOR...
"""

import sys

import torch
from cases import DEVICE, chosen, function, inputs, results

SHAPES = ((150,), (300, 41), (1, 200, 129)) if DEVICE == "cuda" else ((9,), (12, 4))

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
            print(operator, backend, flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
