"""Compaction of all layers in one launch, and over pages, against copy speed: `python bench/all_layers.py`.

The cache of a model, 40 layers of 40 KV heads (LLaVA-NeXT-13B) or 28 of 4 (Qwen2-VL-7B), each layer with a set of its
own: as many tokens in every layer, or few in some and many in others. Checked first, row by row, on the very inputs
that are timed. Times are medians of replayed CUDA graphs; copy speed is that of a large kernel that reads and writes,
in the same run. Needs a GPU, and writes bench/results/GPU/all_layers.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from records import default_path, origin, write
from torch import Tensor
from zipvl_adapters.cli.timing import ceilings, sets_of, time_calls

import zipvl_kernels as zk

KEEP_RATIO, D, PAGE = 0.367, 128, 16
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
Lists = list[list[Tensor]]


@dataclass(frozen=True)
class Case:
    """What is compacted. `pages`: in pools of pages of 16 rows, in any order."""

    layers: int
    Hkv: int
    N: int
    even: bool  # as many tokens in every layer
    pages: bool

    @property
    def kept(self) -> list[int]:
        """Tokens that each layer keeps; uneven, from a third of the mean in the last layer to as much above it."""
        shares = [1 + (0 if self.even else 2 / 3 * (1 - 2 * (i + 0.5) / self.layers)) for i in range(self.layers)]
        return [ceil(KEEP_RATIO * share * self.N) for share in shares]

    @property
    def num_bytes(self) -> int:
        """Read and written: keys, values, and numbers of rows once."""
        return sum(2 * 2 * self.Hkv * D * DTYPE.itemsize * p + 4 * p for p in self.kept)

    def describe(self) -> dict[str, object]:
        """As a row of the record."""
        sets = "even" if self.even else "uneven"
        place = {"block_size": PAGE} if self.pages else {}
        return {"layers": self.layers, "Hkv": self.Hkv, "N": self.N, "D": D, "sets": sets, **place}


def draw(case: Case) -> Lists:
    """Keys, values, sets, counts and, with pages, block tables, of all layers."""
    found: Lists = [[] for _ in range(5 if case.pages else 4)]
    blocks = ceil(case.N / PAGE)
    for p in case.kept:
        rows = (blocks, PAGE) if case.pages else (1, case.N)
        for buffers in found[:2]:  # [num_blocks, PAGE, Hkv, D], or as a model lays out one sequence
            x = torch.randn(*rows, case.Hkv, D, dtype=DTYPE, device=DEVICE)
            buffers.append(x if case.pages else x.transpose(1, 2))
        kept = torch.randperm(case.N, device=DEVICE)[:p].sort().values.int()
        found[2].append(torch.nn.functional.pad(kept, (0, case.N - p), value=-1)[None, None])
        found[3].append(torch.tensor([[p]], dtype=torch.int32, device=DEVICE))
        if case.pages:
            found[4].append(torch.randperm(blocks, device=DEVICE).int()[None])
    return found


def compact(case: Case, inputs: Lists, used: Tensor, *, together: bool) -> object:
    """All layers at once, or one after the other."""
    fn, rest = (zk.compact_paged_kv_, [used]) if case.pages else (zk.compact_kv_, [])
    if together:
        return fn(*inputs, *rest)
    return [fn(*layer, *rest) for layer in zip(*inputs, strict=True)]


def check(case: Case, inputs: Lists, used: Tensor) -> None:
    """Every kept row of every layer is where it should be, and so are lengths and free pages."""

    def rows(i: int, which: int, at: Tensor) -> Tensor:
        if not case.pages:
            return inputs[which][i][0, :, at]
        return inputs[which][i][inputs[4][i][0, at // PAGE].long(), at % PAGE]

    sets = [inputs[2][i][0, 0, :p].long() for i, p in enumerate(case.kept)]
    wanted = [[rows(i, which, at) for which in (0, 1)] for i, at in enumerate(sets)]
    returned = compact(case, inputs, used, together=True)
    for i, p in enumerate(case.kept):
        for which, before in enumerate(wanted[i]):
            now = rows(i, which, torch.arange(p, device=DEVICE))
            assert torch.equal(now, before), f"layer {i}: expected the rows of its set in order in {'kv'[which]}"
    if case.pages:
        assert isinstance(returned, tuple)
        seqused, freed = returned
        pages = [ceil(case.N / PAGE) - ceil(p / PAGE) for p in case.kept]
        assert seqused[:, 0].tolist() == case.kept, f"seqused: expected {case.kept}, got {seqused[:, 0].tolist()}"
        assert freed[:, 0].tolist() == pages, f"freed: expected {pages}, got {freed[:, 0].tolist()}"


def measure(case: Case, copy: float) -> list[dict[str, object]]:
    """Rows of the record; run again, an input moves as many rows as before."""
    sets = sets_of(2 * case.layers * case.Hkv * case.N * D * DTYPE.itemsize)
    inputs = [draw(case) for _ in range(sets)]
    used = torch.tensor([case.N], dtype=torch.int32, device=DEVICE)
    check(case, inputs[0], used)
    calls: dict[str, Callable[[int], object]] = {
        "one launch": lambda i: compact(case, inputs[i], used, together=True),
    }
    if case.layers > 1:
        calls["layer by layer"] = lambda i: compact(case, inputs[i], used, together=False)
    times, failed = time_calls(calls, sets)
    assert not failed, failed
    least = 1e3 * case.num_bytes / copy
    return [
        {
            **case.describe(),
            "by": name,
            "bytes": case.num_bytes,
            **{f"{name}_ms": round(getattr(t, name), 4) for name in ("p20", "p50", "p80")},
            "x_copy": round(t.p50 / least, 3),
            "of_copy": round(least / t.p50, 3),
        }
        for name, t in times.items()
    ]


def cases() -> list[Case]:
    """Those that have a goal first: all layers at 1.2 times their bytes' time, pages at 75 % of copy speed."""
    return [
        Case(layers=40, Hkv=40, N=4096, even=True, pages=False),
        Case(layers=1, Hkv=40, N=32768, even=True, pages=True),
        Case(layers=40, Hkv=40, N=4096, even=False, pages=False),
        Case(layers=40, Hkv=40, N=4096, even=True, pages=True),
        Case(layers=40, Hkv=40, N=4096, even=False, pages=True),
        Case(layers=1, Hkv=40, N=32768, even=True, pages=False),
        Case(layers=28, Hkv=4, N=32768, even=True, pages=False),
        Case(layers=28, Hkv=4, N=32768, even=True, pages=True),
        Case(layers=28, Hkv=4, N=2880, even=True, pages=False),
        Case(layers=28, Hkv=4, N=2880, even=True, pages=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU/all_layers.json")
    args = parser.parse_args()
    found, out = ceilings(), args.out or default_path("all_layers")
    rows: list[dict[str, object]] = []
    record = {**origin("all_layers"), "keep_ratio": KEEP_RATIO, "dtype": "bfloat16", "ceilings": found, "rows": rows}
    print(f"{record['device']}: copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    for case in cases():
        for row in measure(case, found["copy_bytes_per_second"]):
            rows.append(row)
            place = "pages " if case.pages else "buffer"
            print(
                f"{case.layers:3} layers  {case.Hkv:2} heads  {case.N:6} tokens  {place}  {row['sets']:6}"
                f"  {row['by']:14}  {row['p50_ms']:8.4f} ms  {row['x_copy']:.2f} x copy",
                flush=True,
            )
        write(out, record)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
