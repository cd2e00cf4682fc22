"""Which models are supported; what differs between the families of vision-language models stands in their own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from zipvl_adapters import internvl, llava, qwen2_vl

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")

Boxes = Callable[[Any, Mapping[str, Any], Tensor, Sequence[tuple[int, int]] | None], list[Tensor]]
IMAGE_BOXES: dict[str, Boxes] = {
    model_type: family.image_boxes for family in (llava, internvl, qwen2_vl) for model_type in family.MODEL_TYPES
}


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's configuration; raises ValueError where its attention is not one that we can replace."""
    if config.is_encoder_decoder:
        raise ValueError(f"config: encoder-decoder models are not supported, got {config.model_type!r}")
    text = config.get_text_config(decoder=True)
    if text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"config: text model {text.model_type!r} is not supported; expected one of {', '.join(TEXT_MODELS)}"
        )
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None) if not kinds else None
    odd = sorted({kind for kind in kinds if kind != "full_attention"})
    if odd or window is not None:
        found = ", ".join(odd) if odd else f"sliding_window={window}"
        raise ValueError(
            f"config: {text.model_type!r} has layers without full attention ({found}), which are not supported; "
            "use a model whose layers all attend to the whole context"
        )
    return text


def check_model(model: nn.Module) -> PreTrainedConfig:
    """The text model's configuration of a supported model; raises TypeError or ValueError for any other."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config = model.config
    if config.model_type not in (*IMAGE_BOXES, *TEXT_MODELS):
        raise ValueError(
            f"model: {type(model).__name__} ({config.model_type!r}) is not supported; "
            f"expected one of {', '.join((*IMAGE_BOXES, *TEXT_MODELS))}"
        )
    return text_config_of(config)


def visual_boxes(
    model_config: PreTrainedConfig,
    inputs: Mapping[str, Any],
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Where the visual tokens of each sequence stand, in the prompt and in their picture.

    model_config: of a vision-language model. inputs: what its processor made for `generate()`.
    image_sizes: (height, width) of each picture, in order; only InternVL with more than one tile a picture needs it.

    Returns for each sequence `positions` int64 `[V]` into the padded prompt and `boxes` float32 `[V, 4]`: x0, y0, x1,
    y1 as shares of the picture's width and height, NaN for tokens that stand for no place (newlines, class tokens).
    Raises ValueError for a model without pictures, or when the prompt does not fit the pictures.
    """
    family = IMAGE_BOXES.get(model_config.model_type)
    if family is None:
        raise ValueError(f"model_config: {model_config.model_type!r} is not one of {', '.join(IMAGE_BOXES)}")
    is_image = inputs["input_ids"].cpu() == image_token_id(model_config)
    images = family(model_config, inputs, is_image, image_sizes)
    boxes = torch.cat(images) if images else torch.zeros(0, 4)
    if len(boxes) != int(is_image.sum()):
        raise ValueError(
            f"inputs: the pictures make {len(boxes)} visual tokens and the prompts hold {int(is_image.sum())}"
        )
    parts = boxes.split(is_image.sum(1).tolist())  # type: ignore[no-untyped-call]
    return [(row.nonzero()[:, 0], part) for row, part in zip(is_image, parts, strict=True)]


def image_token_id(config: Any) -> int:
    """The token that stands for a piece of a picture."""
    found = getattr(config, "image_token_id", None)
    return int(found if found is not None else config.image_token_index)
