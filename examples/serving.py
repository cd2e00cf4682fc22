"""How many requests fit into one pool of pages: dense, with ZipVL, and with ZipVL and a block table for each layer.

Serves held-out questions about pictures with the small Qwen2-VL model of this repository, three times with the same
pool, and writes what happened to out/serve/: serving.png and serving.json. `make serve-demo`, on a CPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from paged_engine import Engine
from rich.console import Console
from transformers import PreTrainedModel
from zipvl_adapters import ZipVLPolicy
from zipvl_adapters.cli.answering import ANSWER_TOKENS, encode_all, open_model
from zipvl_adapters.cli.assets import Question, find_assets
from zipvl_adapters.cli.env import commit, device_name, versions
from zipvl_adapters.cli.outputs import whole_files
from zipvl_adapters.cli.progress import Reporter, reporting
from zipvl_adapters.cli.tables import percent, print_table

MODEL = "qwen2_vl"
PER_TASK = 8  # questions
TAU = 0.975
NUM_BLOCKS, BLOCK_SIZE = 257, 16  # 256 pages of 16 rows a layer, and page 0: prompts have 623 tokens and more
MODES: dict[str, tuple[ZipVLPolicy | None, bool]] = {
    "dense": (None, False),
    "ZipVL, one table": (ZipVLPolicy(tau=TAU, recompress_interval=None), False),
    "ZipVL, a table per layer": (ZipVLPolicy(tau=TAU, recompress_interval=None), True),
}


def main() -> None:
    """Serve the questions in every mode, print a table, write plot and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/serve"), help="folder for serving.png and serving.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)  # the model is so small that threads cost more than they save on a busy machine
    assets, device = find_assets(), torch.device("cpu")
    questions = [question for asked in assets.take(PER_TASK).values() for question in asked]
    with reporting(len(MODES) * len(questions)) as reporter:
        reporter.say("looking at pictures")
        model, processor = open_model(str(assets.models[MODEL]), device=device)
        prompts: list[dict[str, Any]] = list(encode_all(processor, model, questions, batch_size=1))
        look_at_pictures(model, prompts)
        runs = []
        for mode in MODES:
            reporter.say(f"serving: {mode}")
            runs.append(serve(mode, model, processor, prompts, questions, reporter))
    record = {
        "command": "python examples/serving.py",
        "model": MODEL,
        "settings": {"tau": TAU, "num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "per_task": PER_TASK},
        "device": {"name": device_name(device), "type": device.type},
        "versions": versions(),
        "commit": commit(),
        "runs": runs,
    }
    with whole_files(out) as folder:
        draw(runs, folder / "serving.png")
        (folder / "serving.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(runs, out)


def serve(
    mode: str,
    model: PreTrainedModel,
    processor: Any,
    prompts: list[dict[str, Any]],
    questions: list[Question],
    reporter: Reporter,
) -> dict[str, Any]:
    """All prompts from a new engine: what came of it, and what was in use after each step."""
    policy, table_per_layer = MODES[mode]
    stop: Any = model.generation_config.eos_token_id
    engine = Engine(
        model,
        policy,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        table_per_layer=table_per_layer,
        stop_tokens=[stop] if isinstance(stop, int) else stop,
    )
    requests = [engine.submit(prompt, ANSWER_TOKENS) for prompt in prompts]
    history: list[dict[str, float]] = []
    while engine.has_work:
        done = sum(request.is_done for request in requests)
        engine.step()
        history.append({"running": len(engine.running), "pages_in_use": round(engine.cache.share_in_use, 4)})
        reporter.advance(sum(request.is_done for request in requests) - done)
    answers = processor.batch_decode([request.tokens for request in requests], skip_special_tokens=True)
    right = [text.strip() == question.answer for text, question in zip(answers, questions, strict=True)]
    return {
        "mode": mode,
        "requests": len(requests),
        "right": sum(right),
        "most_at_once": max(step["running"] for step in history),
        "steps": len(history),
        "kept": round(sum(request.kept for request in requests) / len(requests), 4),
        "preemptions": sum(request.preemptions for request in requests),
        "pool_bytes": engine.cache.nbytes,
        "history": history,
    }


@torch.inference_mode()
def look_at_pictures(model: Any, prompts: list[dict[str, Any]]) -> None:
    """Runs the vision tower once for all modes; transformers before 5.23 has to look again in every prefill."""
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        for prompt in prompts:
            features = model.get_image_features(prompt.pop("pixel_values"), prompt["image_grid_thw"], return_dict=True)
            prompt["mm_encoder_outputs"] = {"image": features}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Requests at once and pages in use, after every step of the engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (at_once, in_use) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    for run in runs:
        steps = range(1, run["steps"] + 2)
        for axis, name, scale in ((at_once, "running", 1), (in_use, "pages_in_use", 100)):
            axis.step(steps, [*(scale * step[name] for step in run["history"]), 0], where="post", label=run["mode"])
    at_once.set(ylabel="requests at once", title=title(runs), ylim=(0, None))
    in_use.set(ylabel="pages in use, %", xlabel="step: one token for each running request", ylim=(0, 105))
    at_once.legend()
    for axis in (at_once, in_use):
        axis.grid(alpha=0.3)
        axis.set_xlim(left=1)
        axis.locator_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def title(runs: list[dict[str, Any]]) -> str:
    """What all runs have in common."""
    return f"{runs[0]['requests']} questions about pictures, one pool of {runs[0]['pool_bytes'] / 2**20:.0f} MiB"


def show(runs: list[dict[str, Any]], out: Path) -> None:
    """The table."""
    rows = [
        [
            run["mode"],
            str(run["most_at_once"]),
            str(run["steps"]),
            percent(run["kept"]),
            f"{run['right']} of {run['requests']}",
        ]
        for run in runs
    ]
    print_table(
        Console(),
        ["mode", "most\nat once", "steps", "kept\n%", "right\nanswers"],
        rows,
        title=title(runs),
        caption="Steps: one token for each running request.\n"
        "Kept: share of the prompts' keys and values, mean over layers and requests.",
        labels=1,
    )
    Console().print(f"plot: {out / 'serving.png'}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
