"""How a shipped model does on the held-out questions: one score a model, task and setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zipvl_adapters.cli.answering import Answers, ask, encode_all
from zipvl_adapters.cli.assets import Question
from zipvl_adapters.cli.progress import Reporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from zipvl_adapters import ZipVLPolicy

DENSE = "dense"
ALL_TASKS = "all tasks"
# How the names of the other settings of `zipvl eval` begin; ZipVL's own are called after their tau.
FIXED, RANDOM, ALL_ROWS = "fixed as", "random as", "all rows,"


@dataclass(frozen=True)
class Score:
    """One model on one task under one setting. Shares lie in [0, 1]; `seconds` is the time of all its questions.

    Bytes and FLOPs are sums over the questions; the `_dense` ones say what the same tokens cost without ZipVL. They
    are 0, and `kept_ratio` is 1, for the dense model itself. `agreement` is None where dense answers were not at hand.
    """

    model: str
    task: str
    setting: str
    questions: int
    accuracy: float
    agreement: float | None
    kept_ratio: float
    layer_ratios: list[float]
    kv_bytes: int
    kv_bytes_dense: int
    attention_flops: int
    attention_flops_dense: int
    seconds: float

    @property
    def kv_saved(self) -> float:
        """Share of the KV cache's bytes that are not needed."""
        return 1 - self.kv_bytes / self.kv_bytes_dense if self.kv_bytes_dense else 0.0

    @property
    def flops_saved(self) -> float:
        """Share of the prefill's attention FLOPs that are not needed, after paying for the probes."""
        return 1 - self.attention_flops / self.attention_flops_dense if self.attention_flops_dense else 0.0

    def as_json(self) -> dict[str, Any]:
        """All fields and the two saved shares."""
        return {**asdict(self), "kv_saved": self.kv_saved, "attention_flops_saved": self.flops_saved}


def score_model(
    name: str,
    processor: Any,
    model: "PreTrainedModel",
    questions: Mapping[str, Sequence[Question]],
    settings: "Mapping[str, ZipVLPolicy | None]",
    *,
    further: "Callable[[list[Score]], Mapping[str, ZipVLPolicy | None]] | None" = None,
    batch_size: int,
    reporter: Reporter,
) -> list[Score]:
    """Score a model on every task under `settings`, and then under those that `further` makes of a task's scores."""
    scores: list[Score] = []
    rounds = [lambda found: settings, *([further] if further else [])]
    for task, asked in questions.items():
        reporter.say(f"{name}: {task}")
        batches = encode_all(processor, model, asked, batch_size)
        dense, found = None, list[Score]()
        for wanted in rounds:
            for setting, policy in wanted(found).items():
                given = ask(processor, model, batches, policy, reporter.advance)
                dense = given if setting == DENSE else dense
                found.append(_score(name, task, setting, asked, given, dense))
        scores += found
    return scores


def _score(
    model: str, task: str, setting: str, questions: Sequence[Question], answers: Answers, dense: Answers | None
) -> Score:
    return Score(
        model=model,
        task=task,
        setting=setting,
        questions=len(questions),
        accuracy=answers.accuracy(questions),
        agreement=None if dense is None else answers.agreement(dense),
        kept_ratio=answers.kept_ratio,
        layer_ratios=answers.layer_ratios,
        kv_bytes=answers.kv_bytes,
        kv_bytes_dense=answers.kv_bytes_dense,
        attention_flops=answers.attention_flops,
        attention_flops_dense=answers.attention_flops_dense,
        seconds=answers.seconds,
    )


def overall(scores: Sequence[Score]) -> Score:
    """One model under one setting over all its tasks: plain means of the shares, sums of the rest."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return Score(
        model=scores[0].model,
        task=ALL_TASKS,
        setting=scores[0].setting,
        questions=sum(score.questions for score in scores),
        accuracy=mean([score.accuracy for score in scores]),
        agreement=mean(agreements)
        if (agreements := [s.agreement for s in scores if s.agreement is not None])
        else None,
        kept_ratio=mean([score.kept_ratio for score in scores]),
        layer_ratios=[mean(layer) for layer in zip(*(score.layer_ratios for score in scores), strict=True)],
        kv_bytes=sum(score.kv_bytes for score in scores),
        kv_bytes_dense=sum(score.kv_bytes_dense for score in scores),
        attention_flops=sum(score.attention_flops for score in scores),
        attention_flops_dense=sum(score.attention_flops_dense for score in scores),
        seconds=sum(score.seconds for score in scores),
    )


def paired(scores: Sequence[Score], setting: str) -> list[tuple[Score, Score]]:
    """Per model: (dense, `setting`) of every task, then of all tasks together."""
    pairs = []
    for model in dict.fromkeys(score.model for score in scores):
        sides = [[s for s in scores if (s.model, s.setting) == (model, name)] for name in (DENSE, setting)]
        pairs += [*zip(*sides, strict=True), (overall(sides[0]), overall(sides[1]))]
    return pairs


def default_batch(device: "torch.device") -> int:
    """Questions answered at once: few on a CPU, where larger batches gain nothing, else what the memory allows."""
    import torch

    if device.type == "cpu":
        return 8
    if device.type != "cuda":
        return 32
    return max(8, min(256, torch.cuda.get_device_properties(device).total_memory // 2**28))
