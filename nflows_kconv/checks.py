"""Argument checks shared by several modules."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from nflows_kconv.torch_internals import is_traced, is_under_torch_func


def positive(name: str, value: int) -> int:
    """Returns the value as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below 1 or above sys.maxsize.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > sys.maxsize:
        raise ValueError(f"{name} must be at most {sys.maxsize}, got {value}")
    return int(value)


def per_axis(name: str, value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Returns one int per axis, from one for all axes or one per axis.

    Raises:
        TypeError: If a value is not an integer.
        ValueError: If the number of values is wrong, or a value is below 1.
    """
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * dimensions
    if len(values) != dimensions:
        axes = "axis" if dimensions == 1 else f"axis, {dimensions} in all"
        raise ValueError(f"{name} must be an integer or one per {axes}, got {value!r}")
    return tuple(positive(name, each) for each in values)


def shape(name: str, value: Sequence[int], forms: Mapping[int, str] | None = None) -> None:
    """Raises an error unless the value is a sequence of sizes of at least 1, as many as one of the forms has.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If there are not as many, or a size is below 1.
    """
    expected = f"{name} must be {' or '.join(forms.values()) if forms else 'a sequence of sizes'}, got {value!r}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(expected)
    if forms and len(value) not in forms:
        raise ValueError(expected)
    for size in value:
        positive(f"sizes in {name}", size)


def temperature(value: float) -> float:
    """Returns the value as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative or not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"temperature must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {value}")
    return float(value)


def dense(name: str, value: Tensor) -> None:
    """Raises a TypeError unless the value is a tensor, and not sparse, nested or quantized."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "a nested tensor" if value.is_nested else value.dtype if value.is_quantized else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def real(name: str, value: Tensor) -> None:
    """Raises a TypeError unless the value is a dense tensor of real numbers or integers."""
    dense(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")


def floating_point(name: str, value: Tensor) -> None:
    """Raises a TypeError unless the value is a dense tensor of a floating-point dtype."""
    dense(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def has_rows(tensor: Tensor, count: int | None) -> bool:
    """Returns whether a tensor has this many rows (None: any number)."""
    # Not `count in (None, rows)`, which the compiler takes for false if only one of them is symbolic.
    return tensor.dim() > 0 and (count is None or tensor.shape[0] == count)


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is not traced, not under torch.func and not of a subclass."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not is_under_torch_func() and not is_traced()


def can_inspect_values(tensor: Tensor) -> bool:
    """Returns whether reading a tensor's values is allowed and free.

    That holds for plain tensors on the CPU. Reading others would synchronize the device, or fail.
    """
    return tensor.device.type == "cpu" and is_plain(tensor)
