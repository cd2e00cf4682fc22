"""Writes held-out pictures and questions: `python bench/tiny_vlm/write_heldout.py --per-task 40`.

The folder is what `zipvl demo` and `zipvl eval` read: manifest.json and the pictures. Pictures of the training never occur
in it, since their seeds are others. The accuracy in training.json is of the seeds from 0 on; these start at 1,000,000.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evaluate import heldout
from pictures import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--start", type=int, default=1_000_000, help="first seed of the pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "heldout")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names: dict[int, str] = {}
    items = []
    for sample, task, question, answer in heldout(args.per_task, args.start):
        if id(sample) not in names:
            names[id(sample)] = f"{len(names):05d}.jpg"
            sample.image.save(args.out / names[id(sample)], quality=92)
        items.append({"image": names[id(sample)], "task": task, "question": question, "answer": answer})
    manifest = {"tasks": list(TASKS), "items": items}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
