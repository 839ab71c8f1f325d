"""The layer as a module that belongs to no library; the adapters give it their library's directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nflows_kconv import checks, functional, geometry


class InvertibleConv2d(nn.Module):
    """An invertible k x k convolution with an exact inverse and an exact log-determinant.

    Each of the G channel groups is padded towards one corner of the image and convolved; only the upper triangle of the
    *pivot*, the tap that reads the pixel itself, is masked. In raster order the Jacobian is triangular, so that

        log |det dy/dx| = H W sum_o log |W[o, o, pivot]|

    and the inverse is a back-substitution. FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), section 3;
    gradients through the inverse as in Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).

    The weight is computed from the parameters at each use: `raw_weight` where the weight is free, zero where it is
    masked, and the diagonal. Whatever happens to the parameters (weight decay, loading, in-place steps), the mask
    holds. The layer starts close to the identity.

    Args:
        num_channels: C, a multiple of the number of corners.
        kernel_size: k, or (kh, kw); any size from 1 on.
        corners: One of "TL", "TR", "BL", "BR" for each group of channels, or a single one for one convolution over all
            channels. Repeats are allowed.
        diagonal: "unit" fixes the pivot's diagonal to 1, as in the paper (log-determinant 0); "learned" makes it
            exp(log_diagonal), always positive.
        bias: Whether to add a learned constant to each channel.

    Attributes:
        raw_weight: Parameter, [C, C/G, kh, kw].
        log_diagonal: Parameter, [C], or None.
        bias: Parameter, [C], or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the channels do not divide into the groups.
    """

    raw_weight: nn.Parameter
    log_diagonal: nn.Parameter | None
    bias: nn.Parameter | None
    _free: Tensor
    _unit: Tensor

    def __init__(
        self,
        num_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        corners: str | Sequence[str] = geometry.CORNERS,
        diagonal: Literal["unit", "learned"] = "unit",
        bias: bool = False,
    ) -> None:
        super().__init__()
        groups = geometry.parse_corners(corners)
        self.num_channels = num_channels = checks.positive("num_channels", num_channels)
        self.kernel_size = _pair(kernel_size)
        self.corners = (corners,) if isinstance(corners, str) else tuple(corners)
        if num_channels % len(groups):
            raise ValueError(
                f"num_channels must be a multiple of the number of corners, got {num_channels} channels "
                f"and the {len(groups)} corners {self.corners}"
            )
        if diagonal not in ("unit", "learned"):
            raise ValueError(f'diagonal must be "unit" or "learned", got {diagonal!r}')
        self.diagonal = diagonal

        self.raw_weight = nn.Parameter(torch.empty(num_channels, num_channels // len(groups), *self.kernel_size))
        self.log_diagonal = nn.Parameter(torch.empty(num_channels)) if diagonal == "learned" else None
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None
        self.register_buffer("_free", None, persistent=False)
        self.register_buffer("_unit", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a layer close to the identity: its taps add about 5 % of the signal's standard deviation."""
        shape, device, groups = self.raw_weight.shape, self.raw_weight.device, geometry.parse_corners(self.corners)
        on_diagonal = geometry.diagonal_entries(shape, groups, device)
        self._free = ~(geometry.masked_entries(shape, groups, device) | on_diagonal)
        self._unit = on_diagonal.to(self.raw_weight.dtype)
        fan_in = self.raw_weight[0].numel()
        nn.init.normal_(self.raw_weight, std=0.05 / fan_in**0.5)
        with torch.no_grad():
            self.raw_weight.masked_fill_(~self._free, 0)
        for parameter in (self.log_diagonal, self.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    @property
    def weight(self) -> Tensor:
        """The weight, [C, C/G, kh, kw], as `torch.nn.functional.conv2d` takes it for each group.

        It is computed from the parameters: to change it, change those.
        """
        fixed = self._unit
        if self.log_diagonal is not None:
            fixed = fixed * self.log_diagonal.exp()[:, None, None, None]
        return torch.where(self._free, self.raw_weight, fixed)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
            input: x, [B, C, H, W], in the dtype of the parameters.

        Returns:
            y, [B, C, H, W], and log |det dy/dx|, [B], in float32 at least.

        Raises:
            TypeError: See `functional.conv2d`.
            ValueError: See `functional.conv2d`; and, on the CPU, if exp(log_diagonal) is zero or not finite.
        """
        self._check_diagonal()
        output = functional.conv2d(input, self.weight, self.corners, self.bias)
        return output, self._log_abs_det(input)

    def inverse(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `forward`.

        Args:
            input: y, [B, C, H, W], in the dtype of the parameters.

        Returns:
            x, [B, C, H, W], and log |det dx/dy|, [B], in float32 at least.

        Raises:
            TypeError: See `functional.conv2d_inverse`.
            ValueError: See `functional.conv2d_inverse`.
        """
        self._check_diagonal()
        output = functional.conv2d_inverse(input, self.weight, self.corners, self.bias)
        return output, -self._log_abs_det(input)

    def _check_diagonal(self) -> None:
        if self.log_diagonal is not None:
            functional.check_diagonal(self.log_diagonal.exp())

    def _log_abs_det(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.raw_weight.dtype, torch.float32)
        batch, _, height, width = input.shape
        if self.log_diagonal is None:
            return self.raw_weight.new_zeros(batch, dtype=dtype)
        return (height * width * self.log_diagonal.to(dtype).sum()).repeat(batch)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.num_channels}, kernel_size={self.kernel_size}, corners={self.corners}, "
            f"diagonal={self.diagonal!r}, bias={self.bias is not None}"
        )


def _pair(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size, kernel_size)
    if isinstance(kernel_size, str) or len(sizes) != 2:
        raise ValueError(f"kernel_size must be an integer or a pair (kh, kw), got {kernel_size!r}")
    return checks.positive("kernel_size", sizes[0]), checks.positive("kernel_size", sizes[1])
