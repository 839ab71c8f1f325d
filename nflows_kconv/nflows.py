"""The layer and the image flow for nflows, whose forward direction is data -> noise: the convolution."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import bijection, checks, conditional, layer, periodic
from nflows_kconv.flows import image_flow, state, steps
from nflows_kconv.flows.reversible import cascade
from nflows_kconv.invertible import InvertibleModule

try:
    from nflows.distributions import Distribution
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MultiscaleCompositeTransform
    from nflows.transforms.base import InverseNotAvailable, Transform
    from nflows.transforms.coupling import CouplingTransform
    from nflows.transforms.linear import Linear
except ImportError as error:
    raise ImportError('nflows_kconv.nflows needs nflows: pip install "nflows-kconv[nflows]"') from error

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "ImageFlow",
    "InvertibleConv1d",
    "InvertibleConv1x1",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
    "ReversibleCompositeTransform",
    "Step",
    "finc_flow",
    "load_flow",
]


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


class InvertibleConv1d(layer.InvertibleConv1d, Transform):
    """`nflows_kconv.InvertibleConv1d` as an `nflows.transforms.Transform`; see `InvertibleConv2d`."""


class InvertibleConv3d(layer.InvertibleConv3d, Transform):
    """`nflows_kconv.InvertibleConv3d` as an `nflows.transforms.Transform`; see `InvertibleConv2d`."""


class InvertibleConv1x1(steps.InvertibleConv1x1, Transform):
    """`flows.steps.InvertibleConv1x1` as an `nflows.transforms.Transform`, to replace `OneByOneConvolution`."""


class PeriodicConv2d(periodic.PeriodicConv2d, Transform):
    """`nflows_kconv.PeriodicConv2d` as an `nflows.transforms.Transform`, in `InvertibleConv2d`'s directions."""


class PeriodicConv1d(periodic.PeriodicConv1d, Transform):
    """`nflows_kconv.PeriodicConv1d` as an `nflows.transforms.Transform`; see `PeriodicConv2d`."""


class PeriodicConv3d(periodic.PeriodicConv3d, Transform):
    """`nflows_kconv.PeriodicConv3d` as an `nflows.transforms.Transform`; see `PeriodicConv2d`."""


class ConditionalInvertibleConv2d(conditional.ConditionalInvertibleConv2d, Transform):
    """`nflows_kconv.ConditionalInvertibleConv2d` as an `nflows.transforms.Transform`; takes the context of each call.

    Examples:
        >>> import torch
        >>> from nflows.distributions import StandardNormal
        >>> from nflows.flows import Flow
        >>> from nflows_kconv.nflows import ConditionalInvertibleConv2d
        >>> flow = Flow(ConditionalInvertibleConv2d(4, context_features=3), StandardNormal((4, 8, 8)))
        >>> flow.log_prob(torch.randn(10, 4, 8, 8), torch.randn(10, 3)).shape
        torch.Size([10])
    """


class ConditionalInvertibleConv1d(conditional.ConditionalInvertibleConv1d, Transform):
    """`nflows_kconv.ConditionalInvertibleConv1d` as an `nflows.transforms.Transform`."""


class ConditionalInvertibleConv3d(conditional.ConditionalInvertibleConv3d, Transform):
    """`nflows_kconv.ConditionalInvertibleConv3d` as an `nflows.transforms.Transform`."""


class Step(InvertibleModule, Transform):
    """A module of `nflows_kconv.flows.steps` as an `nflows.transforms.Transform`.

    Args:
        step: A module with `forward` from data to noise and `inverse`, both of which return a log-determinant, [B].
    """

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def _run_forward(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step(input, context)

    def _run_inverse(self, input: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.step.inverse(input, context)  # type: ignore[operator]


class ReversibleCompositeTransform(InvertibleModule, CompositeTransform):
    """`nflows.transforms.CompositeTransform` that trains in memory independent of the number of transforms.

    Parameters, state_dict and results are the same. Only one transform's activations exist at a time, so combine the
    transforms of a step in one `CompositeTransform`. See `nflows_kconv.flows.reversible.cascade` for how it works and
    what it requires.

    Args:
        transforms: Invertible transforms; the first one takes the data.

    Examples:
        >>> from nflows.transforms import ActNorm, CompositeTransform
        >>> from nflows_kconv.nflows import InvertibleConv2d, ReversibleCompositeTransform
        >>> steps = [CompositeTransform([InvertibleConv2d(12), ActNorm(12)]) for _ in range(32)]
        >>> transform = ReversibleCompositeTransform(steps)
    """

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self._transforms, context)  # type: ignore[arg-type]

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return cascade(input, self._transforms, context, inverse=True)  # type: ignore[arg-type]


class _Latent(Distribution):
    """Standard normal, or normal with a mean and a scale per class, with the class as context.

    The distributions of nflows keep a constant in a float64 buffer, which `to_empty` does not initialize and some
    devices do not support.
    """

    def __init__(self, dimensions: int, num_classes: int | None) -> None:
        super().__init__()
        self._context_encoder = None
        if num_classes is not None:
            self._context_encoder = nn.Embedding(num_classes, 2 * dimensions)  # means, then log-scales
            nn.init.zeros_(self._context_encoder.weight)

    def scaled(self, noise: Tensor, classes: Tensor | None) -> Tensor:
        """Returns a sample, given standard normal noise."""
        if self._context_encoder is None:
            return noise
        mean, log_scale = self._context_encoder(classes).chunk(2, 1)
        return mean + log_scale.exp() * noise

    # Not _log_prob: nflows' own log_prob moves its arguments to torch's default device.
    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        constant = 0.5 * math.log(2 * math.pi) * inputs.shape[1]
        if self._context_encoder is None:
            return -0.5 * inputs.square().sum(1) - constant
        mean, log_scale = self._context_encoder(context).chunk(2, 1)
        normal = (inputs - mean) * log_scale.neg().exp()
        return -(0.5 * normal.square() + log_scale).sum(1) - constant


class _TransformContext(nn.Module):
    """Selects the part of a flow's context that the transform sees: everything except the classes."""

    def __init__(self, architecture: image_flow.Architecture) -> None:
        super().__init__()
        self._architecture = architecture

    def forward(self, context: image_flow.Context | None) -> Tensor | None:
        if self._architecture.context_shape is None:
            return None
        return context[1] if isinstance(context, (tuple, list)) else context


class ImageFlow(image_flow.Interface, Flow):
    """The `nflows.flows.Flow` that `finc_flow` makes.

    Images may have any real dtype. The context of each call is what the flow was built for: classes, [B] whole numbers;
    a tensor, [B, *context_shape]; or a pair of both.

    Args:
        architecture: What to build.
    """

    _transform: CompositeTransform
    _distribution: _Latent

    def __init__(self, architecture: image_flow.Architecture) -> None:
        multiscale = MultiscaleCompositeTransform(num_transforms=architecture.levels)
        for stack, shape in zip(architecture.build_stacks(), architecture.level_shapes, strict=True):
            multiscale.add_transform(CompositeTransform([Step(steps.Squeeze()), Step(stack)]), shape)
        super().__init__(
            CompositeTransform([Step(architecture.build_preprocessing()), multiscale]),
            _Latent(math.prod(architecture.data_shape), architecture.num_classes),
            _TransformContext(architecture),
        )
        self.architecture = architecture

    def forward(self, inputs: Tensor, context: image_flow.Context | None = None, noise: Tensor | None = None) -> Tensor:
        """Returns `log_prob`, for wrappers such as DistributedDataParallel."""
        latent, log_abs_det, classes = self._analyzed(inputs, context, noise)
        return self._distribution.log_prob(latent, classes) + log_abs_det

    def log_prob(
        self, inputs: Tensor, context: image_flow.Context | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns the log-density of images, [B].

        Args:
            inputs: [B, *data_shape], whole numbers 0..num_levels - 1, or with `preprocessing=None` floating-point
                numbers.
            context: See `ImageFlow`.
            noise: Dequantisation noise in [0, 1), of the shape of the images, such as `torch.rand` gives. None draws
                it.

        Raises:
            TypeError: If the images, the noise or a part of the context have the wrong type, or the flow's parameters
                are in half precision.
            ValueError: If the images have another shape than the flow's, or invalid values (see
                `nflows_kconv.flows.images.UniformDequantization` for when they are checked); if the context or the
                noise does not fit, is missing, or is not expected.
        """
        return self(inputs, context, noise)

    @torch.no_grad()
    def sample(
        self, num_samples: int, context: image_flow.Context | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Draws data, [num_samples, *data_shape], or [B, num_samples, *data_shape] for a context of B rows.

        Samples have no autograd graph; for gradients of samples, `decode` noise.

        Args:
            num_samples: How many to draw, for each row of the context.
            context: See `ImageFlow`.
            batch_size: How many to draw at a time, for each row of the context. None draws all at once.

        Raises:
            TypeError: If a number is not an integer; see `log_prob`.
            ValueError: If a number is not positive; see `log_prob`.
        """
        checks.positive("num_samples", num_samples)
        size = num_samples if batch_size is None else checks.positive("batch_size", batch_size)
        condition = self._condition("context", context, None)
        parts = []
        for start in range(0, num_samples, size):
            number = min(size, num_samples - start)
            latent, _, tensor = self._draw(number, condition)
            parts.append(_by_row(self._transform.inverse(latent, tensor)[0], condition, number))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 0 if condition.rows is None else 1)

    @torch.no_grad()
    def sample_and_log_prob(self, num_samples: int, context: image_flow.Context | None = None) -> tuple[Tensor, Tensor]:
        """Draws as `sample` does, and also returns the log-density, [num_samples] or [B, num_samples]."""
        checks.positive("num_samples", num_samples)
        condition = self._condition("context", context, None)
        latent, classes, tensor = self._draw(num_samples, condition)
        images, log_abs_det = self._transform.inverse(latent, tensor)
        log_prob = self._distribution.log_prob(latent, classes) - log_abs_det
        return _by_row(images, condition, num_samples), _by_row(log_prob, condition, num_samples)

    def transform_to_noise(self, inputs: Tensor, context: image_flow.Context | None = None) -> Tensor:
        """Returns the latent of images, [B, D], as `encode` does but with dequantisation noise."""
        return self._analyzed(inputs, context, classes_needed=False)[0]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state_dict of this flow, or of the same flow of normflows; see `torch.nn.Module.load_state_dict`."""
        return super().load_state_dict(self._renamed(state_dict), strict, assign)

    def _analyzed(
        self, inputs: Tensor, context: Any, noise: Any = None, *, classes_needed: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the latent of images, the log-determinant, and the classes."""
        numbers = self._to_numbers(inputs)
        classes, tensor = self._condition("context", context, numbers.shape[0], classes_needed=classes_needed)
        if noise is None:
            return *self._transform(numbers, tensor), classes
        numbers, first = self._with_noise(numbers, noise)
        latent, second = self._to_latent(numbers, tensor)
        return latent, first + second, classes

    def _renamed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return state.for_nflows(state_dict, self.architecture)

    @property
    def _preprocessing(self) -> image_flow.Preprocessing:
        return self._transform._transforms[0].step

    def _to_latent(self, numbers: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._transform._transforms[1](numbers, context)

    def _from_latent(self, latent: Tensor, context: Tensor | None) -> Tensor:
        return self._transform._transforms[1].inverse(latent, context)[0]

    def _draw(self, number: int, condition: image_flow.Condition) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draws latents, and repeats classes and context, for this many images per row of the condition."""
        classes, tensor = (None if part is None else part.repeat_interleave(number, 0) for part in condition)
        like, rows = self._parameter(), number * (1 if condition.rows is None else condition.rows)
        noise = torch.randn(rows, math.prod(self.architecture.data_shape), dtype=like.dtype, device=like.device)
        return self._distribution.scaled(noise, classes), classes, tensor


def _by_row(values: Tensor, condition: image_flow.Condition, number: int) -> Tensor:
    """Views [B N, ...] as [B, N, ...] for a condition of B rows."""
    return values if condition.rows is None else values.unflatten(0, (condition.rows, number))


@image_flow.with_arguments_of(image_flow.Architecture)
def finc_flow(data_shape: Sequence[int], levels: int, steps: int, **options: Any) -> ImageFlow:
    """Builds an `nflows.flows.Flow` of images, sequences or volumes, with a `MultiscaleCompositeTransform`.

    Arguments and model are those of `nflows_kconv.flows.image_flow.Architecture`. Dequantisation and its
    log-determinant are part of the flow: `log_prob` takes images with values 0..255, and `sample` returns such images.
    The condition of a call is its context. With the same seed or weights it has the same density as
    `nflows_kconv.normflows.finc_flow`, and it loads the state_dict of that flow.

    Examples:
        >>> import torch
        >>> from nflows_kconv.nflows import finc_flow
        >>> flow = finc_flow((3, 32, 32), levels=3, steps=2, hidden_channels=64)  # 32 and 512: 46 million parameters
        >>> images = torch.randint(256, (10, 3, 32, 32))
        >>> loss = -flow(images).mean()  # log_prob, and what DistributedDataParallel and torch.compile wrap
        >>> flow.sample(5).shape
        torch.Size([5, 3, 32, 32])
        >>> latent, log_abs_det = flow.encode(images)
        >>> torch.equal(flow.decode(latent), images.float())
        True

        Data of any range with a context:

        >>> flow = finc_flow((1, 8, 8), levels=1, steps=2, hidden_channels=8, preprocessing=None, context_shape=(5,))
        >>> flow.log_prob(torch.randn(10, 1, 8, 8), torch.randn(10, 5)).shape
        torch.Size([10])
        >>> flow.sample(3, torch.randn(2, 5)).shape  # three for each row
        torch.Size([2, 3, 1, 8, 8])
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


def _forward(flow: Flow, inputs: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    return flow._transform(inputs, flow._embedding_net(context))


def _inverse(flow: Flow, noise: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    return flow._transform.inverse(noise, flow._embedding_net(context))


def _sample(flow: Flow, num_samples: int, context: Any) -> Tensor:
    return flow.sample(num_samples) if context is None else flow.sample(1, context)[:, 0]


def _says_no_inverse(error: Exception) -> bool:
    return isinstance(error, InverseNotAvailable)


bijection.register(Flow, forward=_forward, inverse=_inverse, sample=_sample, says_no_inverse=_says_no_inverse)
# With the checks and the dtypes of the other methods.
bijection.register(ImageFlow, forward=lambda flow, x, context: flow._analyzed(x, context, classes_needed=False)[:2])
bijection.register(Transform, says_no_inverse=_says_no_inverse)
bijection.register(CouplingTransform, networks=("transform_net",))
bijection.register(
    Linear,
    why_not_captured=lambda layer: (
        "keeps using its cached matrices: call use_cache(False)" if layer.using_cache else None
    ),
)
