"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any resolution, one token for each square of merged patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zipvl_adapters.boxes import grid_boxes

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def image_boxes(
    config: Any, inputs: Mapping[str, Any], is_image: Tensor, image_sizes: Sequence[tuple[int, int]] | None
) -> list[Tensor]:
    """Boxes `[tokens, 4]` of each picture."""
    if "image_grid_thw" not in inputs:
        return []
    merge = config.vision_config.spatial_merge_size
    return [
        grid_boxes(height // merge, width // merge).repeat(frames, 1)
        for frames, height, width in inputs["image_grid_thw"].tolist()
    ]
