"""Adds noise within the cells of whole numbers, which turns the probability of an image into a density."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from nflows_kconv import checks
from nflows_kconv.flows.images.arguments import at_least_float32, check_images, for_each_image
from nflows_kconv.invertible import InvertibleModule
from nflows_kconv.torch_internals import assert_async, is_under_torch_func


class UniformDequantization(InvertibleModule):
    """y = (x + u) / levels with u uniform in [0, 1).

    With D numbers in an image, log p(y) + log_abs_det is in expectation a lower bound on the probability of x:

        log P(x) = log E_u[p(y)] - D log levels >= E_u[log p(y)] - D log levels

    (Theis, van den Oord, Bethge 2016, arXiv 1511.01844, section 3.1; Ho et al. 2019, Flow++, arXiv 1902.00275, section
    3.1). The noise takes its values from the midpoints of a grid (2^13 in float32 for 256 levels), so no rounding moves
    it out of the cell of x: 0 < y < 1, and `inverse` restores x.

    `forward` takes x, [B, C, H, W], whole numbers 0..levels-1 in any real dtype. It returns y in the dtype of x, but in
    float32 for half precision and torch's default dtype for integers; and log_abs_det = -D log levels, [B].

    `inverse` takes y, [B, C, H, W], of a floating-point dtype, and clamps it to [0, 1). It returns x = floor(levels y)
    in the dtype of y, float32 at least; and D log levels, [B].

    On a CPU, values are checked in every batch. On other devices they are checked only in a module's first batch,
    because each check synchronizes. Under torch.compile and torch.export, on a CPU or a CUDA device, an assertion in
    the compiled code checks them and raises a RuntimeError, after which the process can no longer use a CUDA device.
    Under torch.func they are not checked.

    Args:
        levels: Number of values that x takes, 2 to 65536.

    Raises:
        TypeError: If `levels` is not an integer; in a call, if x is not a real tensor or y not a floating-point tensor.
        ValueError: If `levels` is out of range; in a call, if the images do not have four dimensions, or a value of x
            is not a whole number in 0..levels-1.

    Warns:
        UserWarning: If x is floating-point and a batch holds only 0 and 1, as images scaled to 0..1 may.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = check_levels("levels", levels)
        # Only avoids repeated checks. A list, so that replicas of DataParallel share it.
        self._devices_looked_at: list[torch.device] = []

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        values = self._whole_numbers(input)
        return (values + _uniform_noise(values, self.levels)) / self.levels, -_log_levels(values, self.levels)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_images(input)
        if not input.is_floating_point():
            raise TypeError(f"images in [0, 1) must be floating-point, got {input.dtype}")
        values = (at_least_float32(input) * self.levels).floor().clamp(0, self.levels - 1)
        return values, _log_levels(values, self.levels)

    def middle(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Does `forward` with u = 1/2, so equal images have equal results."""
        values = self._whole_numbers(input)
        return (values + 0.5) / self.levels, -_log_levels(values, self.levels)

    def with_noise(self, input: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Does `forward` with this u in [0, 1), of the shape of x, moved to the midpoint of its grid cell."""
        values = self._whole_numbers(input)
        return (values + _on_grid(noise.to(values.dtype), self.levels)) / self.levels, -_log_levels(values, self.levels)

    def _whole_numbers(self, input: Tensor) -> Tensor:
        """Returns the images as checked floating-point numbers."""
        check_images(input)
        values = at_least_float32(input)
        if not _holds_nothing_else(input.dtype, self.levels):
            if torch.compiler.is_compiling():
                # vmap and devices such as MPS do not support assertions.
                if values.device.type in ("cpu", "cuda") and not is_under_torch_func():
                    assert_async(_is_allowed(values, self.levels).all(), _expected(self.levels))
            elif checks.can_inspect_values(values):
                _look(values, self.levels, input.is_floating_point())
            elif self._may_wait(values):
                _look(values, self.levels, input.is_floating_point())
                self._devices_looked_at.append(values.device)
        return values

    def _may_wait(self, values: Tensor) -> bool:
        """Returns True once, to synchronize and check: a failed assertion would make the device unusable."""
        if not checks.is_plain(values) or values.device.type == "meta" or values.device in self._devices_looked_at:
            return False
        return not (values.is_cuda and torch.cuda.is_current_stream_capturing())

    def extra_repr(self) -> str:
        """Returns the levels."""
        return f"levels={self.levels}"


def _holds_nothing_else(dtype: torch.dtype, levels: int) -> bool:
    """Returns whether a dtype only has the values 0..levels-1."""
    if dtype.is_floating_point:
        return False
    return dtype == torch.bool or (torch.iinfo(dtype).min == 0 and torch.iinfo(dtype).max < levels)


def _is_allowed(values: Tensor, levels: int) -> Tensor:
    return (values >= 0) & (values < levels) & (values == values.floor())


def _expected(levels: int) -> str:
    return f"images must hold whole numbers in 0..{levels - 1}"


def _look(values: Tensor, levels: int, is_floating_point: bool) -> None:
    wrong = values[~_is_allowed(values, levels)]
    if wrong.numel():
        hint = f"; multiply images in 0..1 by {levels - 1} and round" if 0 < wrong[0] < 1 else ""
        raise ValueError(f"{_expected(levels)}, got {wrong[0].item()}{hint}")
    if is_floating_point and levels > 2 and values.numel() and values.max() == 1:
        warnings.warn(
            f"images hold only 0 and 1 out of 0..{levels - 1}; if they are scaled to 0..1, multiply by {levels - 1}",
            stacklevel=2,
        )


def _uniform_noise(values: Tensor, levels: int) -> Tensor:
    return _on_grid(torch.rand_like(values), levels)


def _on_grid(noise: Tensor, levels: int) -> Tensor:
    # torch.rand goes up to 1 - 2^-24, and 255 plus that rounds to 256. The margin is a power of 2 above the rounding
    # error of levels ((x + u) / levels) for every x below `levels`.
    margin = 2 * torch.finfo(noise.dtype).eps * 2 ** (levels - 1).bit_length()
    return noise.div(2 * margin).floor() * (2 * margin) + margin


def _log_levels(values: Tensor, levels: int) -> Tensor:
    return for_each_image(values, math.log(levels))


def check_levels(name: str, levels: int) -> int:
    """Returns the number of levels as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is not in 2..65536.
    """
    if not 2 <= checks.positive(name, levels) <= 65536:
        raise ValueError(f"{name} must be between 2 and 65536, got {levels}")
    return int(levels)
