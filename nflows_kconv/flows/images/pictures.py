"""Converts images for display."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import checks
from nflows_kconv.flows.images.arguments import at_least_float32, check_images


def to_uint8(images: Tensor) -> Tensor:
    """Clamps real numbers of any shape and dtype to 0..255 and rounds them; NaN becomes 0.

    Raises:
        TypeError: If `images` is not a dense real tensor, such as the pair that normflows' `sample` returns.
    """
    checks.real("images", images)
    return at_least_float32(images).nan_to_num(0).clamp(0, 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int) -> Tensor:
    """Arranges images row by row in one picture, with two black pixels around each.

    Args:
        images: [B, C, H, W], at least one, with values 0..255 (see `to_uint8`).
        columns: Images per row; the last row may have fewer.

    Returns:
        [C, rows (H + 2) + 2, columns (W + 2) + 2], uint8.

    Raises:
        TypeError: If `images` is not a real tensor, or `columns` is not an integer.
        ValueError: If `images` does not have four dimensions or is empty, or `columns` is below 1.
    """
    check_images(images)
    checks.positive("columns", columns)
    if not len(images):
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    rows = math.ceil(len(images) / columns)
    tiles = F.pad(to_uint8(images), (2, 0, 2, 0))
    blank = tiles.new_zeros(rows * columns - len(tiles), *tiles.shape[1:])
    tiles = torch.cat([tiles, blank]).unflatten(0, (rows, columns))
    return F.pad(tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, 2, 0, 2))
