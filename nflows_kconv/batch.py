"""Images and contexts with any batch shape, for the libraries that allow one."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from nflows_kconv import stencil


def flatten_batch(input: Tensor, dimensions: int) -> Tensor:
    """Views [..., C, H, W] as [B, C, H, W], for images of so many dimensions.

    Raises:
        ValueError: If the input has fewer than those and one for channels.
    """
    event = dimensions + 1
    if input.dim() < event:
        axes = ", ".join(("...", "C", *stencil.AXES[dimensions]))
        raise ValueError(f"input must have the dimensions [{axes}], got shape {tuple(input.shape)}")
    # Not -1 for B, which is ambiguous where an image has no pixels.
    return input.reshape(math.prod(input.shape[:-event]), *input.shape[-event:])


def flatten_contexts(context: Any) -> Any:
    """Views contexts [..., E] as [B, E]; what is none stays as it is, for the layer to refuse."""
    return context[None].flatten(0, -2) if isinstance(context, Tensor) and context.dim() > 0 else context
