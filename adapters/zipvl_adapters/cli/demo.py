"""`zipvl demo`: the shipped models on held-out questions, dense and with ZipVL, as a table, pictures and a report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from zipvl_adapters.cli.answering import open_model
from zipvl_adapters.cli.assets import EASY_TASK, HARD_TASK, find_assets
from zipvl_adapters.cli.checks import check_device, check_output, check_positive, check_tau
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files
from zipvl_adapters.cli.progress import reporting
from zipvl_adapters.cli.scoring import DENSE, Score, default_batch, paired, score_model
from zipvl_adapters.cli.tables import percent, print_table

if TYPE_CHECKING:
    import torch

    from zipvl_adapters.cli.pictures import Example

ZIPVL = "ZipVL"
_SECONDS_ON_CPU = (
    "Seconds are those of the reference operators on a CPU: plain PyTorch, written to be read and not to be fast. They"
    " say nothing about the speed of ZipVL."
)
_SECONDS = "Seconds are those of one short run, model start excluded; they are no benchmark."


def demo(
    models: Annotated[Path | None, typer.Option(help="Folder with models/ and heldout/.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json and pictures.")] = Path("out/demo"),
    tau: Annotated[float, typer.Option(help="Share of the attention that the kept tokens hold, in (0, 1].")] = 0.975,
    limit: Annotated[int, typer.Option(help="Questions per task and model.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (a GPU if there is one).", show_default=False)
    ] = None,
) -> None:
    """Answer held-out questions dense and with ZipVL; print a table, write pictures and a report."""
    check_tau(tau)
    check_positive("--limit", limit)
    check_output(out)
    assets = find_assets(models)
    chosen = check_device(device)

    from zipvl_adapters import ZipVLPolicy
    from zipvl_adapters.cli.pictures import example

    questions = assets.take(limit)
    policy = ZipVLPolicy(tau=tau)
    settings = {DENSE: None, ZIPVL: policy}
    pictured = [task for task in (EASY_TASK, HARD_TASK) if task in questions] or list(questions)[:2]
    scores: list[Score] = []
    examples: list[Example] = []
    with reporting(2 * len(assets.models) * sum(map(len, questions.values()))) as reporter:
        for name, folder in assets.models.items():
            reporter.say(f"{name}: loading")
            model, processor = open_model(str(folder), device=chosen)
            reporter.say(f"{name}: example pictures")
            # The first call pays for lazy initialisation: it is not timed.
            examples += [example(name, processor, model, questions[task][0], policy) for task in pictured]
            batch = default_batch(chosen)
            scores += score_model(name, processor, model, questions, settings, batch_size=batch, reporter=reporter)
        reporter.say("drawing pictures and report")
        _write(out, scores, examples, {"tau": tau, "limit": limit, "batch_size": batch}, chosen)
    _print(scores, tau, chosen)
    Console().print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _write(
    out: Path, scores: list[Score], examples: "list[Example]", settings: dict[str, float], device: "torch.device"
) -> None:
    """Write all files of the demo, or none."""
    from zipvl_adapters.cli.pictures import draw_kept, draw_layers
    from zipvl_adapters.cli.report import demo_report

    pictured = {shown.question.task for shown in examples}
    record = {
        "command": "zipvl demo",
        "settings": settings,
        "device": {"name": device_name(device), "type": device.type},
        "versions": versions(),
        "commit": commit(),
        "scores": [score.as_json() for score in scores],
        "examples": [shown.as_json() for shown in examples],
    }
    with whole_files(out) as folder:
        kept = {}
        for model in dict.fromkeys(shown.model for shown in examples):
            kept[model] = folder / f"kept_{model}.png"
            draw_kept([shown for shown in examples if shown.model == model], kept[model])
        layers = folder / "kept_by_layer.png"
        draw_layers([score for score in scores if score.setting == ZIPVL and score.task in pictured], layers)
        (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        page = demo_report(paired(scores, ZIPVL), record, kept, layers, _notes(scores, device))
        (folder / "report.html").write_text(page, encoding="utf-8")


def _notes(scores: list[Score], device: "torch.device") -> list[str]:
    questions = max(score.questions for score in scores)
    return [
        f"An answer is right when it equals the expected text exactly. With {questions} questions a task, one"
        f" weighs {100 / questions:.1f} points; 'zipvl eval' measures on more.",
        "Agree: the share of questions to which both gave the same answer. Kept: the share of the prompt's tokens, mean"
        " over layers and questions. KV saved: bytes of the cache after the answer. FLOPs saved: QK^T and PV of the"
        " prefill, the scoring of the probe rows counted as work.",
        _SECONDS_ON_CPU if device.type == "cpu" else _SECONDS,
    ]


def _print(scores: list[Score], tau: float, device: "torch.device") -> None:
    rows = [
        [
            zipvl.model,
            zipvl.task,
            *(percent(share) for share in (dense.accuracy, zipvl.accuracy, zipvl.agreement)),
            *(percent(share) for share in (zipvl.kept_ratio, zipvl.kv_saved, zipvl.flops_saved)),
            f"{dense.seconds:.1f}/{zipvl.seconds:.1f}",
        ]
        for dense, zipvl in paired(scores, ZIPVL)
    ]
    print_table(
        Console(),
        [
            "model",
            "task",
            "dense\n%",
            "ZipVL\n%",
            "agree\n%",
            "kept\n%",
            "KV\nsaved %",
            "FLOPs\nsaved %",
            "seconds\ndense/ZipVL",
        ],
        rows,
        title=f"ZipVL at tau = {tau:g} against the dense model",
        caption="\n".join(_notes(scores, device)),
        labels=2,
    )
