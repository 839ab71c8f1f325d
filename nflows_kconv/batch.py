"""Images and contexts with any batch shape, for libraries that allow it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nflows_kconv import checks, stencil


def flatten_batch(input: Tensor, dimensions: int) -> Tensor:
    """Views [..., C, H, W] as [B, C, H, W], for images with this number of dimensions.

    Raises:
        TypeError: If the input is not a dense tensor.
        ValueError: If the input has fewer dimensions than an image with channels.
    """
    checks.dense("input", input)
    event = dimensions + 1
    if input.dim() < event:
        axes = ", ".join(("...", "C", *stencil.AXES[dimensions]))
        raise ValueError(f"input must have the dimensions [{axes}], got shape {tuple(input.shape)}")
    # Not -1 for B, which is ambiguous for images without pixels.
    return input.reshape(math.prod(input.shape[:-event]), *input.shape[-event:])


def flatten_contexts(context: Any) -> Any:
    """Views contexts [..., E] as [B, E]; returns anything else unchanged, for the layer to refuse."""
    views = isinstance(context, Tensor) and context.dim() > 0 and context.layout == torch.strided
    return context[None].flatten(0, -2) if views else context
