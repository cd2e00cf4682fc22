"""Asking a model questions about pictures, dense or with ZipVL, with time and statistics."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zipvl_adapters.cli.checks import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from zipvl_adapters import Stats, ZipVLPolicy
    from zipvl_adapters.cli.assets import Question

# The longest held-out answer has a handful of tokens; an answer that has not ended by then is wrong anyway.
ANSWER_TOKENS = 12


@dataclass
class Answers:
    """What one model answered to a list of questions under one policy; `None` is the dense model.

    `ratios` holds per question the share of tokens kept in every layer, in [0, 1], and is empty for the dense model,
    as the sums are then 0. `seconds` is the time inside `generate`, vision tower included.
    """

    texts: list[str] = field(default_factory=list)
    ratios: list[tuple[float, ...]] = field(default_factory=list)
    seconds: float = 0.0
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    attention_flops: int = 0
    attention_flops_dense: int = 0

    def add(self, texts: list[str], seconds: float, stats: "Stats | None") -> None:
        """Append one batch."""
        self.texts += texts
        self.seconds += seconds
        if stats is not None:
            self.ratios += zip(*(layer.ratio for layer in stats.layers), strict=True)
            self.kv_bytes += stats.kv_bytes
            self.kv_bytes_dense += stats.kv_bytes_dense
            self.attention_flops += stats.attention_flops
            self.attention_flops_dense += stats.attention_flops_dense

    def accuracy(self, questions: "Sequence[Question]") -> float:
        """Share of the questions answered exactly, in [0, 1]."""
        right = [text == question.answer for text, question in zip(self.texts, questions, strict=True)]
        return sum(right) / len(right)

    def agreement(self, other: "Answers") -> float:
        """Share of the questions to which `other` gave the same answer, in [0, 1]."""
        same = [mine == theirs for mine, theirs in zip(self.texts, other.texts, strict=True)]
        return sum(same) / len(same)

    @property
    def layer_ratios(self) -> list[float]:
        """Share of tokens kept in each layer, mean over the questions."""
        return [sum(layer) / len(layer) for layer in zip(*self.ratios, strict=True)]

    @property
    def kept_ratio(self) -> float:
        """Share of tokens kept, mean over layers and questions; 1 for the dense model."""
        return sum(self.layer_ratios) / len(self.layer_ratios) if self.ratios else 1.0


def open_model(
    path_or_id: str, *, device: "torch.device", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, Any]":
    """Load a model and its processor without the warnings of transformers; downloads keep their progress bars."""
    import huggingface_hub.utils
    from transformers.utils import logging

    from zipvl_adapters import LoadError, load

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub: Any = huggingface_hub.utils  # without types
    hub.logging.set_verbosity_error()
    hub.enable_progress_bars()
    try:
        model, processor = load(path_or_id, device=device, dtype=dtype)
    except LoadError as error:
        raise UserError(str(error)) from error
    return model, processor


def chat_prompt(processor: Any, question: str, *, picture: bool) -> str:
    """The question as the model's chat template puts it, or as it stands for a model without a template."""
    image_token = getattr(processor, "image_token", "")
    if getattr(processor, "chat_template", None) is None:
        return f"{image_token}\n{question}" if picture else question
    text = [{"type": "text", "text": question}]
    # Templates of text-only models take a string, those of vision-language models take a list of parts.
    content: Any = ([{"type": "image"}] if picture else []) + text if hasattr(processor, "tokenizer") else question
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    return prompt


def encode(
    processor: Any, model: "PreTrainedModel", prompts: list[str], pictures: "list[Image] | None"
) -> "dict[str, torch.Tensor]":
    """Inputs for `model.generate`, left-padded, on the model's device and in its dtype."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    bos = tokenizer.bos_token
    arguments = {
        "text": prompts,
        "padding": len(prompts) > 1,
        "return_tensors": "pt",
        # Many templates write the begin token themselves; the tokenizer must not add a second one.
        "add_special_tokens": bos is not None and not prompts[0].startswith(bos),
    }
    if pictures is not None:
        arguments["images"] = pictures
    encoded = processor(**arguments)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
    }


def answer(
    processor: Any,
    model: "PreTrainedModel",
    inputs: "dict[str, torch.Tensor]",
    policy: "ZipVLPolicy | None",
    max_new_tokens: int = ANSWER_TOKENS,
) -> "tuple[list[str], float, Stats | None]":
    """Greedy answers of one batch, the seconds they took, and ZipVL's statistics (None for the dense model)."""
    import torch

    from zipvl_adapters import attach

    generate: Any = model.generate
    with contextlib.ExitStack() as stack:
        session = None if policy is None else stack.enter_context(attach(model, policy))
        _synchronize(model.device)
        begin = time.perf_counter()
        with torch.inference_mode():
            tokens = generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        _synchronize(model.device)
        seconds = time.perf_counter() - begin
        stats = None if session is None else session.stats
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts], seconds, stats


def encode_all(
    processor: Any, model: "PreTrainedModel", questions: "Sequence[Question]", batch_size: int
) -> "list[dict[str, torch.Tensor]]":
    """The questions as batches of inputs, on the model's device: encoding a picture costs more than answering once."""
    batches = (questions[start : start + batch_size] for start in range(0, len(questions), batch_size))
    return [
        encode(
            processor,
            model,
            [chat_prompt(processor, question.question, picture=True) for question in batch],
            [read_picture(question) for question in batch],
        )
        for batch in batches
    ]


def ask(
    processor: Any,
    model: "PreTrainedModel",
    batches: "Sequence[dict[str, torch.Tensor]]",
    policy: "ZipVLPolicy | None",
    advance: Callable[[int], None],
) -> Answers:
    """Answer encoded questions under a policy; `advance` hears how many answers each batch gave."""
    given = Answers()
    for inputs in batches:
        given.add(*answer(processor, model, inputs, policy))
        advance(len(inputs["input_ids"]))
    return given


def read_picture(question: "Question") -> "Image":
    """The picture of a held-out question as RGB."""
    from PIL import Image

    with Image.open(question.picture) as image:
        return image.convert("RGB")


def _synchronize(device: "torch.device") -> None:
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
