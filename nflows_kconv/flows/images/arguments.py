"""Argument checks of the functions on images."""

from __future__ import annotations

import torch
from torch import Tensor

from nflows_kconv import checks


def check_images(input: Tensor) -> None:
    """Raises a TypeError or a ValueError unless the input is a real tensor [B, C, H, W]."""
    checks.real("images", input)
    if input.dim() != 4:
        raise ValueError(f"images must have the 4 dimensions [B, C, H, W], got shape {tuple(input.shape)}")


def check_numbers(input: Tensor) -> None:
    """Raises a TypeError or a ValueError unless the input is a floating-point tensor [B, ...]."""
    checks.floating_point("input", input)
    if input.dim() == 0:
        raise ValueError("input must have the dimensions [B, ...], got shape ()")


def at_least_float32(input: Tensor) -> Tensor:
    """Converts half precision to float32 and integers to torch's default dtype; keeps float32 and float64."""
    if not input.is_floating_point():
        return input.to(torch.get_default_dtype())
    return input.to(torch.promote_types(input.dtype, torch.float32))


def for_each_image(input: Tensor, of_each_number: float) -> Tensor:
    """Returns a constant summed over each image, [B], in float32 at least."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_full(input.shape[:1], input.shape[1:].numel() * of_each_number, dtype=dtype)
