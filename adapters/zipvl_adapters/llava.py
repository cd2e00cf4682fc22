"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a square tower; the newer two add tiles and newline tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from zipvl_adapters.boxes import grid_boxes, nowhere

MODEL_TYPES = ("llava", "llava_next", "llava_onevision")


def image_boxes(
    config: Any, inputs: Mapping[str, Any], is_image: Tensor, image_sizes: Sequence[tuple[int, int]] | None
) -> list[Tensor]:
    """Boxes `[tokens, 4]` of each picture. LLaVA's are of the square that its processor cuts out of the middle."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    base = grid_boxes(side, side)
    if config.model_type != "llava_onevision" and config.vision_feature_select_strategy == "full":
        base = torch.cat([nowhere(1), base])  # the tower's class token
    if config.model_type == "llava":
        return [base] * (int(is_image.sum()) // len(base))
    sizes = image_sizes if image_sizes is not None else inputs["image_sizes"].tolist()
    return [torch.cat([base, _tile_boxes(config, side, height, width)]) for height, width in sizes]


def _tile_boxes(config: Any, side: int, height: int, width: int) -> Tensor:
    """The tiles of one picture as one grid, without the padding round the picture, each row with a newline token."""
    tile = config.vision_config.image_size
    best_height, best_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = best_height // tile * side, best_width // tile * side
    # The picture fills the canvas in one direction and is centred in the other, where whole rows of padding go.
    if width / height > columns / rows:
        content = round(height * (columns / width), 7)
        cut, along = (rows - int(content)) // 2, rows
    else:
        content = round(width * (rows / height), 7)
        cut, along = (columns - int(content)) // 2, columns
    border = (along - content) / 2  # padding on each side, in tokens
    low, high = (cut - border) / content, (along - cut - border) / content
    if along == rows and width / height > columns / rows:
        rows, window = rows - 2 * cut, (0.0, low, 1.0, high)
    else:
        columns, window = columns - 2 * cut, (low, 0.0, high, 1.0)
    if config.model_type == "llava_onevision":
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side**2))
        if ratio > 1.1:  # more tokens than allowed: the whole grid is resampled to a coarser one
            rows, columns = int(rows // ratio), int(columns // ratio)
    boxes = grid_boxes(rows, columns, window).view(rows, columns, 4)
    return torch.cat([boxes, nowhere(rows)[:, None]], 1).reshape(-1, 4)
