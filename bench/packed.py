"""`zipvl_prefill_` of packed sequences against the dense batch: `python bench/packed.py`. Needs a GPU.

Sequences of one length are equal work in both forms, which then have to give the same bits before they are timed.
Those of different lengths are padded to the longest in the dense form; what is compared is each sequence's own part.
Captured graphs, replayed in turn on inputs that are restored before, in the same memory for both forms.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from records import default_path, origin, write
from torch import Tensor
from zipvl_adapters.cli.timing import sets_of, time_calls

import zipvl_kernels as zk

D, KEEP_RATIO = 128, 0.367
GEOMETRIES = ((28, 4), (40, 40))
LENGTHS = ((4096,) * 8, (32768,), (2880,), (256,) * 128, (4096, 3000, 2000, 1000, 500, 3500, 1500, 2500))


class Case:
    """Sequences of these lengths in both forms, `sets` times: packed rows, and a batch padded behind."""

    def __init__(self, Hq: int, Hkv: int, lengths: tuple[int, ...], device: str, dtype: torch.dtype, D: int = D):
        self.lengths, longest, B = lengths, max(lengths), len(lengths)
        self.equal = len(set(lengths)) == 1
        self.sets = sets_of(2 * D * B * longest * (2 * Hq + 2 * Hkv))
        heads = Hq, Hkv, Hkv
        self.batches = [
            [torch.randn(B, longest, H, D, dtype=dtype, device=device) for H in heads] for _ in range(self.sets)
        ]
        # Of equal lengths, the very memory of the batch.
        self.rows = [[self.packed(x) for x in batch] for batch in self.batches]
        self.clean = [[x.clone() for x in batch[1:]] for batch in self.batches]
        self.clean_rows = [[self.packed(x) for x in kv] for kv in self.clean]
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.where = {"cu_seqlens": bounds, "max_seqlen": longest}
        padding = torch.zeros(B, device=device).int(), torch.tensor(lengths, device=device).int()
        self.padded = {} if self.equal else {"q_start": padding[0], "seqused_k": padding[1]}

    def packed(self, x: Tensor) -> Tensor:
        """The sequences' rows `[T, ...]` of `x [B, N, ...]`."""
        if self.equal:
            return x.flatten(0, 1)
        return torch.cat([rows[:n] for rows, n in zip(x, self.lengths, strict=True)])

    def restore(self) -> None:
        """Undo what compaction wrote."""
        for held, clean in ((self.batches, self.clean), (self.rows, self.clean_rows)):
            for (_, *kv), old in zip(held, clean, strict=True):
                for x, y in zip(kv, old, strict=True):
                    x.copy_(y)

    def dense_call(self, i: int, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """The batch of set `i`."""
        q, k, v = (x.transpose(1, 2) for x in self.batches[i])
        return zk.zipvl_prefill_(q, k, v, keep_ratio=KEEP_RATIO, **self.padded, backend=backend)

    def packed_call(self, i: int, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """The packed rows of set `i`."""
        return zk.zipvl_prefill_(*self.rows[i], keep_ratio=KEEP_RATIO, **self.where, backend=backend)

    def check(self, backend: str = "auto") -> None:
        """Each sequence has the bits that it has alone, and that a batch of equal lengths has."""
        self.restore()
        out, indices, counts = self.packed_call(0, backend)
        bounds = self.where["cu_seqlens"].tolist()
        for b, (start, end) in enumerate(pairwise(bounds)):
            q, k, v = self.rows[0][0], *(x.clone() for x in self.clean_rows[0])
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            alone = zk.zipvl_prefill_(*one, keep_ratio=KEEP_RATIO, backend=backend)
            mine = out[start:end].transpose(0, 1)[None], indices[None, :, start:end], counts[b : b + 1]
            for name, x, y in zip(("out", "indices", "counts"), alone, mine, strict=True):
                assert torch.equal(x, y), f"{name}: sequence {b} of {self.lengths} differs from the same alone"
        if self.equal:
            self.restore()
            batch, sets, numbers = self.dense_call(0, backend)
            assert torch.equal(batch.transpose(1, 2).flatten(0, 1), out), "out: packed and dense differ"
            assert torch.equal(sets.transpose(0, 1).flatten(1), indices), "indices: packed and dense differ"
            assert torch.equal(numbers, counts), "counts: packed and dense differ"


def measure(Hq: int, Hkv: int, lengths: tuple[int, ...]) -> dict[str, object]:
    """Milliseconds of one layer's prefill in both forms."""
    case = Case(Hq, Hkv, lengths, "cuda", torch.bfloat16)
    case.check()
    calls = {"dense": case.dense_call, "packed": case.packed_call}
    times, failed = time_calls(calls, case.sets, restore=case.restore)
    if failed:
        raise SystemExit(f"{Hq}/{Hkv} {lengths}: {failed}")
    return {
        "heads": f"{Hq}/{Hkv}",
        "lengths": list(lengths),
        "equal_work": case.equal,
        **{f"{name}_ms": asdict(found) for name, found in times.items()},
        "packed_over_dense": times["packed"].p50 / times["dense"].p50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/packed.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/packed.py: torch sees no GPU ('zipvl env' shows what it sees)")
    rows: list[dict[str, object]] = []
    measured = f"milliseconds of one zipvl_prefill_, keep_ratio {KEEP_RATIO}, D {D}, bf16; graphs in turn"
    record, out = {**origin("packed"), "measured": measured, "rows": rows}, args.out or default_path("packed")
    for Hq, Hkv in GEOMETRIES:
        for lengths in LENGTHS:
            row = measure(Hq, Hkv, lengths)
            rows.append(row)
            write(out, record)
            shape = f"{len(lengths)} x {lengths[0]}" if row["equal_work"] else f"{len(lengths)} of {sum(lengths)} rows"
            print(f"{row['heads']:>6} {shape:>16}  packed / dense: {row['packed_over_dense']:.3f}", flush=True)
    print(f"file: {out}")


if __name__ == "__main__":
    main()
