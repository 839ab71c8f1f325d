"""Computes in float64, on the CPU for devices without it, such as Apple's."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float64(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64, on the CPU if its device has no float64."""
    return to_device_with_float64(tensor).to(torch.float64)


def to_device_with_float64(tensor: Tensor) -> Tensor:
    """Returns the tensor, or its copy on the CPU where its device has no float64."""
    try:
        torch.empty(0, dtype=torch.float64, device=tensor.device)
    except (TypeError, RuntimeError):
        return tensor.cpu()
    return tensor
