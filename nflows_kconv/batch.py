"""Images with any batch shape, for the libraries that allow one."""

from __future__ import annotations

import math

from torch import Tensor


def flatten_batch(input: Tensor) -> Tensor:
    """[..., C, H, W] as [B, C, H, W].

    Raises:
        ValueError: If the input has fewer than three dimensions.
    """
    if input.dim() < 3:
        raise ValueError(f"input must have the dimensions [..., C, H, W], got shape {tuple(input.shape)}")
    # Not -1 for B, which is ambiguous where an image has no pixels.
    return input.reshape(math.prod(input.shape[:-3]), *input.shape[-3:])
