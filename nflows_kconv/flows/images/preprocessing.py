"""Maps [0, 1] to the real numbers that a flow takes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nflows_kconv.flows.images.arguments import at_least_float32, check_numbers, for_each_image
from nflows_kconv.invertible import InvertibleModule


class Logit(InvertibleModule):
    """y = logit(p) with p = alpha + (1 - 2 alpha) x, which maps [0, 1] to the real numbers.

        log |det dy/dx| = sum log(1 - 2 alpha) - log p - log(1 - p)

    (Dinh, Sohl-Dickstein, Bengio 2017, Real NVP, arXiv 1605.08803, section 4.1).

    Both directions keep the floating-point dtype of their input, [B, ...], return a log-determinant, [B], and compute
    in float32 at least. `forward` returns NaN where p is outside [0, 1]. `inverse` returns values at most alpha / (1 -
    2 alpha) outside [0, 1].

    Args:
        alpha: Distance of p from 0 and 1, at least 0 and below 1/2. With alpha = 0, x = 0 and 1 become infinite.

    Raises:
        TypeError: In a call, if the input is not a tensor of floating-point numbers.
        ValueError: If `alpha` is out of its range; in a call, if there is no batch dimension.
    """

    def __init__(self, alpha: float = 1e-6) -> None:
        super().__init__()
        if not isinstance(alpha, Real) or not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must be at least 0 and below 1/2, got {alpha}")
        self.alpha: float = alpha

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_numbers(input)
        values = at_least_float32(input)
        # From 1 - x, which is exact near x = 1, where 1 - p would lose digits.
        log_p, log_1_minus_p = ((self.alpha + (1 - 2 * self.alpha) * part).log() for part in (values, 1 - values))
        return (log_p - log_1_minus_p).to(input.dtype), self._log_abs_det(log_p, log_1_minus_p)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_numbers(input)
        values = at_least_float32(input)
        output = (values.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        return output.to(input.dtype), -self._log_abs_det(F.logsigmoid(values), F.logsigmoid(-values))

    def _log_abs_det(self, log_p: Tensor, log_1_minus_p: Tensor) -> Tensor:
        of_each_number = math.log1p(-2 * self.alpha) - log_p - log_1_minus_p
        return of_each_number.reshape(log_p.shape[0], log_p.shape[1:].numel()).sum(1)

    def extra_repr(self) -> str:
        """Returns the constructor's argument."""
        return f"alpha={self.alpha}"


class Affine(InvertibleModule):
    """y = scale x + shift, log |det dy/dx| = D log |scale| with D numbers in an image.

    The default centres [0, 1], as Glow does (Kingma, Dhariwal 2018, arXiv 1807.03039). Both directions keep the
    floating-point dtype of their input, [B, ...], return a log-determinant, [B], and compute in float32 at least.

    Args:
        scale: A finite number other than 0.
        shift: A finite number.

    Raises:
        TypeError: In a call, if the input is not a tensor of floating-point numbers.
        ValueError: If `scale` is 0, or a number is not finite; in a call, if there is no batch dimension.
    """

    def __init__(self, scale: float = 1.0, shift: float = -0.5) -> None:
        super().__init__()
        if scale == 0 or not (math.isfinite(scale) and math.isfinite(shift)):
            raise ValueError(f"scale and shift must be finite and scale not 0, got scale {scale} and shift {shift}")
        self.scale, self.shift = scale, shift

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_numbers(input)
        return (at_least_float32(input) * self.scale + self.shift).to(input.dtype), self._log_abs_det(input)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        check_numbers(input)
        return ((at_least_float32(input) - self.shift) / self.scale).to(input.dtype), -self._log_abs_det(input)

    def _log_abs_det(self, input: Tensor) -> Tensor:
        return for_each_image(input, math.log(abs(self.scale)))

    def extra_repr(self) -> str:
        """Returns the constructor's arguments."""
        return f"scale={self.scale}, shift={self.shift}"
