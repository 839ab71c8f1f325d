"""The layer as a flow of normflows, whose forward direction is latent -> data: the convolution's inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from nflows_kconv import geometry, layer

try:
    from normflows import flows
except ImportError as error:
    raise ImportError(
        "nflows_kconv.normflows needs normflows, which comes with pip install nflows-kconv[normflows]"
    ) from error

__all__ = ["GlowBlock", "InvertibleConv2d"]


class InvertibleConv2d(layer.InvertibleConv2d, flows.Flow):
    """`nflows_kconv.InvertibleConv2d` as a `normflows.flows.Flow`.

    forward (latent -> data) is the solution x = A^-1 z, inverse (data -> latent) the convolution z = A x.
    FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Arguments, parameters and state_dict are those
    of `nflows_kconv.InvertibleConv2d`, whose directions have the opposite names.

    `normflows.flows.Reverse(InvertibleConv2d(...))` solves for the density and convolves for samples, and
    trains through the solution (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634).

    Example:
        >>> flows = [coupling, Invertible1x1Conv(12), ActNorm((12, 1, 1)), InvertibleConv2d(12)]
    """

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solves for the data.

        Args:
            z: z, [B, C, H, W], in the dtype of the parameters.
            context: Ignored.

        Returns:
            x, [B, C, H, W], and log |det dx/dz|, [B].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d_inverse`.
            ValueError: See `nflows_kconv.functional.conv2d_inverse`.
        """
        return super().inverse(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves the data.

        Args:
            x: x, [B, C, H, W], in the dtype of the parameters.
            context: Ignored.

        Returns:
            z, [B, C, H, W], and log |det dz/dx|, [B].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d`.
            ValueError: See `nflows_kconv.functional.conv2d`.
        """
        return super().forward(x)


class GlowBlock(flows.GlowBlock):
    """A step of Glow with a k x k convolution: `normflows.flows.GlowBlock` with `InvertibleConv2d` inside.

    From data to latent: ActNorm -> k x k -> 1x1 -> affine coupling. Usable wherever
    `normflows.flows.GlowBlock` is. The step of FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266),
    section 3, has the k x k convolution before ActNorm.

    Args:
        channels: C, a multiple of the number of corners.
        hidden_channels: Width of the coupling's network.
        scale: Whether the coupling scales beside shifting.
        scale_map: "sigmoid", "sigmoid_inv" or "exp".
        split_mode: What the coupling splits, see `normflows.flows.Split`.
        leaky: Slope of the network's LeakyReLUs.
        init_zeros: Whether the network's last layer starts at zero.
        use_lu: Whether the 1x1 convolution is parametrised by its LU decomposition.
        net_actnorm: Whether the network has ActNorm layers.
        kernel_size: See `nflows_kconv.InvertibleConv2d`.
        corners: See `nflows_kconv.InvertibleConv2d`.
        diagonal: See `nflows_kconv.InvertibleConv2d`.

    Raises:
        TypeError: See `nflows_kconv.InvertibleConv2d`.
        ValueError: See `nflows_kconv.InvertibleConv2d`.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        scale: bool = True,
        scale_map: str = "sigmoid",
        split_mode: str = "channel",
        leaky: float = 0.0,
        init_zeros: bool = True,
        use_lu: bool = True,
        net_actnorm: bool = False,
        *,
        kernel_size: int | tuple[int, int] = 3,
        corners: str | Sequence[str] = geometry.CORNERS,
        diagonal: Literal["unit", "learned"] = "unit",
    ) -> None:
        convolution = InvertibleConv2d(channels, kernel_size, corners=corners, diagonal=diagonal)
        super().__init__(
            channels, hidden_channels, scale, scale_map, split_mode, leaky, init_zeros, use_lu, net_actnorm
        )
        # `flows` runs from latent to data and ends with ActNorm.
        self.flows.insert(len(self.flows) - 1, convolution)
