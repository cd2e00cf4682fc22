"""Pictures: the visual tokens that each layer kept, drawn over the input picture, and the kept ratio per layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zipvl_adapters.cli.answering import answer, chat_prompt, encode, read_picture
from zipvl_adapters.cli.assets import EASY_TASK, Question
from zipvl_adapters.cli.scoring import ALL_ROWS, DENSE, FIXED, RANDOM, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from zipvl_adapters import Stats, ZipVLPolicy

# Okabe and Ito's palette, which colour-blind readers can tell apart.
EASY_COLOUR, HARD_COLOUR = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
INK, FAINT = "#1f2933", "#9aa5b1"
_DROPPED = np.array([0.09, 0.11, 0.15])  # the dark slate that dropped parts fade into
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "savefig.dpi": 130,
}


@dataclass(frozen=True)
class LayerView:
    """What one layer kept of the picture.

    `ratio` is the share of the visual tokens kept; `visible` [H, W] is, per pixel, the share kept of the tokens that
    show it. `overlapping` says that some pixel is shown by several tokens.
    """

    layer: int
    ratio: float
    visible: np.ndarray
    overlapping: bool


@dataclass(frozen=True)
class Example:
    """One question with its answers and views of three layers."""

    model: str
    question: Question
    dense: str
    zipvl: str
    tokens: int
    visual_tokens: int
    overlapping: bool
    layers: int
    picture: np.ndarray
    views: list[LayerView]

    def as_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {
            "model": self.model,
            "task": self.question.task,
            "picture": self.question.picture.name,
            "question": self.question.question,
            "answer": self.question.answer,
            "dense": self.dense,
            "zipvl": self.zipvl,
            "tokens": self.tokens,
            "visual_tokens": self.visual_tokens,
            "overlapping": self.overlapping,
            "visual_kept_ratio": {view.layer: view.ratio for view in self.views},
        }


def example(name: str, processor: Any, model: "PreTrainedModel", question: Question, policy: "ZipVLPolicy") -> Example:
    """Answer one question and look at what the first, the middle and the last layer kept of its picture."""
    from zipvl_adapters import visual_boxes

    picture = read_picture(question)
    inputs = encode(processor, model, [chat_prompt(processor, question.question, picture=True)], [picture])
    [dense], _, _ = answer(processor, model, inputs, None)
    [zipvl], _, stats = answer(processor, model, inputs, policy)
    assert stats is not None
    [(positions, boxes)] = visual_boxes(model.config, inputs)
    pixels = np.asarray(picture) / 255.0
    layers = len(stats.layers)
    views = [
        _view(stats, layer, positions.cpu().numpy(), boxes.cpu().numpy(), pixels.shape[:2])
        for layer in sorted({0, layers // 2, layers - 1})
    ]
    return Example(
        model=name,
        question=question,
        dense=dense,
        zipvl=zipvl,
        tokens=stats.layers[0].seen[0],
        visual_tokens=len(positions),
        overlapping=views[0].overlapping,
        layers=layers,
        picture=pixels,
        views=views,
    )


def _view(stats: "Stats", layer: int, positions: np.ndarray, boxes: np.ndarray, size: tuple[int, ...]) -> LayerView:
    kept = np.isin(positions, stats.layers[layer].kept_positions[0].cpu().numpy())
    over, alive = np.zeros(size), np.zeros(size)
    height, width = size
    for (x0, y0, x1, y1), keep in zip(boxes, kept, strict=True):
        if np.isnan(x0):  # stands for no place, such as a line break between rows of tokens
            continue
        place = np.s_[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)]
        over[place] += 1
        alive[place] += keep
    return LayerView(layer, float(kept.mean()), alive / np.maximum(over, 1), bool(over.max() > 1))


def draw_kept(examples: Sequence[Example], path: Path) -> None:
    """One model's picture: a row for each example with the input and what three layers kept of it."""
    columns = 1 + len(examples[0].views)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.75 * columns, 3.3 * len(examples)), layout="constrained")
        for band, shown in zip(figure.subfigures(len(examples), 1, squeeze=False)[:, 0], examples, strict=True):
            axes = band.subplots(1, columns)
            band.suptitle(_heading(shown), fontsize=10.5, x=0.0035, ha="left", weight="bold", parse_math=False)
            _show(axes[0], shown.picture, "input picture")
            for axis, view in zip(axes[1:], shown.views, strict=True):
                title = f"layer {view.layer + 1} of {shown.layers}: {view.ratio:.0%} kept"
                _show(axis, _darken(shown.picture, view.visible), title)
        figure.savefig(path)


def _heading(shown: Example) -> str:
    right = "right" if shown.zipvl == shown.question.answer else f"wrong, expected {shown.question.answer}"
    asked = _plain(shown.question.question, 60)
    return f"{asked}  ZipVL: {_plain(shown.zipvl, 16)} ({right}), dense: {_plain(shown.dense, 16)}"


def _plain(text: str, limit: int) -> str:
    """A model may answer anything: what the font lacks becomes a question mark, and what is long is cut."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x530 else "?" for c in " ".join(text.split()))
    return (shown if len(shown) <= limit else f"{shown[: limit - 3]}...") or "(nothing)"


def _darken(picture: np.ndarray, visible: np.ndarray) -> np.ndarray:
    grey = picture.mean(axis=2, keepdims=True)
    dropped = 0.22 * grey + 0.78 * _DROPPED
    shown: np.ndarray = visible[..., None] * picture + (1 - visible[..., None]) * dropped
    return shown


def _show(axis: Axes, image: np.ndarray, title: str) -> None:
    axis.imshow(image, vmin=0, vmax=1)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_layers(scores: Sequence[Score], path: Path) -> None:
    """Kept ratio per layer of an easy and a hard task, one panel a model (figure 3 of the paper)."""
    models = list(dict.fromkeys(score.model for score in scores))
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * len(models), 3.5), layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axis, model in zip(panels, models, strict=True):
            for score in (score for score in scores if score.model == model):
                easy = score.task == EASY_TASK
                layers = range(1, len(score.layer_ratios) + 1)
                axis.plot(
                    layers,
                    [100 * ratio for ratio in score.layer_ratios],
                    color=EASY_COLOUR if easy else HARD_COLOUR,
                    marker="o" if easy else "s",
                    markersize=5,
                    linewidth=1.8,
                    label=f"{'easy' if easy else 'hard'} ({score.task}): mean {score.kept_ratio:.0%}",
                )
            axis.set_title(model, loc="left", weight="bold", fontsize=11)
            axis.set_xlabel("decoder layer")
            axis.set_xticks(layers)
            axis.set(ylim=(0, 130), yticks=range(0, 101, 20))  # the legend stands above whatever the lines do
            axis.legend(frameon=False, loc="upper left", fontsize=9)
        panels[0].set_ylabel("tokens kept (%)")
        figure.savefig(path)


# Settings of `zipvl eval` in the plot: how their names begin, what the legend calls them, how their lines look.
_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("tau", "ZipVL", {"color": PALETTE[0], "marker": "o", "linewidth": 2, "zorder": 4}),
    (ALL_ROWS, "ZipVL, all rows computed", {"color": PALETTE[5], "marker": "^"}),
    (FIXED, "fixed ratio, same scores", {"color": PALETTE[3], "marker": "s"}),
    (RANDOM, "random tokens", {"color": FAINT, "marker": "D"}),
)


def draw_tradeoff(scores: Sequence[Score], path: Path) -> None:
    """Accuracy against kept ratio: a row a model, a column a task, a line a kind of setting; dotted: dense."""
    models = list(dict.fromkeys(score.model for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * len(tasks) + 0.6, 2.2 * len(models) + 0.9), layout="constrained")
        panels = figure.subplots(len(models), len(tasks), sharex=True, sharey=True, squeeze=False)
        shown: dict[str, Any] = {}
        for (m, model), (t, task) in product(enumerate(models), enumerate(tasks)):
            axis = panels[m, t]
            found = [score for score in scores if (score.model, score.task) == (model, task)]
            for score in found:
                if score.setting == DENSE:
                    shown["dense"] = axis.axhline(100 * score.accuracy, color=INK, linewidth=1, linestyle=":")
            for start, label, style in _KINDS:
                line = sorted((s for s in found if s.setting.startswith(start)), key=lambda s: s.kept_ratio)
                x, y = [100 * s.kept_ratio for s in line], [100 * s.accuracy for s in line]
                if line:
                    [shown[label]] = axis.plot(x, y, **{"markersize": 4, "linewidth": 1.3, **style})
            axis.set(xlim=(0, 102), ylim=(-4, 104), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
            if m == 0:
                axis.set_title(task.replace("_", ", "), weight="bold", fontsize=11)
            if t == 0:
                axis.set_ylabel(f"{model}\nright answers (%)")
        figure.supxlabel("tokens kept, mean over layers (%)", fontsize=10)
        labels = [label for label in ("dense", *(kind[1] for kind in _KINDS)) if label in shown]
        figure.legend([shown[x] for x in labels], labels, frameon=False, loc="outside upper center", ncols=5)
        figure.savefig(path)
