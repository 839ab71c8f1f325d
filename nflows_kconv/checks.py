"""Checks of arguments that several modules make."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack


def positive(name: str, value: int) -> int:
    """The value as an int.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is not at least 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of numbers, outside torch.compile and torch.func, and no subclass such as a fake one."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and peek_interpreter_stack() is None
    )


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values costs nothing and is allowed.

    That is on the CPU, for tensors that are plain. Elsewhere it would wait for the device, or fail.
    """
    return tensor.device.type == "cpu" and is_plain(tensor)
