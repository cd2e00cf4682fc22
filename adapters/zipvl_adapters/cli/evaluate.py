"""`zipvl eval`: accuracy against kept ratio for the shipped models."""

import json
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
from zipvl_adapters.cli.scoring import DENSE, Score, default_batch, overall, score_model
from zipvl_adapters.cli.tables import print_table

if TYPE_CHECKING:
    import torch

    from zipvl_adapters import ZipVLPolicy

TAUS = (1.0, 0.99, 0.975, 0.95, 0.9, 0.8, 0.7, 0.5)
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
        bool, typer.Option("--fixed", help="Also keep ZipVL's mean ratio as a fixed one in every layer.")
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

    from zipvl_adapters import ZipVLPolicy

    first = {DENSE: None, **{_name(value): ZipVLPolicy(tau=value) for value in taus}}
    batch = default_batch(chosen)
    runs = len(first) + (len(taus) if fixed else 0)
    scores: list[Score] = []
    with reporting(runs * len(names) * sum(map(len, questions.values()))) as reporter:
        for name in names:
            reporter.say(f"{name}: loading")
            loaded, processor = open_model(str(assets.models[name]), device=chosen)
            settings = dict.fromkeys(questions, first)
            scores += score_model(name, processor, loaded, questions, settings, batch_size=batch, reporter=reporter)
            if fixed:
                settings = {task: _fixed_policies(scores, name, task, taus) for task in questions}
                scores += score_model(name, processor, loaded, questions, settings, batch_size=batch, reporter=reporter)
        reporter.say("drawing the plot")
        _write(out, scores, {"taus": taus, "limit": limit, "fixed": fixed}, chosen)
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


def _fixed_policies(scores: list[Score], model: str, task: str, taus: list[float]) -> "dict[str, ZipVLPolicy | None]":
    """For every tau the policy that keeps, in every layer, the share that ZipVL kept on average for this task."""
    from zipvl_adapters import ZipVLPolicy

    ratios = {score.setting: score.kept_ratio for score in scores if (score.model, score.task) == (model, task)}
    return {f"fixed as {_name(tau)}": ZipVLPolicy(keep_ratio=ratios[_name(tau)]) for tau in taus if tau < 1}


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
        " the scoring."
    )
