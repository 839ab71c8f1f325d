"""Computing in float64, on the CPU where a device has none, as those of Apple."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float64(tensor: Tensor) -> Tensor:
    """Widens a tensor, once it is where that can be done."""
    return to_device_with_float64(tensor).to(torch.float64)


def to_device_with_float64(tensor: Tensor) -> Tensor:
    """Returns the tensor, or its copy on the CPU where its device has no float64."""
    try:
        torch.empty(0, dtype=torch.float64, device=tensor.device)
    except (TypeError, RuntimeError):
        return tensor.cpu()
    return tensor
