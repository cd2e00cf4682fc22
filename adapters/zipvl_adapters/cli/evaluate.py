"""`zipvl eval`: accuracy against kept ratio for the shipped models."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from zipvl_adapters.cli.answering import open_model
from zipvl_adapters.cli.assets import find_assets
from zipvl_adapters.cli.checks import UserError, check_device, check_output, check_positive, check_tau
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files
from zipvl_adapters.cli.progress import reporting
from zipvl_adapters.cli.scoring import ALL_ROWS, DENSE, FIXED, RANDOM, Score, default_batch, overall, score_model
from zipvl_adapters.cli.tables import print_table

if TYPE_CHECKING:
    import torch

    from zipvl_adapters import ZipVLPolicy

TAUS = (0.99, 0.975, 0.96, 0.9)
CPU_LIMIT = 20


def evaluate(
    models: Annotated[Path | None, typer.Option(help="Folder with models/ and heldout/.", show_default=False)] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model's name; repeat for more (all).")] = None,
    tau: Annotated[
        list[float] | None, typer.Option(help=f"In (0, 1]; repeat for more ({' '.join(map(str, TAUS))}).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help=f"Questions per task ({CPU_LIMIT} on a CPU, all on a GPU).", show_default=False)
    ] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed/--no-fixed", help="Also keep ZipVL's mean ratio as a fixed one in every layer.")
    ] = True,
    random: Annotated[
        bool, typer.Option("--random/--no-random", help="Also keep as many tokens, drawn at random, in every layer.")
    ] = True,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Also let every row attend, over the kept tokens, at every tau.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for quality.json, quality.md and quality.png.")] = Path("out/eval"),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (a GPU if there is one).", show_default=False)
    ] = None,
) -> None:
    """Measure accuracy against kept ratio over a list of taus: table, plot and JSON."""
    taus = sorted({check_tau(value) for value in tau or TAUS}, reverse=True)
    if limit is not None:
        check_positive("--limit", limit)
    check_output(out)
    assets = find_assets(models)
    names = list(dict.fromkeys(model or assets.models))
    for name in names:
        if name not in assets.models:
            raise UserError(f"--model {name}: expected one of {', '.join(assets.models)} (found in {assets.folder}).")
    chosen = check_device(device)
    if limit is None and chosen.type == "cpu":
        limit = CPU_LIMIT
    questions = assets.take(limit)

    batch = default_batch(chosen)
    first = _policies(taus, all_rows=all_rows)
    runs = len(first) + (fixed + random) * sum(value < 1 for value in taus)
    same_ratio = partial(_same_ratio, taus=taus, fixed=fixed, random=random)
    digest = hashlib.sha256((assets.folder / "heldout" / "manifest.json").read_bytes()).hexdigest()
    settings = {"taus": taus, "limit": limit, "batch": batch, "manifest_sha256": digest}
    scores: list[Score] = []
    with reporting(runs * len(names) * sum(map(len, questions.values()))) as reporter:
        for name in names:
            reporter.say(f"{name}: loading")
            loaded, processor = open_model(str(assets.models[name]), device=chosen)
            scores += score_model(
                name, processor, loaded, questions, first, further=same_ratio, batch_size=batch, reporter=reporter
            )
            _write(out, scores, settings, chosen)  # at once: what a model gave outlives the next one's failure
    table = _table(scores)
    print_table(
        Console(),
        table[0],
        table[1:],
        title="Right answers in % (tokens kept in %)",
        caption=_note(scores),
        labels=2,
    )
    Console().print(f"files: {out}", markup=False, highlight=False, soft_wrap=True)


def _name(tau: float) -> str:
    return f"tau {tau:g}"


def _policies(taus: list[float], *, all_rows: bool) -> "dict[str, ZipVLPolicy | None]":
    """What needs no other measurement first: the dense model, then every tau."""
    from zipvl_adapters import ZipVLPolicy
    from zipvl_adapters.cli.variants import AllRowsPolicy

    policies: dict[str, ZipVLPolicy | None] = {DENSE: None}
    policies |= {_name(tau): ZipVLPolicy(tau=tau) for tau in taus}
    return policies | ({f"{ALL_ROWS} {_name(tau)}": AllRowsPolicy(tau=tau) for tau in taus} if all_rows else {})


def _same_ratio(
    scores: list[Score], *, taus: list[float], fixed: bool, random: bool
) -> "dict[str, ZipVLPolicy | None]":
    """For every tau what keeps, in every layer, the share that ZipVL kept on average for the task of the scores."""
    from zipvl_adapters import ZipVLPolicy
    from zipvl_adapters.cli.variants import RandomPolicy

    ratios = {score.setting: score.kept_ratio for score in scores}
    kinds = [(FIXED, ZipVLPolicy)] * fixed + [(RANDOM, RandomPolicy)] * random
    return {
        f"{start} {_name(tau)}": kind(keep_ratio=ratios[_name(tau)]) for start, kind in kinds for tau in taus if tau < 1
    }


def _write(out: Path, scores: list[Score], settings: dict[str, Any], device: "torch.device") -> None:
    from zipvl_adapters.cli.pictures import draw_tradeoff

    record = {
        "command": "zipvl eval",
        "settings": settings,
        "device": {"name": device_name(device), "type": device.type},
        "versions": versions(),
        "commit": commit(),
        "scores": [score.as_json() for score in scores],
    }
    headings, *rows = _table(scores)
    lines = [
        [" ".join(heading.split()) for heading in headings],
        ["---", "---", *["---:"] * (len(headings) - 2)],
        *rows,
    ]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with whole_files(out) as folder:
        (folder / "quality.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "quality.md").write_text(f"{markdown}\n{_note(scores)}\n", encoding="utf-8")
        draw_tradeoff(scores, folder / "quality.png")


def _table(scores: list[Score]) -> list[list[str]]:
    """Headings, then one row a model and setting: right answers (and kept ratio) per task and over all of them."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    table = [
        [
            "model",
            "setting",
            *(task.replace("_", "\n") for task in tasks),
            "all\ntasks",
            "KV\nsaved %",
            "FLOPs\nsaved %",
        ]
    ]
    for model, setting in dict.fromkeys((score.model, score.setting) for score in scores):
        found = [score for score in scores if (score.model, score.setting) == (model, setting)]
        total = overall(found)
        cells = [f"{100 * score.accuracy:.1f} ({100 * score.kept_ratio:.0f})" for score in [*found, total]]
        table.append([model, setting, *cells, f"{100 * total.kv_saved:.1f}", f"{100 * total.flops_saved:.1f}"])
    return table


def _note(scores: list[Score]) -> str:
    least = min(score.questions for score in scores)
    return (
        f"Exact match on {least} or more held-out questions a task and model; in brackets the tokens kept, mean over"
        " layers and questions. KV: bytes of the cache after the answer. FLOPs: QK^T and PV of the prefill, with"
        " the scoring. Fixed: ZipVL's mean ratio in every layer, same scores; random: that many tokens, drawn."
        " All rows: rows of dropped tokens are computed too."
    )
