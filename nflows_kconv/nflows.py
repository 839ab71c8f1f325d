"""The layer as a transform of nflows, whose forward direction is data -> noise: the convolution."""

from __future__ import annotations

from torch import Tensor

from nflows_kconv import layer

try:
    from nflows.transforms.base import Transform
except ImportError as error:
    raise ImportError("nflows_kconv.nflows needs nflows, which comes with pip install nflows-kconv[nflows]") from error

__all__ = ["InvertibleConv2d"]


class InvertibleConv2d(layer.InvertibleConv2d, Transform):
    """`nflows_kconv.InvertibleConv2d` as an `nflows.transforms.Transform`.

    forward (data -> noise) is the convolution y = A x, inverse (noise -> data) the solution x = A^-1 y. FInC
    Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Arguments, parameters and state_dict are those of
    `nflows_kconv.InvertibleConv2d`.

    `nflows.transforms.InverseTransform(InvertibleConv2d(...))` solves for the density and convolves for
    samples, and trains through the solution (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634).

    Example:
        >>> step = CompositeTransform([InvertibleConv2d(12), ActNorm(12), OneByOneConvolution(12), coupling])
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
            inputs: x, [B, C, H, W], in the dtype of the parameters.
            context: Ignored.

        Returns:
            y, [B, C, H, W], and log |det dy/dx|, [B].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d`.
            ValueError: See `nflows_kconv.functional.conv2d`.
        """
        return super().forward(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undoes `forward`.

        Args:
            inputs: y, [B, C, H, W], in the dtype of the parameters.
            context: Ignored.

        Returns:
            x, [B, C, H, W], and log |det dx/dy|, [B].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d_inverse`.
            ValueError: See `nflows_kconv.functional.conv2d_inverse`.
        """
        return super().inverse(inputs)
