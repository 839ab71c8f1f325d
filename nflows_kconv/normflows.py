"""The layer and the image flow in normflows, whose forward direction is latent -> data: the convolution's inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from nflows_kconv import checks, geometry, image_flow, layer
from nflows_kconv.invertible import InvertibleModule
from nflows_kconv.reversible import NETWORKS, Invertible, cascade

try:
    from normflows import MultiscaleFlow, flows
    from normflows.distributions import ClassCondDiagGaussian, DiagGaussian
    from normflows.flows.neural_spline.coupling import Coupling
except ImportError as error:
    raise ImportError(
        'nflows_kconv.normflows needs normflows, which comes with pip install "nflows-kconv[normflows]"'
    ) from error

__all__ = ["GlowBlock", "ImageFlow", "InvertibleConv2d", "ReversibleComposite", "Step", "finc_flow"]

_NETWORKS = {
    **NETWORKS,
    flows.AffineCoupling: ("param_map",),
    flows.MaskedAffineFlow: ("s", "t"),
    Coupling: ("transform_net",),
}


class InvertibleConv2d(layer.InvertibleConv2d, flows.Flow):
    """`nflows_kconv.InvertibleConv2d` as a `normflows.flows.Flow`.

    forward (latent -> data) is the solution x = A^-1 z, inverse (data -> latent) the convolution z = A x.
    FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266). Arguments, parameters and state_dict are those
    of `nflows_kconv.InvertibleConv2d`, whose directions have the opposite names.

    `normflows.flows.Reverse(InvertibleConv2d(...))` solves for the density and convolves for samples, and
    trains through the solution (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634).

    Examples:
        >>> from normflows.flows import ActNorm, Invertible1x1Conv
        >>> from nflows_kconv.normflows import InvertibleConv2d
        >>> flows = [Invertible1x1Conv(12), ActNorm((12, 1, 1)), InvertibleConv2d(12)]
    """

    def _run_forward(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._run_inverse(input, context)

    def _run_inverse(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._run_forward(input, context)


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
        max_inverse_gain: See `nflows_kconv.InvertibleConv2d`.

    Raises:
        TypeError: See `nflows_kconv.InvertibleConv2d`.
        ValueError: See `nflows_kconv.InvertibleConv2d`.

    Examples:
        >>> from nflows_kconv.normflows import GlowBlock
        >>> block = GlowBlock(12, 256, split_mode="channel", scale=True)
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
        max_inverse_gain: float | None = None,
    ) -> None:
        convolution = InvertibleConv2d(
            channels, kernel_size, corners=corners, diagonal=diagonal, max_inverse_gain=max_inverse_gain
        )
        super().__init__(
            channels, hidden_channels, scale, scale_map, split_mode, leaky, init_zeros, use_lu, net_actnorm
        )
        # `flows` runs from latent to data and ends with ActNorm.
        self.flows.insert(len(self.flows) - 1, convolution)


class Step(InvertibleModule, flows.Flow):
    """A module of `nflows_kconv.step` as a `normflows.flows.Flow`, whose `forward` goes from latent to data.

    Args:
        step: Has `forward` from data to latent and `inverse`, both with a log-determinant [B].
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def _run_forward(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step.inverse(input, context)  # type: ignore[operator]

    def _run_inverse(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step(input, context)


class ReversibleComposite(flows.Composite):
    """`normflows.flows.Composite` that trains in memory independent of the number of flows.

    Parameters, state_dict and results are the same. One flow's activations exist at a time, so give it steps such as
    `GlowBlock`. See `nflows_kconv.reversible.cascade` for how it works and what it asks of them.

    Args:
        flows: The first one takes the latent variable; all must have an inverse.

    Examples:
        >>> from normflows.flows import Squeeze
        >>> from nflows_kconv.normflows import GlowBlock, ReversibleComposite
        >>> level = [ReversibleComposite([GlowBlock(12, 64) for _ in range(4)]), Squeeze()]
    """

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From latent to data; see `nflows_kconv.reversible.cascade` for what is raised."""
        return cascade(z, self._steps(), _NETWORKS)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From data to latent; see `nflows_kconv.reversible.cascade` for what is raised."""
        return cascade(x, [step.inverted() for step in reversed(self._steps())], _NETWORKS)

    def _steps(self) -> list[Invertible]:
        return [Invertible(flow, flow, flow.inverse) for flow in self._flows]


class ImageFlow(MultiscaleFlow):
    """A `normflows.MultiscaleFlow` of images, of any dtype, whose `log_prob` needs no classes where it has none."""

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The log-density of images, [B]; see `forward`, whose negative it is."""
        return -self(x, y)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The negative log-likelihood of each image, [B].

        Args:
            x: [B, C, H, W].
            y: Classes, [B] whole numbers or [B, num_classes] one-hot, if the flow has classes.

        Raises:
            TypeError: If the images are no tensor, or y none of integers and not one-hot.
            ValueError: If the images have another shape than those of the flow, or values outside 0..255; if y does
                not fit, or is missing, or the flow has no classes.
        """
        images = image_flow.as_parameters_are(x, self)
        return -super().log_prob(images, self._classes(y, len(images)))

    def sample(
        self, num_samples: int = 1, y: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images, [B, C, H, W], and their log-density, [B].

        Args:
            num_samples: B, how many without y.
            y: Classes, as in `log_prob`; without them a flow with classes draws some.
            temperature: If given, scales the noise.

        Raises:
            TypeError: See `log_prob`.
            ValueError: See `log_prob`.
        """
        return super().sample(num_samples, y if y is None else self._classes(y, None), temperature)

    def _classes(self, y: Tensor | None, count: int | None) -> Tensor | None:
        num_classes = self.q0[0].num_classes if self.class_cond else None
        if isinstance(y, Tensor) and y.dim() == 2 and y.shape[1] == num_classes and count in (None, len(y)):
            return y.to(self.q0[0].loc.dtype)  # one-hot
        return image_flow.as_class_numbers("y", y, num_classes, count)


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
    """A multiscale flow of images in normflows.

    That of FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266, section 4). Each of the L levels squeezes 2 x 2
    pixels into channels, takes K steps [k x k convolution -> ActNorm -> invertible 1 x 1 convolution -> affine
    coupling], and, but for the last one, gives half of the channels to the latent variable, by a learned prior.
    Dequantisation and its log-determinant are inside: `log_prob` takes images
    with values 0..255, and `sample` returns such images and their log-density.
    With the same seed and weights it is the same density as that of `nflows_kconv.nflows.finc_flow`.

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
        num_classes: If given, the latent variable has a mean and a scale for each class; `log_prob`
            and `sample` take the classes y.
        reversible: Whether to train in memory independent of K, for some more time, see `nflows_kconv.reversible`. The
            state_dict is the same.

    Returns:
        A `normflows.MultiscaleFlow`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the image does not divide into the levels.

    Examples:
        >>> import torch
        >>> from nflows_kconv.normflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)  # 32 and 512: 44 million parameters
        >>> flow.log_prob(torch.randint(256, (10, 3, 32, 32))).shape
        torch.Size([10])
        >>> images, log_prob = flow.sample(5)
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
    bases: list[nn.Module] = []
    latent_to_data, merges = [], []
    for level in reversed(built):
        channels, height, width = level.shape
        last = not bases
        latent_shape = (channels if last else channels // 2, height, width)
        if num_classes is None:
            bases.append(DiagGaussian(latent_shape, trainable=False))
        else:
            bases.append(ClassCondDiagGaussian(latent_shape, num_classes))
        latent_to_data.append([Step(level.stack), flows.Squeeze()])
        if not last:
            merges.append(flows.Merge("channel_inv"))  # the first half of the channels leaves, as in nflows
    preprocessing = Step(image_flow.Preprocessing(image_shape))
    return ImageFlow(bases, latent_to_data, merges, preprocessing, class_cond=num_classes is not None)
