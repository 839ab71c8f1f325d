"""The layer and the image flow for normflows, whose forward direction is latent -> data: the convolution's inverse."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nflows_kconv import bijection, checks, conditional, layer, periodic
from nflows_kconv.flows import image_flow, state, steps
from nflows_kconv.flows.reversible import cascade
from nflows_kconv.invertible import InvertibleModule

try:
    from normflows import ClassCondFlow, MultiscaleFlow, NormalizingFlow, flows
    from normflows.distributions import ClassCondDiagGaussian, DiagGaussian
    from normflows.flows.neural_spline.coupling import Coupling
except ImportError as error:
    raise ImportError('nflows_kconv.normflows needs normflows: pip install "nflows-kconv[normflows]"') from error

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "GlowBlock",
    "ImageFlow",
    "InvertibleConv1d",
    "InvertibleConv1x1",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
    "ReversibleComposite",
    "Step",
    "finc_flow",
    "load_flow",
]


class _FromLatent(InvertibleModule, flows.Flow):
    """A layer with the directions of normflows."""

    def forward(self, input: Tensor, context: Any = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Does `forward` of the layer in the other direction: solves, or convolves if `inverse`."""
        return super().forward(input, context, inverse=not inverse)


class InvertibleConv2d(_FromLatent, layer.InvertibleConv2d):
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


class InvertibleConv1d(_FromLatent, layer.InvertibleConv1d):
    """`nflows_kconv.InvertibleConv1d` as a `normflows.flows.Flow`; see `InvertibleConv2d`."""


class InvertibleConv3d(_FromLatent, layer.InvertibleConv3d):
    """`nflows_kconv.InvertibleConv3d` as a `normflows.flows.Flow`; see `InvertibleConv2d`."""


class InvertibleConv1x1(_FromLatent, steps.InvertibleConv1x1):
    """`flows.steps.InvertibleConv1x1` as a `normflows.flows.Flow`, to replace `Invertible1x1Conv`."""


class PeriodicConv2d(_FromLatent, periodic.PeriodicConv2d):
    """`nflows_kconv.PeriodicConv2d` as a `normflows.flows.Flow`, in `InvertibleConv2d`'s directions."""


class PeriodicConv1d(_FromLatent, periodic.PeriodicConv1d):
    """`nflows_kconv.PeriodicConv1d` as a `normflows.flows.Flow`; see `PeriodicConv2d`."""


class PeriodicConv3d(_FromLatent, periodic.PeriodicConv3d):
    """`nflows_kconv.PeriodicConv3d` as a `normflows.flows.Flow`; see `PeriodicConv2d`."""


class ConditionalInvertibleConv2d(_FromLatent, conditional.ConditionalInvertibleConv2d):
    """`nflows_kconv.ConditionalInvertibleConv2d` as a `normflows.flows.Flow`, whose directions have the opposite names.

    It takes the context of `normflows.ConditionalNormalizingFlow`.

    Examples:
        >>> import torch
        >>> from nflows_kconv.normflows import ConditionalInvertibleConv2d
        >>> layer = ConditionalInvertibleConv2d(4, context_features=3)
        >>> data, log_abs_det = layer(torch.randn(10, 4, 8, 8), context=torch.randn(10, 3))
    """


class ConditionalInvertibleConv1d(_FromLatent, conditional.ConditionalInvertibleConv1d):
    """`nflows_kconv.ConditionalInvertibleConv1d` as a `normflows.flows.Flow`; see `ConditionalInvertibleConv2d`."""


class ConditionalInvertibleConv3d(_FromLatent, conditional.ConditionalInvertibleConv3d):
    """`nflows_kconv.ConditionalInvertibleConv3d` as a `normflows.flows.Flow`; see `ConditionalInvertibleConv2d`."""


class GlowBlock(flows.GlowBlock):
    """A Glow step with a k x k convolution: `normflows.flows.GlowBlock` with `InvertibleConv2d` inside.

    From data to latent: k x k -> ActNorm -> 1x1 -> affine coupling, the step of FInC Flow (Kallappa, Nagar, Varma 2023,
    arXiv 2301.09266, section 3). Replaces `normflows.flows.GlowBlock` anywhere.

    Args:
        channels: C, a multiple of the number of a convolution's corners.
        hidden_channels: Width of the coupling's network.
        scale: Whether the coupling scales as well as shifts.
        scale_map: "sigmoid", "sigmoid_inv" or "exp".
        split_mode: What the coupling splits, see `normflows.flows.Split`.
        leaky: Slope of the network's LeakyReLUs.
        init_zeros: Whether the network's last layer starts at zero.
        use_lu: Whether the 1x1 convolution is parametrised by its LU decomposition.
        net_actnorm: Whether the network has ActNorm layers.
        kernel_size: See `nflows_kconv.InvertibleConv2d`.
        corners: See `nflows_kconv.InvertibleConv2d`; or a tuple of these, for one convolution each. The
            default is a pair of full convolutions in opposite corners; the paper's unit of four groups is
            ("TL", "TR", "BL", "BR").
        dilation: See `nflows_kconv.InvertibleConv2d`.
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
        corners: image_flow.Corners | None = None,
        dilation: int | tuple[int, int] = 1,
        diagonal: Literal["unit", "learned"] = "unit",
        max_inverse_gain: float | None = None,
    ) -> None:
        options = {"dilation": dilation, "diagonal": diagonal, "max_inverse_gain": max_inverse_gain}
        convolutions = image_flow.convolutions(InvertibleConv2d, channels, kernel_size, corners, **options)
        super().__init__(
            channels, hidden_channels, scale, scale_map, split_mode, leaky, init_zeros, use_lu, net_actnorm
        )
        self.flows.extend(reversed(convolutions))  # `flows` runs from latent to data


class Step(steps.Inverse, flows.Flow):
    """A module of `nflows_kconv.flows.steps` as a `normflows.flows.Flow`, whose `forward` goes from latent to data.

    Args:
        step: A module with `forward` from data to latent and `inverse`, both of which return a log-determinant, [B].
    """


class ReversibleComposite(InvertibleModule, flows.Composite):
    """`normflows.flows.Composite` that trains in memory independent of the number of flows.

    Parameters, state_dict and results are the same. Only one flow's activations exist at a time, so give it whole steps
    such as `GlowBlock`. See `nflows_kconv.flows.reversible.cascade` for how it works and what it requires.

    Args:
        flows: Invertible flows; the first one takes the latent variable.

    Examples:
        >>> from normflows.flows import Squeeze
        >>> from nflows_kconv.normflows import GlowBlock, ReversibleComposite
        >>> level = [ReversibleComposite([GlowBlock(12, 64) for _ in range(4)]), Squeeze()]
    """

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self._flows, context)  # type: ignore[arg-type]

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self._flows, context, inverse=True)  # type: ignore[arg-type]


class ImageFlow(image_flow.Interface, MultiscaleFlow):
    """The `normflows.MultiscaleFlow` that `finc_flow` makes.

    Images may have any real dtype. The condition of each call is what the flow was built for: classes, [B] whole
    numbers or [B, num_classes] one-hot; a tensor, [B, *context_shape]; or both. Pass it as `y` or as `context`; pass
    both as the pair (classes, tensor), or as classes `y` and tensor `context`.

    Args:
        architecture: What to build.
    """

    num_levels: int
    architecture: image_flow.Architecture
    q0: Any
    flows: Any
    merges: Any
    transform: Any
    _takes_one_hot = True

    def __init__(self, architecture: image_flow.Architecture) -> None:
        bases: list[nn.Module] = []
        for shape in reversed(architecture.latent_shapes):
            if architecture.num_classes is None:
                bases.append(DiagGaussian(shape, trainable=False))
            else:
                bases.append(ClassCondDiagGaussian(shape, architecture.num_classes))
        latent_to_data = [[Step(stack), Step(steps.Squeeze())] for stack in reversed(architecture.build_stacks())]
        merges = [flows.Merge("channel_inv") for _ in bases[1:]]  # the first half of the channels leaves, as in nflows
        is_conditional = architecture.num_classes is not None or architecture.context_shape is not None
        preprocessing = Step(architecture.build_preprocessing())
        super().__init__(bases, latent_to_data, merges, preprocessing, class_cond=is_conditional)
        self.architecture = architecture

    def forward(
        self, x: Tensor, y: Tensor | None = None, context: image_flow.Context | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns the negative log-likelihood of each image, [B]: `-log_prob`, with the same arguments and errors."""
        latents, log_abs_det, classes = self._analyzed(x, y, context, noise)
        arguments = () if classes is None else (classes,)
        log_probs = [base.log_prob(latent, *arguments) for base, latent in zip(self.q0, latents, strict=True)]
        return -sum(log_probs, log_abs_det)

    def forward_kld(
        self, x: Tensor, y: Tensor | None = None, context: image_flow.Context | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns the mean of `forward` over the images."""
        return self(x, y, context, noise).mean()

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: image_flow.Context | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns the log-density of images, [B].

        Args:
            x: [B, *data_shape], whole numbers 0..num_levels - 1, or with `preprocessing=None` floating-point numbers.
            y: The condition, see `ImageFlow`.
            context: The condition, or its tensor, see `ImageFlow`.
            noise: Dequantisation noise in [0, 1), of the shape of the images, such as `torch.rand` gives. None draws
                it.

        Raises:
            TypeError: If the images, the noise or a part of the condition have the wrong type, or the flow's parameters
                are in half precision.
            ValueError: If the images have another shape than the flow's, or invalid values (see
                `nflows_kconv.flows.images.UniformDequantization` for when they are checked); if the condition or the
                noise does not fit, is missing, or is not expected.
        """
        return -self(x, y, context, noise)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        y: Tensor | None = None,
        temperature: float | None = None,
        context: image_flow.Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws data, [B, *data_shape], and also returns their log-density, [B].

        Samples have no autograd graph; for gradients of samples, `decode` noise.

        Args:
            num_samples: B if there is no condition; otherwise B is its number of rows.
            y: The condition, see `ImageFlow`. A flow with classes draws them if they are not given.
            temperature: A factor for the noise, or None.
            context: The condition, or its tensor, see `ImageFlow`.

        Raises:
            TypeError: If a number has the wrong type; see `log_prob`.
            ValueError: If a number is out of its range; see `log_prob`.
        """
        checks.positive("num_samples", num_samples)
        if temperature is not None:
            checks.temperature(temperature)
        device = self._parameter().device
        num_classes, has_context = self.architecture.num_classes, self.architecture.context_shape is not None
        if num_classes is not None and y is None and not isinstance(context, (tuple, list)):
            if has_context == (context is not None):  # that is, all except the classes
                count = context.shape[0] if isinstance(context, Tensor) and context.dim() else num_samples
                y = torch.randint(num_classes, (count,), device=device)
        condition = self._given(y, context, None)
        count = num_samples if condition.rows is None else condition.rows
        arguments = (count,) if num_classes is None else (count, condition.classes)
        with self._temperature(temperature):
            latents, log_probs = zip(*(base(*arguments) for base in self.q0), strict=True)
        images, log_abs_det = self._from_latents(latents, condition.tensor)
        return images, sum(log_probs) - log_abs_det

    def inverse_and_log_det(
        self, x: Tensor, y: Tensor | None = None, context: image_flow.Context | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the latents of images with the noise of dequantisation, and the log-determinant, [B].

        Takes the arguments and raises the errors of `log_prob`; classes may be omitted. The latents are a list in the
        order of `q0`, as in any MultiscaleFlow; `encode` returns them in one tensor, the first split first, without
        noise.
        """
        latents, log_abs_det, _ = self._analyzed(x, y, context, classes_needed=False)
        return latents, log_abs_det

    def forward_and_log_det(
        self, z: Sequence[Tensor], y: Tensor | None = None, context: image_flow.Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """Undoes `inverse_and_log_det`; raises its errors, and a ValueError if the latents have other shapes."""
        shapes, parts = list(reversed(self.latent_shapes)), list(z) if isinstance(z, Sequence) else [z]
        for part in parts:
            checks.floating_point("latents", part)
        got = [tuple(part.shape) for part in parts]
        rows = got[0][:1] if got and got[0][:1] != (0,) else ("B",)
        if got != [(*rows, *shape) for shape in shapes]:
            raise ValueError(f"latents must have the shapes [B, *shape] for each shape of {shapes}, got {got}")
        condition = self._given(y, context, parts[0].shape[0], classes_needed=False)
        return self._from_latents([self._own("latents", part) for part in parts], condition.tensor)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state_dict of this flow, or of the same flow of nflows; see `torch.nn.Module.load_state_dict`."""
        return super().load_state_dict(self._renamed(state_dict), strict, assign)

    @contextmanager
    def _temperature(self, temperature: float | None) -> Iterator[None]:
        """Sets the temperature of the bases in this context; None keeps the one from `set_temperature`."""
        if temperature is None:
            yield
            return
        for base in self.q0:
            base.temperature = temperature
        try:
            with np.errstate(divide="ignore"):  # normflows computes its logarithm
                yield
        finally:
            for base in self.q0:
                base.temperature = None

    def _given(self, y: Any, context: Any, count: int | None, *, classes_needed: bool = True) -> image_flow.Condition:
        has_context = self.architecture.context_shape is not None
        both = y is not None and context is not None
        if both and not (has_context and self.architecture.num_classes is not None):
            raise ValueError("y and context must not both be given unless the flow has classes and a context")
        name = "y" if context is None and not has_context else "context"
        given = (y, context) if both else context if y is None else y
        return self._condition(name, given, count, classes_needed=classes_needed)

    def _analyzed(
        self, x: Tensor, y: Any, context: Any, noise: Any = None, *, classes_needed: bool = True
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Returns the latents of images in the order of `q0`, the log-determinant, and the classes."""
        numbers = self._to_numbers(x)
        classes, tensor = self._given(y, context, numbers.shape[0], classes_needed=classes_needed)
        numbers, log_abs_det = self.transform.inverse(numbers) if noise is None else self._with_noise(numbers, noise)
        latents, more = self._to_latents(numbers, tensor)
        return latents, log_abs_det + more, classes

    def _renamed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return state.for_normflows(state_dict, self.architecture)

    @property
    def _preprocessing(self) -> image_flow.Preprocessing:
        return self.transform.step

    def _to_latent(self, numbers: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        latents, log_abs_det = self._to_latents(numbers, context)
        return torch.cat([part.flatten(1) for part in reversed(latents)], 1), log_abs_det

    def _from_latent(self, latent: Tensor, context: Tensor | None) -> Tensor:
        parts = latent.split([math.prod(shape) for shape in self.latent_shapes], 1)
        latents = [part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]
        return self._merged(latents[::-1], context)[0]

    def _to_latents(self, numbers: Tensor, context: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Maps preprocessed data to latents in the order of `q0`."""
        latents: list[Tensor] = []
        total: Any = 0
        for level in reversed(range(self.num_levels)):
            step, squeeze = self.flows[level]
            numbers, log_abs_det = step.inverse(squeeze.inverse(numbers)[0], context)
            total = total + log_abs_det
            if level:
                (numbers, latent), _ = self.merges[level - 1].inverse(numbers)
                latents.insert(0, latent)
        return [numbers, *latents], total

    def _merged(self, latents: Sequence[Tensor], context: Tensor | None) -> tuple[Tensor, Any]:
        """Undoes `_to_latents`."""
        numbers, total = latents[0], 0
        for level in range(self.num_levels):
            step, squeeze = self.flows[level]
            if level:
                numbers, _ = self.merges[level - 1]([numbers, latents[level]])
            numbers, log_abs_det = step(numbers, context)
            numbers, total = squeeze(numbers)[0], total + log_abs_det
        return numbers, total

    def _from_latents(self, latents: Sequence[Tensor], context: Tensor | None) -> tuple[Tensor, Tensor]:
        numbers, total = self._merged(latents, context)
        images, log_abs_det = self.transform(numbers)
        return images, total + log_abs_det


@image_flow.with_arguments_of(image_flow.Architecture)
def finc_flow(data_shape: Sequence[int], levels: int, steps: int, **options: Any) -> ImageFlow:
    """Builds a `normflows.MultiscaleFlow` of images, sequences or volumes.

    Arguments and model are those of `nflows_kconv.flows.image_flow.Architecture`. Dequantisation and its
    log-determinant are part of the flow: `log_prob` takes images with values 0..255, and `sample` returns such images
    and their log-density. The condition of a call is its y or its context. With the same seed or weights it has the
    same density as `nflows_kconv.nflows.finc_flow`, and it loads the state_dict of that flow.

    Examples:
        >>> import torch
        >>> from nflows_kconv.normflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)  # 32 and 512: 46 million parameters
        >>> images = torch.randint(256, (10, 3, 32, 32))
        >>> loss = flow(images).mean()  # the negative log-likelihood; flow.forward_kld(images) is the same
        >>> samples, log_prob = flow.sample(5)
        >>> latent, log_abs_det = flow.encode(images)
        >>> torch.equal(flow.decode(latent), images.float())
        True

        Data of any range with a context:

        >>> flow = finc_flow((1, 8, 8), levels=1, steps=2, hidden_channels=8, preprocessing=None, context_shape=(5,))
        >>> flow.log_prob(torch.randn(10, 1, 8, 8), context=torch.randn(10, 5)).shape
        torch.Size([10])
        >>> samples, log_prob = flow.sample(context=torch.randn(3, 5))  # one for each row
    """
    return ImageFlow(image_flow.Architecture(data_shape, levels, steps, **options))


def load_flow(path: str | os.PathLike[str], device: torch.device | str | int = "cpu") -> ImageFlow:
    """Loads a flow from a file that `ImageFlow.save` wrote, in either library.

    The flow keeps the saved dtypes and is in training mode, like a new one. No random numbers are drawn.

    Args:
        path: The file.
        device: Where to put the parameters.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If there is no such file.
        ValueError: If the file is damaged, has a later format version, or was not written by `save`.
    """
    return image_flow.load(ImageFlow, path).to(device)


def _forward(flow: flows.Flow, value: bijection.Value, context: Any) -> tuple[bijection.Value, Tensor]:
    output, log_abs_det = flow(value) if context is None else flow(value, context)
    return output, _per_sample(type(flow).forward, log_abs_det, value)


def _inverse(flow: flows.Flow, value: bijection.Value, context: Any) -> tuple[bijection.Value, Tensor]:
    output, log_abs_det = flow.inverse(value) if context is None else flow.inverse(value, context)
    return output, _per_sample(type(flow).inverse, log_abs_det, value)


def _per_sample(method: Any, log_abs_det: Any, value: bijection.Value) -> Any:
    """Expands to [B] the log-determinants of normflows' layers that return one number for all samples."""
    own = method.__module__.partition(".")[0] == flows.__name__.partition(".")[0]
    return bijection.per_sample(log_abs_det, value) if own else log_abs_det


def _encode(flow: NormalizingFlow, x: Tensor, context: Any) -> tuple[bijection.Value, Tensor]:
    return flow.inverse_and_log_det(x, *_context(flow.inverse_and_log_det, context))


def _decode(flow: NormalizingFlow, z: bijection.Value, context: Any) -> tuple[Tensor, Tensor]:
    return flow.forward_and_log_det(z, *_context(flow.forward_and_log_det, context))


def _context(method: Any, context: Any) -> tuple[Any, ...]:
    """Returns the context without labels, which only select the base distribution."""
    return (context,) if context is not None and "context" in inspect.signature(method).parameters else ()


def _sample(flow: NormalizingFlow, num_samples: int, context: Any) -> Tensor:
    if context is None:
        return flow.sample(num_samples)[0]
    parameters = inspect.signature(flow.sample).parameters
    for name in ("context", "y"):
        if name in parameters and getattr(flow, "class_cond", True):
            return flow.sample(num_samples, **{name: context})[0]
    raise ValueError(f"context must be None for a {type(flow).__name__}, which is not conditional")


bijection.register(flows.Flow, forward=_forward, inverse=_inverse)
for _whole_flow in (NormalizingFlow, MultiscaleFlow):
    bijection.register(_whole_flow, forward=_encode, inverse=_decode, sample=_sample)
bijection.register(
    ClassCondFlow,  # has no methods for its transformation
    forward=lambda flow, x, context: _encode(NormalizingFlow(flow.q0, flow.flows), x, None),
    inverse=lambda flow, z, context: _decode(NormalizingFlow(flow.q0, flow.flows), z, None),
    sample=_sample,
)
for _coupling, _names in {
    flows.AffineCoupling: ("param_map",),
    flows.MaskedAffineFlow: ("s", "t"),
    Coupling: ("transform_net",),
}.items():
    bijection.register(_coupling, networks=_names)
