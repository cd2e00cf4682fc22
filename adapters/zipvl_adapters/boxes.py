"""Boxes of a regular grid over a picture."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_boxes(rows: int, columns: int, window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """`[rows * columns, 4]` float32, row by row: x0, y0, x1, y1 of a grid that fills `window`, cut to [0, 1]."""
    x0, y0, x1, y1 = window
    x = torch.linspace(x0, x1, columns + 1)
    y = torch.linspace(y0, y1, rows + 1)
    left, right = x[:-1].expand(rows, -1), x[1:].expand(rows, -1)
    top, bottom = y[:-1, None].expand(-1, columns), y[1:, None].expand(-1, columns)
    return torch.stack([left, top, right, bottom], -1).reshape(-1, 4).clamp(0, 1)


def nowhere(tokens: int) -> Tensor:
    """Boxes of tokens that stand for no place, `[tokens, 4]` of NaN."""
    return torch.full((tokens, 4), torch.nan)
