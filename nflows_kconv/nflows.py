"""The layer and the image flow in nflows, whose forward direction is data -> noise: the convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nflows_kconv import checks, geometry, image_flow, layer
from nflows_kconv.invertible import InvertibleModule
from nflows_kconv.reversible import NETWORKS, Invertible, cascade

try:
    from nflows.distributions import ConditionalDiagonalNormal, Distribution, StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MultiscaleCompositeTransform, SqueezeTransform
    from nflows.transforms.base import Transform
    from nflows.transforms.coupling import CouplingTransform
except ImportError as error:
    raise ImportError(
        'nflows_kconv.nflows needs nflows, which comes with pip install "nflows-kconv[nflows]"'
    ) from error

__all__ = ["ImageFlow", "InvertibleConv2d", "ReversibleCompositeTransform", "Step", "finc_flow"]

_NETWORKS = {**NETWORKS, CouplingTransform: ("transform_net",)}


class InvertibleConv2d(layer.InvertibleConv2d, Transform):
    """`nflows_kconv.InvertibleConv2d` as an `nflows.transforms.Transform`.

    forward (data -> noise) is the convolution y = A x, inverse (noise -> data) the solution x = A^-1 y. FInC
    Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Arguments, parameters and state_dict are those of
    `nflows_kconv.InvertibleConv2d`.

    `nflows.transforms.InverseTransform(InvertibleConv2d(...))` solves for the density and convolves for
    samples, and trains through the solution (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634).

    Examples:
        >>> from nflows.transforms import ActNorm, CompositeTransform, OneByOneConvolution
        >>> from nflows_kconv.nflows import InvertibleConv2d
        >>> step = CompositeTransform([InvertibleConv2d(12), ActNorm(12), OneByOneConvolution(12)])
    """


class Step(InvertibleModule, Transform):
    """A module of `nflows_kconv.step` as an `nflows.transforms.Transform`.

    Args:
        step: Has `forward` from data to noise and `inverse`, both with a log-determinant [B].
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def _run_forward(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step(input, context)

    def _run_inverse(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step.inverse(input, context)  # type: ignore[operator]


class ReversibleCompositeTransform(CompositeTransform):
    """`nflows.transforms.CompositeTransform` that trains in memory independent of the number of transforms.

    Parameters, state_dict and results are the same. One transform's activations exist at a time, so give it those of a
    step as one `CompositeTransform`. See `nflows_kconv.reversible.cascade` for how it works and what it asks of them.

    Args:
        transforms: The first one takes the data; all must have an inverse.

    Examples:
        >>> from nflows.transforms import ActNorm, CompositeTransform
        >>> from nflows_kconv.nflows import InvertibleConv2d, ReversibleCompositeTransform
        >>> steps = [CompositeTransform([InvertibleConv2d(12), ActNorm(12)]) for _ in range(32)]
        >>> transform = ReversibleCompositeTransform(steps)
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From data to noise; see `nflows_kconv.reversible.cascade` for what is raised."""
        return cascade(inputs, self._steps(context), _NETWORKS)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From noise to data; see `nflows_kconv.reversible.cascade` for what is raised."""
        return cascade(inputs, [step.inverted() for step in reversed(self._steps(context))], _NETWORKS)

    def _steps(self, context: Tensor | None) -> list[Invertible]:
        return [
            Invertible(each, partial(each, context=context), partial(each.inverse, context=context), context)
            for each in self._transforms
        ]


class _StandardNormal(StandardNormal):
    """Draws in the dtype of the flow that it is a part of; that of nflows always draws float32."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like_the_flow", torch.empty(0), persistent=False)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        like: Tensor = self._like_the_flow
        return torch.randn(num_samples, *self._shape, dtype=like.dtype, device=like.device)


class ImageFlow(Flow):
    """An `nflows.flows.Flow` of images, which may have any dtype, uint8 for instance.

    Args:
        transform: From images to noise.
        distribution: Of the noise.
        num_classes: If given, the context of each call is a class, 0..num_classes - 1, for each image.
    """

    def __init__(self, transform: Transform, distribution: Distribution, num_classes: int | None = None) -> None:
        super().__init__(transform, distribution)
        self._num_classes = num_classes

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of images; see `forward`."""
        return self(inputs, context)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of images, [B], so that the flow can be wrapped by DistributedDataParallel or torch.compile.

        Args:
            inputs: [B, C, H, W].
            context: Classes, [B] whole numbers, if the flow has classes.

        Raises:
            TypeError: If the images are no tensor, or the context none of integers.
            ValueError: If the images have another shape than those of the flow, or values outside 0..255; if the
                context does not fit, or is missing, or the flow has no classes.
        """
        images = image_flow.as_parameters_are(inputs, self)
        classes = image_flow.as_class_numbers("context", context, self._num_classes, images.shape[0])
        return super()._log_prob(images, classes)

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Images, [num_samples, C, H, W], or [B, num_samples, C, H, W] for the classes of a context.

        Args:
            num_samples: How many; for each of the classes.
            context: Classes, [B] whole numbers, if the flow has classes.
            batch_size: If given, the images are drawn that many at a time.

        Raises:
            TypeError: See `log_prob`.
            ValueError: See `log_prob`.
        """
        classes = image_flow.as_class_numbers("context", context, self._num_classes, None)
        return super().sample(num_samples, classes, batch_size)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `sample` draws and its log-density, [num_samples] or [B, num_samples]; raises what `log_prob` raises."""
        classes = image_flow.as_class_numbers("context", context, self._num_classes, None)
        return super().sample_and_log_prob(num_samples, classes)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent variables of images, [B, C H W]; arguments and errors are those of `log_prob`."""
        return super().transform_to_noise(image_flow.as_parameters_are(inputs, self), context)


def finc_flow(
    image_shape: Sequence[int],
    levels: int,
    steps: int,
    *,
    hidden_channels: int = 512,
    kernel_size: int | tuple[int, int] | None = 3,
    corners: image_flow.Corners = geometry.CORNERS,
    diagonal: Literal["unit", "learned"] = "unit",
    max_inverse_gain: float | None = None,
    direction: Literal["forward", "inverse"] = "forward",
    num_classes: int | None = None,
    reversible: bool = False,
) -> ImageFlow:
    """A multiscale flow of images in nflows.

    That of FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266, section 4). Each of the L levels squeezes 2 x 2
    pixels into channels, takes K steps [k x k convolution -> ActNorm -> invertible 1 x 1 convolution -> affine
    coupling], and, but for the last one, gives half of the channels to the latent variable, by a learned prior.
    Dequantisation and its log-determinant are inside: `log_prob` takes images
    with values 0..255, and `sample` returns such images.
    With the same seed and weights it is the same density as that of `nflows_kconv.normflows.finc_flow`.

    Args:
        image_shape: (C, H, W); H and W multiples of 2^L.
        levels: L.
        steps: K, in each level.
        hidden_channels: Width of the couplings' networks.
        kernel_size: See `InvertibleConv2d`; None leaves the convolution out, which makes the flow Glow.
        corners: See `InvertibleConv2d`; or several of these, one convolution each: (("TL",), ("BR",)) is a pair of full
            convolutions in opposite corners.
        diagonal: See `InvertibleConv2d`.
        max_inverse_gain: See `InvertibleConv2d`.
        direction: "forward" convolves from data to latent, and solves to sample; "inverse" the other way round, as in
            Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).
        num_classes: If given, the latent variable has a mean and a scale for each class; the labels, [B] whole
            numbers, are the flow's context.
        reversible: Whether to train in memory independent of K, for some more time, see `nflows_kconv.reversible`. The
            state_dict is the same.

    Returns:
        An `nflows.flows.Flow` with a `MultiscaleCompositeTransform`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the image does not divide into the levels.

    Examples:
        >>> import torch
        >>> from nflows_kconv.nflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)  # 32 and 512: 44 million parameters
        >>> flow.log_prob(torch.randint(256, (10, 3, 32, 32))).shape
        torch.Size([10])
        >>> flow.sample(5).shape
        torch.Size([5, 3, 32, 32])
    """
    if num_classes is not None:
        checks.positive("num_classes", num_classes)
    built = image_flow.build_levels(
        image_shape,
        levels,
        steps,
        hidden_channels=hidden_channels,
        kernel_size=kernel_size,
        corners=corners,
        diagonal=diagonal,
        max_inverse_gain=max_inverse_gain,
        direction=direction,
        reversible=reversible,
    )
    multiscale = MultiscaleCompositeTransform(num_transforms=levels)
    for level in built:
        multiscale.add_transform(CompositeTransform([SqueezeTransform(), Step(level.stack)]), level.shape)
    dimensions = math.prod(image_shape)
    if num_classes is None:
        base = _StandardNormal([dimensions])
    else:
        parameters = nn.Embedding(num_classes, 2 * dimensions)  # means, then the logarithms of scales
        nn.init.zeros_(parameters.weight)
        base = ConditionalDiagonalNormal([dimensions], parameters)
    transform = CompositeTransform([Step(image_flow.Preprocessing(image_shape)), multiscale])
    return ImageFlow(transform, base, num_classes)
