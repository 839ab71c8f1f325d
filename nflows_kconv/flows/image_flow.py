"""The multiscale flow of FInC Flow as library-independent modules, which the adapters combine."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nflows_kconv import checks, conditional, functional, ops, stencil
from nflows_kconv.flows import files, images, steps
from nflows_kconv.flows.images.dequantization import check_levels
from nflows_kconv.flows.reversible import Chain
from nflows_kconv.layer import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d
from nflows_kconv.periodic import PeriodicConv1d, PeriodicConv2d, PeriodicConv3d
from nflows_kconv.torch_internals import EXTRA_STATE, is_under_vmap

Corners = str | Sequence[str] | Sequence[Sequence[str]]
Shape = tuple[int, ...]
Context = Tensor | tuple[Tensor | None, Tensor]
Arguments = ParamSpec("Arguments")
Flow = TypeVar("Flow")

_LAYERS: dict[int, Any] = {1: InvertibleConv1d, 2: InvertibleConv2d, 3: InvertibleConv3d}
_PERIODIC_LAYERS: dict[int, Any] = {1: PeriodicConv1d, 2: PeriodicConv2d, 3: PeriodicConv3d}
_CONDITIONAL_LAYERS: dict[int, Any] = {
    1: conditional.ConditionalInvertibleConv1d,
    2: conditional.ConditionalInvertibleConv2d,
    3: conditional.ConditionalInvertibleConv3d,
}
_SIZES = {dimensions: ", ".join(axes) for dimensions, axes in stencil.AXES.items()}


@dataclass(frozen=True)
class Architecture:
    """The architecture of FInC Flow, a multiscale flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266, section 4).

    Each of the L levels squeezes two pixels along every axis into channels, then takes K steps

        k x k convolution -> ActNorm -> invertible 1 x 1 convolution -> affine coupling

    and, except for the last level, moves half of the channels to the latent variable, with a prior learned from the
    other half. Without the convolution it is Glow (Kingma, Dhariwal 2018, arXiv 1807.03039).

    Args:
        data_shape: (C, L) of sequences, (C, H, W) of images or (C, D, H, W) of volumes; the sizes must be multiples of
            2^levels.
        levels: L.
        steps: K, in each level.
        hidden_channels: Width of the coupling networks.
        kernel_size: See `InvertibleConv2d`; None omits the convolution, which makes the flow Glow.
        corners: See `InvertibleConv2d`; or a tuple of these, for one convolution each. The default is a pair of full
            convolutions in opposite corners, (("TL",), ("BR",)) for images; the paper's unit of four groups is
            ("TL", "TR", "BL", "BR").
        dilation: See `InvertibleConv2d`.
        diagonal: See `InvertibleConv2d`.
        max_inverse_gain: See `InvertibleConv2d`.
        padding_mode: "zeros", or "circular" for data on a ring or a torus. The convolutions are then `PeriodicConv2d`,
            without corners and dilation, with its default `max_inverse_gain` unless you give another, and the coupling
            networks have circular borders. Shifting data by multiples of 2^levels then shifts their latent.
        direction: "forward" convolves from data to latent and solves to sample; "inverse" does the opposite, as in
            Inverse-Flow (Nagar, Varma 2025, arXiv 2410.14634).
        num_levels: Data are whole numbers 0..num_levels - 1; 32 for images of 5 bits.
        preprocessing: "images" for whole numbers, or None for continuous data of any range: `log_prob` is then the
            density of the data themselves, and `sample` returns such data.
        num_classes: If given, the latent variable has a mean and a scale per class, and the condition of each call is
            the labels, [B] whole numbers.
        context_shape: (E,), or (E, ...) with as many sizes as the data have, or None. Each coupling and each learned
            prior then also takes a tensor, [B, *context_shape], the condition of each call: vectors at every pixel,
            others average-pooled to the level's size. It has no effect at initialization. With classes, the condition
            is (classes, tensor).
        conditional_kernels: Whether the convolutions' weights also depend on the context, see
            `ConditionalInvertibleConv2d`. The context must be a vector, `context_shape=(E,)`.
        reversible: Whether to train in memory independent of K, which takes more time, see
            `nflows_kconv.flows.reversible`. The state_dict is the same.

    Raises:
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If an argument has a wrong value, or a size of the data does not divide into the levels.
    """

    data_shape: Sequence[int]
    levels: int
    steps: int
    _: KW_ONLY
    hidden_channels: int = 512
    kernel_size: int | Sequence[int] | None = 3
    corners: Corners | None = None
    dilation: int | Sequence[int] = 1
    diagonal: Literal["unit", "learned"] = "unit"
    max_inverse_gain: float | None = None
    padding_mode: Literal["zeros", "circular"] = "zeros"
    direction: Literal["forward", "inverse"] = "forward"
    num_levels: int = 256
    preprocessing: Literal["images"] | None = "images"
    num_classes: int | None = None
    context_shape: Sequence[int] | None = None
    conditional_kernels: bool = False
    reversible: bool = False

    def __post_init__(self) -> None:  # noqa: D105
        checks.shape("data_shape", self.data_shape, {n + 1: f"(C, {sizes})" for n, sizes in _SIZES.items()})
        for name in ("levels", "steps", "hidden_channels"):
            checks.positive(name, getattr(self, name))
        if any(size % 2**self.levels for size in self.data_shape[1:]):
            raise ValueError(
                f"sizes in data_shape must be multiples of 2^levels = {2**self.levels} for {self.levels} levels, "
                f"got {' x '.join(map(str, self.data_shape[1:]))}"
            )
        for name in ("conditional_kernels", "reversible"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.direction not in ("forward", "inverse"):
            raise ValueError(f'direction must be "forward" or "inverse", got {self.direction!r}')
        if self.padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode must be "zeros" or "circular", got {self.padding_mode!r}')
        if self.padding_mode == "circular" and self.kernel_size is not None:
            self._check_circular(self.kernel_size)
        if self.preprocessing not in ("images", None):
            raise ValueError(f'preprocessing must be "images" or None, got {self.preprocessing!r}')
        if check_levels("num_levels", self.num_levels) != 256 and self.preprocessing is None:
            raise ValueError(
                f'num_levels needs preprocessing="images", got {self.num_levels} levels of continuous data'
            )
        if self.num_classes is not None:
            checks.positive("num_classes", self.num_classes)
        if self.context_shape is not None:
            n = self.dimensions
            checks.shape("context_shape", self.context_shape, {1: "(E,)", n + 1: f"(E, {_SIZES[n]})"})
        if self.conditional_kernels and (self.context_shape is None or len(self.context_shape) > 1):
            raise ValueError(f"conditional_kernels needs context_shape=(E,), got {self.context_shape!r}")
        if self.conditional_kernels and self.kernel_size is None:
            raise ValueError("conditional_kernels needs a kernel_size, got None")
        if self.conditional_kernels and self.padding_mode == "circular":
            raise ValueError('conditional_kernels needs padding_mode="zeros", got "circular"')

    def _check_circular(self, kernel_size: int | Sequence[int]) -> None:
        if self.corners is not None:
            raise ValueError(f'corners must be left out with padding_mode="circular", got {self.corners!r}')
        if set(functional.parse_dilation(self.dilation, self.dimensions)) != {1}:
            raise ValueError(f'dilation must be 1 with padding_mode="circular", got {self.dilation!r}')
        kernel, smallest = checks.per_axis("kernel_size", kernel_size, self.dimensions), self.level_shapes[-1][1:]
        if any(length > size for length, size in zip(kernel, smallest, strict=True)):
            raise ValueError(
                'kernel_size must be at most the size of the last level with padding_mode="circular", '
                f"{' x '.join(map(str, smallest))}, got {' x '.join(map(str, kernel))}"
            )

    @property
    def dimensions(self) -> int:
        """1 for sequences, 2 for images, 3 for volumes."""
        return len(self.data_shape) - 1

    @property
    def level_shapes(self) -> tuple[Shape, ...]:
        """(C, ...) of the data inside each level, starting with the level next to the data."""
        channels, *sizes = self.data_shape
        shapes = []
        for level in range(1, self.levels + 1):
            channels *= 2**self.dimensions
            shapes.append((channels, *(size >> level for size in sizes)))
            channels //= 2  # the other half moves to the latent
        return tuple(shapes)

    @property
    def latent_shapes(self) -> tuple[Shape, ...]:
        """(C, ...) of each level's part of the latent variable, the first split first."""
        *splits, last = self.level_shapes
        return (*((channels // 2, *sizes) for channels, *sizes in splits), last)

    def build_preprocessing(self) -> Preprocessing:
        """Builds the map from whole numbers or continuous data to the input of the first level."""
        return Preprocessing(self.data_shape, None if self.preprocessing is None else self.num_levels)

    def build_stacks(self) -> list[nn.Module]:
        """Builds the steps of each level, including the learned prior of its split."""
        context_channels = 0 if self.context_shape is None else self.context_shape[0]
        kind = Chain if self.reversible else steps.Sequence
        built: list[nn.Module] = []
        for level, (channels, *_) in enumerate(self.level_shapes, start=1):
            modules: list[nn.Module] = [self._step(channels, context_channels) for _ in range(self.steps)]
            if level < self.levels:
                modules.append(steps.learned_prior(channels, context_channels, self.dimensions, self.padding_mode))
            built.append(kind(modules))
        return built

    def _step(self, channels: int, context_channels: int) -> nn.Module:
        layers = [] if self.kernel_size is None else self._convolutions(channels, self.kernel_size)
        if self.direction == "inverse":
            layers = [steps.Inverse(layer) for layer in layers]
        rest = [steps.ActNorm(channels), steps.InvertibleConv1x1(channels)]
        network = steps.coupling_network(
            channels, self.hidden_channels, context_channels, self.dimensions, self.padding_mode
        )
        return steps.Sequence([*layers, *rest, steps.AffineCoupling(network, context_channels)])

    def _convolutions(self, channels: int, kernel_size: int | Sequence[int]) -> list[nn.Module]:
        if self.padding_mode == "circular":
            bound = {} if self.max_inverse_gain is None else {"max_inverse_gain": self.max_inverse_gain}
            return [_PERIODIC_LAYERS[self.dimensions](channels, kernel_size, diagonal=self.diagonal, **bound)]
        options = {name: getattr(self, name) for name in ("dilation", "diagonal", "max_inverse_gain")}
        classes = _LAYERS
        if self.conditional_kernels and self.context_shape is not None:
            classes, options["context_features"] = _CONDITIONAL_LAYERS, self.context_shape[0]
        return convolutions(classes[self.dimensions], channels, kernel_size, self.corners, **options)


Architecture.__init__.__qualname__ = "finc_flow"  # the name in Python's errors about unknown arguments


def with_arguments_of(source: Callable[Arguments, Any]) -> Callable[[Callable[..., Flow]], Callable[Arguments, Flow]]:
    """Gives a function that forwards its arguments the signature of `source`, for `inspect`, `help` and type checkers.

    Args:
        source: A class; the sections of its docstring from "Args:" go before the function's examples.
    """

    def decorate(function: Callable[..., Flow]) -> Callable[Arguments, Flow]:
        result = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(source).replace(return_annotation=result)  # type: ignore[attr-defined]
        summary, title, examples = (inspect.getdoc(function) or "").partition("Examples:")
        arguments = "".join((inspect.getdoc(source) or "").partition("Args:")[1:])
        function.__doc__ = f"{summary}{arguments}\n\n{title}{examples}"
        return function

    return decorate


def convolutions(
    layer_class: Any, channels: int, kernel_size: Any, corners: Corners | None, **options: Any
) -> list[Any]:
    """Builds a convolution, or one for each entry of `corners` that is itself what a layer takes; by default a pair."""
    if corners is None:
        first, *_, last = stencil.CORNERS[layer_class.dimensions]
        corners = ((first,), (last,))
    several = isinstance(corners, Sequence) and not all(isinstance(each, str) for each in corners)
    layers: Any = corners if several else (corners,)
    return [layer_class(channels, kernel_size, corners=each, **options) for each in layers]


class Preprocessing(steps.Sequence):
    """Data -> real numbers: uniform dequantisation, then the logit with alpha = 1e-6; the identity for continuous data.

    Args:
        data_shape: (C, ...).
        num_levels: Number of levels of whole numbers; None for continuous data.

    Raises:
        ValueError: In a call, if values are not in 0..num_levels - 1.
    """

    def __init__(self, data_shape: Sequence[int], num_levels: int | None) -> None:
        super().__init__([] if num_levels is None else [images.UniformDequantization(num_levels), images.Logit()])
        self.data_shape = tuple(data_shape)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        numbers, log_abs_det = super()._run_forward(_as_images(input), context)
        return numbers.reshape(input.shape), log_abs_det

    def _run_inverse(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        data, log_abs_det = super()._run_inverse(_as_images(input), context)
        return data.reshape(input.shape), log_abs_det

    def middle(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Does `forward` with the middle of each level instead of noise."""
        return self._dequantized("middle", input) if self.steps else self._run_forward(input, None)

    def with_noise(self, input: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Does `forward` with this noise in [0, 1), of the shape of the data."""
        return self._dequantized("with_noise", input, noise)

    def _dequantized(self, method: str, input: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        dequantization, logit = self.steps
        values, first = getattr(dequantization, method)(*map(_as_images, (input, *noise)))
        numbers, second = logit(values)
        return numbers.reshape(input.shape), first + second

    def check_shape(self, input: Tensor) -> None:
        """Raises a ValueError unless the input is [B, *data_shape] with at least one sample."""
        if input.dim() == 0 or tuple(input.shape[1:]) != self.data_shape:
            expected = ", ".join(map(str, self.data_shape))
            raise ValueError(f"data must have shape [B, {expected}], got {tuple(input.shape)}")
        if input.shape[0] == 0:
            raise ValueError(f"data must hold at least one sample, got shape {tuple(input.shape)}")


def _as_images(input: Tensor) -> Tensor:
    """Views data as [B, C, H, W] for `images`, where positions do not matter."""
    return input if input.dim() == 4 else input.flatten(2).unsqueeze(3)


class Condition(NamedTuple):
    """What data depend on.

    Attributes:
        classes: [B] of int64, or [B, num_classes] one-hot if the library's flow takes that; None if there are none.
        tensor: [B, E] or [B, E, ...] in the dtype of the parameters; None if the flow takes none.
    """

    classes: Tensor | None
    tensor: Tensor | None

    @property
    def rows(self) -> int | None:
        """B, or None without a condition."""
        given = self.classes if self.tensor is None else self.tensor
        return None if given is None else given.shape[0]


class Interface(nn.Module):
    """The common part of both libraries' flows, which the adapters combine with their library's flow.

    Attributes:
        architecture: The architecture of the flow.
    """

    architecture: Architecture
    _takes_one_hot = False

    @property
    def latent_shapes(self) -> tuple[Shape, ...]:
        """(C, ...) of the parts of a latent, starting with the split next to the data."""
        return self.architecture.latent_shapes

    def encode(self, images: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Returns the latent of data without noise: whole numbers count as mid-level, (x + 1/2) / num_levels.

        In float32 without TF32, `decode` restores the images exactly; images of 16 bits need float64. If it does not,
        the flow's inverse amplifies rounding errors: `nflows_kconv.diagnostics.round_trip` shows where.

        Args:
            images: [B, *data_shape], as for `log_prob`.
            context: As for `log_prob`; classes may be omitted, because they change only the latent's distribution.

        Returns:
            The latent, [B, D] for D numbers per sample: parts of the shapes `latent_shapes`, flattened and
            concatenated, the same in both libraries. And log |det d latent / d images|, [B].

        Raises:
            TypeError: See `log_prob`.
            ValueError: See `log_prob`.
        """
        numbers = self._to_numbers(images)
        condition = self._condition("context", context, numbers.shape[0], classes_needed=False)
        numbers, log_abs_det = self._preprocessing.middle(numbers)
        latent, more = self._to_latent(numbers, condition.tensor)
        return latent, log_abs_det + more

    def decode(self, latent: Tensor, context: Context | None = None) -> Tensor:
        """Returns the images of a latent, as `sample` does. A normal latent gives images drawn from the flow.

        With `preprocessing=None`, gradients reach the latent, the context and the parameters. Images are whole numbers,
        which pass no gradients, so they have no autograd graph.

        Args:
            latent: [B, D], as `encode` returns it.
            context: See `encode`.

        Returns:
            [B, *data_shape].

        Raises:
            TypeError: If the latent is not a floating-point tensor, or the context has the wrong type.
            ValueError: If the latent or the context has another shape.
        """
        dimensions = math.prod(self.architecture.data_shape)
        checks.floating_point("latent", latent)
        if latent.dim() != 2 or latent.shape[1] != dimensions or latent.shape[0] == 0:
            raise ValueError(f"latent must have shape [B, {dimensions}], got {tuple(latent.shape)}")
        latent = self._own("latent", latent)
        condition = self._condition("context", context, latent.shape[0], classes_needed=False)
        # Not torch.set_grad_enabled, which leaves in exported programs a region that torch cannot save.
        with nullcontext() if self.architecture.preprocessing is None else torch.no_grad():
            numbers = self._from_latent(latent, condition.tensor)
            return self._preprocessing.inverse(numbers)[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, buffers and the options of `finc_flow` to a file for `load_flow`.

        The format is safetensors, which runs no code when loaded. An existing file is replaced atomically. The training
        mode and the state of an optimizer are not saved.

        Args:
            path: The file; its folder must exist.

        Raises:
            ImportError: If safetensors is not installed.
            OSError: If the file cannot be written.
            TypeError: If the flow is not as `finc_flow` made it: its modules were replaced or wrapped, or its
                parameters are sharded.
        """
        _check_as_built(self)
        files.write(path, vars(self.architecture), self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Loads a file that `save` wrote in either library into this flow, which keeps its dtype and device.

        Raises:
            ImportError: If safetensors is not installed.
            OSError: If there is no such file.
            ValueError: If the file is damaged, has a later format version, has other options except `reversible`, or
                was not written by `save`. The flow then does not change.
        """
        loaded = load(type(self), path)
        own, other = (vars(flow.architecture) for flow in (self, loaded))
        own = files.as_read(own)
        different = [name for name in own if name != "reversible" and own[name] != other[name]]
        if different:
            raise ValueError(
                f"{os.fspath(path)} must hold a flow with the same options, "
                f"{', '.join(f'{name}={own[name]!r}' for name in different)}, got "
                f"{', '.join(f'{name}={other[name]!r}' for name in different)}"
            )
        self.load_state_dict(loaded.state_dict())

    @property
    def _preprocessing(self) -> Preprocessing:
        raise NotImplementedError

    def _to_latent(self, numbers: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps preprocessed data to the latent, [B, D], with the log-determinant."""
        raise NotImplementedError

    def _from_latent(self, latent: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _parameter(self) -> Tensor:
        """Returns one of the parameters, for their dtype and device.

        Raises:
            TypeError: If it is in half precision.
        """
        # Not next(self.parameters()): replicas of DataParallel have attributes instead of parameters.
        parameter = next(module for module in self.modules() if isinstance(module, steps.ActNorm)).log_scale
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"a flow's parameters must be float32 or float64, because its inverse needs their precision, got "
                f"{parameter.dtype}; for speed, run a float32 flow under torch.autocast: only its networks then use "
                "half precision"
            )
        return parameter

    def _to_numbers(self, images: Tensor) -> Tensor:
        """Converts images of any real dtype to the dtype of the parameters."""
        checks.real("data", images)
        if self.architecture.preprocessing is None and not images.is_floating_point():
            raise TypeError(f"continuous data must be floating-point, got {images.dtype}")
        self._preprocessing.check_shape(images)
        return self._own("data", images)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor in the dtype of the parameters; raises a ValueError if it is on another device."""
        like = self._like(name, tensor)
        tensor = tensor.to(like.dtype)
        # Of several flows at once, because nflows adds to numbers of their batch in place.
        return tensor + like.new_zeros(()) if is_under_vmap() else tensor

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """Returns one of the parameters; raises a ValueError if the tensor is on another device."""
        like = self._parameter()
        # Sharded and offloaded parameters come to the data later.
        if checks.is_plain(like) and not like.is_meta and tensor.device != like.device:
            raise ValueError(f"{name} must be on the flow's device {like.device}, got {tensor.device}")
        return like

    def _with_noise(self, numbers: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
        """Returns the result of the preprocessing with the user's noise."""
        if self.architecture.preprocessing is None:
            raise ValueError(f"noise must be None for continuous data, got {_kind(noise)}")
        checks.floating_point("noise", noise)
        if noise.shape != numbers.shape:
            raise ValueError(f"noise must have the data's shape {tuple(numbers.shape)}, got {tuple(noise.shape)}")
        if checks.can_inspect_values(noise) and not ((noise >= 0) & (noise < 1)).all():
            raise ValueError(
                f"noise must be at least 0 and less than 1, got {noise.min().item():g} to {noise.max().item():g}"
            )
        dtype = numbers.dtype
        below_one = 1 - torch.finfo(dtype).eps / 2  # rounding may carry smaller values up to 1
        return self._preprocessing.with_noise(numbers, self._own("noise", noise).clamp_max(below_one))

    def _condition(self, name: str, given: Any, count: int | None, *, classes_needed: bool = True) -> Condition:
        """Returns the condition of `count` images (None: any number) from the argument `name`.

        Raises:
            TypeError: If a part has the wrong type.
            ValueError: If a part is missing or unexpected, its number of rows is wrong or, checked only on the CPU, a
                class is out of range.
        """
        num_classes, context_shape = self.architecture.num_classes, self.architecture.context_shape
        if context_shape is None:
            return Condition(self._classes(name, given, count, classes_needed), None)
        classes = None
        if num_classes is not None:
            if not isinstance(given, (tuple, list)) or len(given) != 2:
                raise TypeError(
                    f"{name} must be (classes, tensor) for a flow with classes and a context, got {_kind(given)}"
                )
            classes, given = given
        of_tensor = name if num_classes is None else f"{name}[1]"
        tensor = self._own(of_tensor, _as_context(of_tensor, given, context_shape, count))
        if num_classes is not None:
            classes = self._classes(f"{name}[0]", classes, tensor.shape[0], classes_needed)
        return Condition(classes, tensor)

    def _classes(self, name: str, classes: Tensor | None, count: int | None, needed: bool) -> Tensor | None:
        """Returns the classes as int64, or one-hot if the library's flow takes that."""
        num_classes = self.architecture.num_classes
        if num_classes is None:
            if classes is not None:
                raise ValueError(
                    f"{name} must be None for a flow without classes or context, got {type(classes).__name__}"
                )
            return None
        if classes is None:
            if not needed:
                return None
            raise ValueError(f"{name} must give the classes of the images for a flow with classes, got None")
        checks.dense(name, classes)
        like, of_each_image = self._like(name, classes), checks.has_rows(classes, count)
        if self._takes_one_hot and of_each_image and tuple(classes.shape[1:]) == (num_classes,):
            return classes.to(like.dtype)
        if classes.is_floating_point() or classes.is_complex():
            raise TypeError(f"{name} must be whole numbers, the classes of the images, got {classes.dtype}")
        if classes.dim() != 1 or not of_each_image:
            expected = "B" if count is None else count
            raise ValueError(f"{name} must have shape [{expected}], one class per image, got {tuple(classes.shape)}")
        if checks.can_inspect_values(classes) and not ((classes >= 0) & (classes < num_classes)).all():
            raise ValueError(f"{name} must be classes from 0 to {num_classes - 1}, got {classes.tolist()}")
        if self._takes_one_hot:  # normflows' own conversion fixes the batch in torch.export, F.one_hot has no vmap
            return F.embedding(classes.long(), torch.eye(num_classes, dtype=like.dtype, device=like.device))
        return classes.long()


def load(flow_class: Callable[[Architecture], Flow], path: str | os.PathLike[str]) -> Flow:
    """Loads the flow of a file on the CPU, for `load_flow` of the libraries.

    Raises:
        ImportError: See `Interface.save`.
        OSError: See `Interface.load`.
        ValueError: See `Interface.load`.
    """
    options, tensors = files.read(path)
    try:
        architecture = Architecture(**options)
        if architecture.levels * architecture.steps > len(tensors):
            raise ValueError(f"{architecture.levels} levels of {architecture.steps} steps in {len(tensors)} tensors")
        with torch.device("meta"):
            flow: Any = flow_class(architecture)
    except (TypeError, ValueError, RuntimeError) as error:
        raise files.refusal(path, f"options that finc_flow does not take: {error}") from error
    renamed = {name: steps.of_earlier_files(tensor) for name, tensor in flow._renamed(tensors).items()}
    expected, found = _tensors(flow.state_dict()), _tensors(renamed)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise files.refusal(
                path, f"{found.get(name, 'nothing')} for {name}, which is {expected.get(name, 'unknown')} in its flow"
            )
    flow.load_state_dict(renamed, assign=True)
    return flow


def _tensors(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns descriptions of a state_dict's tensors; floating-point ones may have any of four dtypes."""
    return {
        name: f"{'floating-point' if tensor.dtype in ops.DTYPES else tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in state_dict.items()
        if not name.endswith(EXTRA_STATE)
    }


def _check_as_built(flow: Any) -> None:
    """Raises a TypeError unless the flow is as `finc_flow` builds it from its options."""
    with torch.device("meta"):
        built = type(flow)(flow.architecture)
    expected, found = _parts(built), _parts(flow)
    for name in [*found, *expected]:
        if expected.get(name) != found.get(name):
            raise TypeError(
                "a flow must be as finc_flow made it to be saved with its options, got "
                f"{found.get(name, 'nothing')} instead of {expected.get(name, 'nothing')} for "
                f"{name or 'the flow'}: save its state_dict() instead, gathered if it is sharded"
            )


def _parts(flow: nn.Module) -> dict[str, str]:
    """Returns the types of all modules and descriptions of the state_dict's tensors; the type of sharded tensors."""
    types = {name: type(module).__name__ for name, module in flow.named_modules(remove_duplicate=False)}
    tensors = flow.state_dict()
    special = {name: type(value).__name__ for name, value in tensors.items() if type(value) is not Tensor}
    return types | _tensors(tensors) | special


def _as_context(name: str, tensor: Any, shape: Sequence[int], count: int | None) -> Tensor:
    def expected() -> str:  # only for an error, because the compiler cannot write symbolic sizes
        return f"[{', '.join(map(str, ('B' if count is None else count, *shape)))}]"

    if tensor is None:
        raise ValueError(f"{name} must be a tensor of shape {expected()} for a flow with a context, got None")
    checks.real(name, tensor)
    if not checks.has_rows(tensor, count) or tuple(tensor.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} must have shape {expected()}, one row per image, got {tuple(tensor.shape)}")
    return tensor


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
