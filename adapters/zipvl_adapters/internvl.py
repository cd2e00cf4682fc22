"""InternVL: square tiles in a grid and, when there are several, a thumbnail of the whole picture behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zipvl_adapters.boxes import grid_boxes, nowhere

MODEL_TYPES = ("internvl",)


def image_boxes(
    config: Any, inputs: Mapping[str, Any], is_image: Tensor, image_sizes: Sequence[tuple[int, int]] | None
) -> list[Tensor]:
    """Boxes `[tokens, 4]` of each picture. Without `image_sizes` tiles whose grid is not certain have no place."""
    side = math.isqrt(tokens_of_a_tile(config))
    whole = grid_boxes(side, side)
    pictures = []
    for i, length in enumerate(_runs(is_image)):
        tiles = length // len(whole)
        if tiles * len(whole) != length:
            raise ValueError(f"inputs: picture {i} has {length} visual tokens; expected a multiple of {len(whole)}")
        if tiles == 1:
            pictures.append(whole)
            continue
        grid = _grid(tiles - 1, image_sizes[i] if image_sizes is not None else None)
        pictures.append(torch.cat([_tile_boxes(tiles - 1, grid, side), whole]))
    return pictures


def tokens_of_a_tile(config: Any) -> int:
    """Visual tokens that one tile becomes."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    size, patch = (x if isinstance(x, int) else x[0] for x in (size, patch))
    return int(size // patch * config.downsample_ratio) ** 2


def _runs(is_image: Tensor) -> list[int]:
    """Lengths of the runs of visual tokens: each picture is one, between its begin and end tokens."""
    lengths = []
    for row in is_image.int():
        edges = torch.diff(row, prepend=row.new_zeros(1), append=row.new_zeros(1))
        starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
        lengths += (ends - starts).tolist()
    return lengths


def _grid(tiles: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Columns and rows of the tiles: the arrangement whose shape is nearest to the picture's."""
    shapes = [(columns, tiles // columns) for columns in range(1, tiles + 1) if tiles % columns == 0]
    if image_size is None:
        return shapes[0] if len(shapes) == 1 else None
    height, width = image_size
    return min(shapes, key=lambda shape: abs(width / height - shape[0] / shape[1]))


def _tile_boxes(tiles: int, grid: tuple[int, int] | None, side: int) -> Tensor:
    if grid is None:
        return nowhere(tiles * side * side)
    columns, rows = grid
    windows = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    return torch.cat([grid_boxes(side, side, window) for window in windows])
