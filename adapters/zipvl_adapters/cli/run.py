"""`zipvl run`: a user's own model, picture and prompt."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from zipvl_adapters.cli.answering import answer, chat_prompt, encode, open_model
from zipvl_adapters.cli.checks import (
    UserError,
    check_device,
    check_dtype,
    check_image,
    check_positive,
    check_prompt,
    check_tau,
)
from zipvl_adapters.cli.tables import print_table

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from zipvl_adapters import Stats


def run(
    model: Annotated[str, typer.Option(help="Folder of a model, or its name on the Hugging Face hub.")],
    prompt: Annotated[str, typer.Option(help="Question or instruction.")],
    image: Annotated[Path | None, typer.Option(help="Picture; left out for text alone.", show_default=False)] = None,
    tau: Annotated[float, typer.Option(help="Share of the attention that the kept tokens hold, in (0, 1].")] = 0.975,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the dense model.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (a GPU if there is one).", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 (bfloat16 on a GPU, else float32).", show_default=False),
    ] = None,
) -> None:
    """Answer a prompt about a picture with ZipVL; with --compare also dense."""
    check_tau(tau)
    check_prompt(prompt)
    check_positive("--max-new-tokens", max_new_tokens)
    if not model.strip():
        raise UserError(
            "--model is empty: expected a folder with config.json or a name such as llava-hf/llava-1.5-7b-hf."
        )
    picture = None if image is None else check_image(image)
    chosen = check_device(device)
    chosen_dtype = check_dtype(dtype)

    from zipvl_adapters import ZipVLPolicy, attach

    console = Console()
    policy = ZipVLPolicy(tau=tau)
    loaded, processor = open_model(model, device=chosen, dtype=chosen_dtype)
    try:
        with attach(loaded, policy):
            pass
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {model}: {error}") from error
    inputs = _inputs(processor, loaded, prompt, picture, image, model)
    if compare:  # the first call pays for lazy initialisation: it is not timed
        answer(processor, loaded, inputs, policy, 1)
    [given], seconds, stats = answer(processor, loaded, inputs, policy, max_new_tokens)
    assert stats is not None
    dense = answer(processor, loaded, inputs, None, max_new_tokens) if compare else None
    _print_answer(console, f"ZipVL, tau = {tau:g}", given)
    if dense is not None:
        _print_answer(console, "dense", dense[0][0])
    _print_cost(console, stats, seconds, None if dense is None else dense[1])
    if dense is not None:
        same = "the same answer" if given == dense[0][0] else "different answers"
        console.print(f"ZipVL and the dense model gave {same}.")


def _inputs(
    processor: Any, model: Any, prompt: str, picture: "Image | None", path: Path | None, name: str
) -> "dict[str, torch.Tensor]":
    """What goes into the model; a picture or prompt that its processor refuses is bad input, not an internal error."""
    if picture is not None and not hasattr(processor, "tokenizer"):
        raise UserError(f"--image {path}: {name} is a text-only model; expected no picture: leave --image out.")
    try:
        text = chat_prompt(processor, prompt, picture=picture is not None)
        return encode(processor, model, [text], None if picture is None else [picture])
    except Exception as error:  # processors raise whatever their parts raise
        what = "--prompt" if picture is None else f"--image {path} or --prompt"
        raise UserError(
            f"{what}: the processor of {name} cannot read it ({type(error).__name__}: {error});"
            " expected an ordinary photo or page and plain text: try another."
        ) from error


def _print_answer(console: Console, title: str, text: str) -> None:
    console.print(Text(title, style="bold"))
    console.print(Text(text or "(an empty answer)"), soft_wrap=True)
    console.print()


def _print_cost(console: Console, stats: "Stats", seconds: float, dense_seconds: float | None) -> None:
    ratios = [sum(layer.ratio) / len(layer.ratio) for layer in stats.layers]
    least, most = min(ratios), max(ratios)
    rows = [
        ["tokens kept", f"{stats.kept_ratio:.1%}", "100.0%", f"{1 - stats.kept_ratio:.1%}"],
        _cost("KV cache, MiB", stats.kv_bytes / 2**20, stats.kv_bytes_dense / 2**20),
        _cost("attention, GFLOP", stats.attention_flops / 1e9, stats.attention_flops_dense / 1e9),
    ]
    if dense_seconds is not None:
        rows.append(["seconds", f"{seconds:.2f}", f"{dense_seconds:.2f}", ""])
    print_table(
        console,
        ["", "ZipVL", "dense", "saved"],
        rows,
        title=f"{stats.layers[0].seen[0]} prompt tokens through {len(ratios)} layers",
        caption=f"Layers kept between {least:.1%} (layer {ratios.index(least) + 1}) and {most:.1%}"
        f" (layer {ratios.index(most) + 1}). Attention: QK^T and PV of the prefill."
        + ("" if dense_seconds is None else " Seconds are those of one run, not a benchmark."),
        labels=1,
    )


def _cost(name: str, zipvl: float, dense: float) -> list[str]:
    return [name, f"{zipvl:.3g}", f"{dense:.3g}", f"{1 - zipvl / dense:.1%}"]
