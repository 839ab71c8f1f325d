"""The layer for torchflows, whose forward direction is data -> noise: the convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nflows_kconv import bijection, conditional, layer, periodic, stencil
from nflows_kconv.batch import flatten_batch, flatten_contexts

try:
    from torchflows.bijections.base import Bijection
    from torchflows.flows import Flow
except ImportError as error:
    raise ImportError('nflows_kconv.torchflows needs torchflows: pip install "nflows-kconv[torchflows]"') from error

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "InvertibleConv1d",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
]


class _Bijection(Bijection, layer.KernelLayer):
    """A layer with the interface of torchflows."""

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] | None = None, **options: Any) -> None:
        if len(event_shape) != self.dimensions + 1:
            axes = ", ".join(("C", *stencil.AXES[self.dimensions]))
            raise ValueError(f"event_shape must be ({axes}), got {tuple(event_shape)}")
        # Skips the constructor of Bijection, which would call the layer's without arguments.
        super(Bijection, self).__init__(event_shape[0], **options)
        self.event_shape, self.context_shape = tuple(event_shape), context_shape
        self.n_dim = math.prod(event_shape)

    def forward(self, x: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Convolves, or solves if `inverse`.

        Args:
            x: x, or z if `inverse`, [..., C, H, W], in the dtype of the parameters.
            context: The context of a conditional layer, [..., E]; ignored by other layers.
            inverse: Whether to solve for x.

        Returns:
            z and log |det dz/dx|, or x and log |det dx/dz|: [..., C, H, W] and [...].

        Raises:
            TypeError: See `nflows_kconv.functional.conv2d`.
            ValueError: See `nflows_kconv.functional.conv2d`.
        """
        images, contexts = flatten_batch(x, self.dimensions), flatten_contexts(context)
        output, log_abs_det = super(Bijection, self).forward(images, contexts, inverse=inverse)
        return output.reshape(x.shape), log_abs_det.reshape(x.shape[: -1 - self.dimensions])

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Undoes `forward`."""
        if "forward" in vars(self):  # torchflows' `invert` has swapped the two methods of this instance
            return type(self).forward(self, z, context, inverse=True)
        return super(Bijection, self).inverse(z, context)


class InvertibleConv2d(_Bijection, layer.InvertibleConv2d):
    """`nflows_kconv.InvertibleConv2d` as a torchflows `Bijection`.

    forward (data -> noise) is the convolution z = A x, inverse (noise -> data) the solution x = A^-1 z. FInC Flow
    (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Parameters and state_dict are those of
    `nflows_kconv.InvertibleConv2d`.

    Args:
        event_shape: (C, H, W).
        context_shape: Ignored.
        options: Arguments of `nflows_kconv.InvertibleConv2d`: `kernel_size`, `corners` and so on.

    Raises:
        TypeError: See `nflows_kconv.InvertibleConv2d`.
        ValueError: See `nflows_kconv.InvertibleConv2d`; and if `event_shape` is not the shape of an image.

    Examples:
        >>> from torchflows.bijections.base import BijectiveComposition
        >>> from torchflows.flows import Flow
        >>> from nflows_kconv.torchflows import InvertibleConv2d
        >>> shape = (12, 8, 8)
        >>> flow = Flow(BijectiveComposition([InvertibleConv2d(shape, corners=corner) for corner in ("TL", "BR")]))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """


class InvertibleConv1d(_Bijection, layer.InvertibleConv1d):
    """`nflows_kconv.InvertibleConv1d` as a torchflows `Bijection`; see `InvertibleConv2d`."""


class InvertibleConv3d(_Bijection, layer.InvertibleConv3d):
    """`nflows_kconv.InvertibleConv3d` as a torchflows `Bijection`; see `InvertibleConv2d`."""


class PeriodicConv2d(_Bijection, periodic.PeriodicConv2d):
    """`nflows_kconv.PeriodicConv2d` as a torchflows `Bijection`, in `InvertibleConv2d`'s directions."""


class PeriodicConv1d(_Bijection, periodic.PeriodicConv1d):
    """`nflows_kconv.PeriodicConv1d` as a torchflows `Bijection`; see `PeriodicConv2d`."""


class PeriodicConv3d(_Bijection, periodic.PeriodicConv3d):
    """`nflows_kconv.PeriodicConv3d` as a torchflows `Bijection`; see `PeriodicConv2d`."""


class _ConditionalBijection(_Bijection):
    """A layer that takes torchflows' context."""

    def __init__(self, event_shape: Sequence[int], context_shape: Sequence[int] | None = None, **options: Any) -> None:
        if context_shape is None or len(context_shape) != 1:
            raise ValueError(f"context_shape must be (E,), got {context_shape}")
        super().__init__(event_shape, context_shape, context_features=context_shape[0], **options)


class ConditionalInvertibleConv2d(_ConditionalBijection, conditional.ConditionalInvertibleConv2d):
    """`nflows_kconv.ConditionalInvertibleConv2d` as a torchflows `Bijection`.

    Args:
        event_shape: (C, H, W).
        context_shape: (E,).
        options: Arguments of `nflows_kconv.ConditionalInvertibleConv2d`, without `context_features`.

    Raises:
        TypeError: See `nflows_kconv.ConditionalInvertibleConv2d`.
        ValueError: See there; and if `event_shape` is not an image's or `context_shape` not a vector's.

    Examples:
        >>> import torch
        >>> from torchflows.flows import Flow
        >>> from nflows_kconv.torchflows import ConditionalInvertibleConv2d
        >>> flow = Flow(ConditionalInvertibleConv2d((12, 8, 8), context_shape=(5,)))
        >>> flow.log_prob(torch.randn(10, 12, 8, 8), context=torch.randn(10, 5)).shape
        torch.Size([10])
    """


class ConditionalInvertibleConv1d(_ConditionalBijection, conditional.ConditionalInvertibleConv1d):
    """`nflows_kconv.ConditionalInvertibleConv1d` as a torchflows `Bijection`; see `ConditionalInvertibleConv2d`."""


class ConditionalInvertibleConv3d(_ConditionalBijection, conditional.ConditionalInvertibleConv3d):
    """`nflows_kconv.ConditionalInvertibleConv3d` as a torchflows `Bijection`; see `ConditionalInvertibleConv2d`."""


bijection.register(
    Flow,
    forward=lambda flow, x, context: flow.bijection(x, context),
    inverse=lambda flow, z, context: flow.bijection.inverse(z, context),
)
