"""Noise inside the cells of whole numbers, which turns the probability of an image into a density."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import checks
from nflows_kconv.images.arguments import at_least_float32, check_images, for_each_image
from nflows_kconv.images.preprocessing import Logit
from nflows_kconv.invertible import InvertibleModule


class UniformDequantization(InvertibleModule):
    """y = (x + u) / levels with u uniform in [0, 1).

    With D numbers in an image, log p(y) + log_abs_det is in expectation a lower bound on the probability of x:

        log P(x) = log E_u[p(y)] - D log levels >= E_u[log p(y)] - D log levels

    (Theis, van den Oord, Bethge 2016, arXiv 1511.01844, section 3.1; Ho et al. 2019, Flow++, arXiv 1902.00275, section
    3.1). The noise takes its values from the midpoints of a grid (2^13 in float32 for 256 levels), which no rounding
    carries out of the cell of x: 0 < y < 1, and `inverse` restores x.

    Args:
        levels: Number of values that x takes, 2 to 65536.

    Raises:
        TypeError: If `levels` is no integer.
        ValueError: If `levels` is out of its range.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = _check_levels(levels)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Adds noise.

        Args:
            input: x, [B, C, H, W], whole numbers 0..levels-1 in any real dtype.

        Returns:
            y, [B, C, H, W], in the dtype of x, but float32 for half precision and torch's default dtype for integers;
            and -D log levels, [B].

        Raises:
            TypeError: If x is no tensor of real numbers.
            ValueError: If x has another number of dimensions; and, on the CPU, if a value is no whole number in
                0..levels-1. Elsewhere that look would wait for the device, under torch.compile and torch.func it cannot
                be had: such values go through.
        """
        values = _whole_numbers(input, self.levels)
        return (values + _uniform_noise(values, self.levels)) / self.levels, -_log_levels(values, self.levels)

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Rounds down.

        Args:
            input: y, [B, C, H, W], of a floating-point dtype; a value outside [0, 1) counts as the nearest inside.

        Returns:
            x = floor(levels y), [B, C, H, W], in the dtype of y, float32 at least; and D log levels, [B].

        Raises:
            TypeError: If y is no tensor of floating-point numbers.
            ValueError: If y has another number of dimensions.
        """
        values, _ = _cell(input, self.levels)
        return values, _log_levels(values, self.levels)

    def extra_repr(self) -> str:
        """The constructor's argument."""
        return f"levels={self.levels}"


class VariationalDequantization(InvertibleModule):
    """y = (x + u) / levels with u drawn from a learned q(u | x), which tightens the bound.

        log P(x) >= E_q[log p(y) - log q(u | x)] - D log levels

    (Ho et al. 2019, Flow++, arXiv 1902.00275, section 3.1). q is a flow conditioned on x,

        u = sigmoid(f_x(logit(v))), v uniform in [0, 1)

    with f_x four affine couplings between the two colours of a checkerboard, whose networks see x. It starts close to
    uniform dequantisation and trains with the flow. Flow++ has normal noise in place of logit(v) and mixtures of
    logistics in its couplings.

    The couplings are bounded so that q(u | x) <= e^(8 D). Without that, q could shrink to less than float32 resolves,
    a point at which p(y) is free to grow: a bound that bounds nothing.

    Args:
        channels: C.
        levels: Number of values that x takes, 2 to 65536.
        hidden_channels: Width of the couplings' networks.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is out of its range.
    """

    def __init__(self, channels: int, *, levels: int = 256, hidden_channels: int = 32) -> None:
        super().__init__()
        checks.positive("channels", channels)
        checks.positive("hidden_channels", hidden_channels)
        self.channels, self.levels = channels, _check_levels(levels)
        self.logit = Logit(alpha=0)
        self.couplings = nn.ModuleList(_ConditionalCoupling(channels, hidden_channels, index % 2) for index in range(4))

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Adds noise drawn from q(u | x).

        Args:
            input: x, [B, C, H, W], whole numbers 0..levels-1 in any real dtype.

        Returns:
            y, [B, C, H, W], in the dtype that `UniformDequantization` gives; and -D log levels - log q(u | x), [B].

        Raises:
            TypeError: See `UniformDequantization.forward`.
            ValueError: See `UniformDequantization.forward`; and if x has not C channels.
        """
        values = _whole_numbers(input, self.levels)
        condition = self._condition(values)
        noise, total = self.logit(_uniform_noise(values, self.levels))
        for coupling in self.couplings:
            noise, log_abs_det = coupling(noise, condition)
            total = total + log_abs_det
        noise, log_abs_det = self.logit.inverse(noise)
        margin = _margin(values.dtype, self.levels)
        total = total + log_abs_det + for_each_image(values, math.log1p(-2 * margin) - math.log(self.levels))
        return (values + (margin + (1 - 2 * margin) * noise)) / self.levels, total

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Rounds down.

        Args:
            input: y, [B, C, H, W], of a floating-point dtype; a value outside [0, 1) counts as the nearest inside.

        Returns:
            x = floor(levels y), [B, C, H, W], in the dtype of y, float32 at least; and D log levels + log q(u | x),
            [B], with u = levels y - x.

        Raises:
            TypeError: See `UniformDequantization.inverse`.
            ValueError: See `UniformDequantization.inverse`; and if y has not C channels.
        """
        values, noise = _cell(input, self.levels)
        condition = self._condition(values)
        margin, eps = _margin(values.dtype, self.levels), torch.finfo(values.dtype).eps
        # What forward gives is between the margins; here anything may come.
        noise, total = self.logit(((noise - margin) / (1 - 2 * margin)).clamp(eps, 1 - eps))
        for coupling in reversed(self.couplings):
            noise, log_abs_det = coupling.inverse(noise, condition)  # type: ignore[operator]
            total = total + log_abs_det
        _, log_abs_det = self.logit.inverse(noise)
        return values, total + log_abs_det + for_each_image(values, math.log(self.levels) - math.log1p(-2 * margin))

    def _condition(self, values: Tensor) -> Tensor:
        """The whole numbers as the networks see them, between -1 and 1."""
        if values.shape[1] != self.channels:
            raise ValueError(f"images must have {self.channels} channels, got shape {tuple(values.shape)}")
        return values * (2 / (self.levels - 1)) - 1

    def extra_repr(self) -> str:
        """The levels; the couplings print themselves."""
        return f"levels={self.levels}"


class _ConditionalCoupling(nn.Module):
    """y_a = x_a, y_b = s(x_a, c) x_b + t(x_a, c) for the two colours a and b of a checkerboard and a condition c.

    With e^-2 < s < 1 and -2 < t < 2, sigmoid(y_b) has at least e^-4 of the slope of sigmoid(x_b): scales above 1 would
    flatten it without limit towards both ends.
    """

    def __init__(self, channels: int, hidden_channels: int, kept_color: int) -> None:
        super().__init__()
        self.kept_color = kept_color
        self.first = nn.Conv2d(2 * channels, hidden_channels, 3, padding=1)
        self.middle = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.last = nn.Conv2d(hidden_channels, 2 * channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(input, condition)
        return input * log_scale.exp() + shift, log_scale.sum((1, 2, 3))

    def inverse(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(input, condition)
        return (input - shift) * log_scale.neg().exp(), -log_scale.sum((1, 2, 3))

    def _scale_and_shift(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(size, device=input.device) for size in input.shape[2:])
        kept = (rows[:, None] + columns) % 2 == self.kept_color
        hidden = torch.cat([input * kept, condition], 1).to(self.first.weight.dtype)
        hidden = self.last(self.middle(self.first(hidden).relu()).relu())
        raw_scale, raw_shift = hidden.to(input.dtype).chunk(2, 1)
        # At the start the last layer gives 0, and s is 0.96.
        return -2 * torch.sigmoid(raw_scale - 4) * ~kept, 2 * torch.tanh(raw_shift / 2) * ~kept


def _whole_numbers(input: Tensor, levels: int) -> Tensor:
    """The images as floating-point numbers, checked where looking at them costs nothing."""
    check_images(input)
    values = at_least_float32(input)
    if checks.values_are_at_hand(values):
        wrong = values[~((values >= 0) & (values < levels) & (values == values.floor()))]
        if len(wrong):
            hint = f"; images in 0..1 times {levels - 1}, rounded, are such" if 0 < wrong[0] < 1 else ""
            raise ValueError(f"images must hold whole numbers in 0..{levels - 1}, got {wrong[0].item()}{hint}")
    return values


def _cell(input: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The x whose cell each y is in, and its place in the cell, which is outside [0, 1) where y is."""
    check_images(input)
    if not input.is_floating_point():
        raise TypeError(f"images in [0, 1) must be of floating-point numbers, got {input.dtype}")
    position = at_least_float32(input) * levels
    values = position.floor().clamp(0, levels - 1)
    return values, position - values


def _uniform_noise(values: Tensor, levels: int) -> Tensor:
    # torch.rand_like alone goes up to 1 - 2^-24, and 255 with that added rounds to 256.
    margin = _margin(values.dtype, levels)
    return torch.rand_like(values).div(2 * margin).floor() * (2 * margin) + margin


def _margin(dtype: torch.dtype, levels: int) -> float:
    """A power of 2 above the rounding error of levels ((x + u) / levels) for every x below `levels`."""
    return 2 * torch.finfo(dtype).eps * 2 ** (levels - 1).bit_length()


def _log_levels(values: Tensor, levels: int) -> Tensor:
    return for_each_image(values, math.log(levels))


def _check_levels(levels: int) -> int:
    checks.positive("levels", levels)
    if not 2 <= levels <= 65536:
        raise ValueError(f"levels must be between 2 and 65536, got {levels}")
    return int(levels)
