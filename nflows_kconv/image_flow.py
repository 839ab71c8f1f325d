"""The multiscale image flow of FInC Flow as modules that belong to no library; the adapters combine them.

Each of the L levels squeezes 2 x 2 pixels into channels, then takes K steps

    k x k convolution -> ActNorm -> invertible 1 x 1 convolution -> affine coupling

and, but for the last level, gives half of the channels, by a prior learned from the other half, to the latent variable
(FInC Flow, Kallappa, Nagar, Varma 2023, arXiv 2301.09266, section 4; without the convolution it is Glow, Kingma,
Dhariwal 2018, arXiv 1807.03039).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from nflows_kconv import checks, images, step
from nflows_kconv.layer import InvertibleConv2d
from nflows_kconv.reversible import Sequence as ReversibleSequence

Corners = str | Sequence[str] | Sequence[Sequence[str]]


class Level(NamedTuple):
    """What happens after a squeeze.

    Attributes:
        shape: (C, H, W) of what the steps work on.
        stack: The steps, the learned prior of the split included.
    """

    shape: tuple[int, int, int]
    stack: step.Sequence


class Preprocessing(step.Sequence):
    """Images with values 0..255 -> the real numbers: uniform dequantisation, then the logit with alpha = 1e-6.

    Args:
        image_shape: (C, H, W).

    Raises:
        ValueError: If a call has no image, or images of another shape, or values outside 0..255.
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__([images.UniformDequantization(), images.Logit()])
        self.image_shape = tuple(image_shape)

    def _run_forward(self, input: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        if input.dim() != 4 or tuple(input.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape [B, {expected}], got {tuple(input.shape)}")
        if not len(input):
            raise ValueError(f"images must hold at least one image, got shape {tuple(input.shape)}")
        return super()._run_forward(input, context)


def build_levels(
    image_shape: Sequence[int],
    levels: int,
    steps: int,
    *,
    hidden_channels: int,
    kernel_size: int | tuple[int, int] | None,
    corners: Corners,
    diagonal: Literal["unit", "learned"],
    max_inverse_gain: float | None,
    direction: Literal["forward", "inverse"],
    reversible: bool,
) -> list[Level]:
    """The levels of the flow, the one next to the data first; see `finc_flow` of the adapters.

    Raises:
        TypeError: If `image_shape` is no sequence, a number no integer, or `reversible` no truth value.
        ValueError: If a number is too small, the image does not divide into the levels, or a word is unknown.
    """
    if not isinstance(image_shape, Sequence):
        raise TypeError(f"image_shape must be (C, H, W), got {image_shape!r}")
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {image_shape!r}")
    numbers = {"levels": levels, "steps": steps, "hidden_channels": hidden_channels}
    for name, number in [*zip(("channels", "height", "width"), image_shape, strict=True), *numbers.items()]:
        checks.positive(name, number)
    channels, height, width = image_shape
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"height and width must be multiples of 2^levels = {2**levels} for {levels} levels, got {height} x {width}"
        )
    if not isinstance(reversible, bool):
        raise TypeError(f"reversible must be True or False, got {reversible!r}")
    if direction not in ("forward", "inverse"):
        raise ValueError(f'direction must be "forward" or "inverse", got {direction!r}')

    options = {"diagonal": diagonal, "max_inverse_gain": max_inverse_gain}
    built = []
    for level in range(1, levels + 1):
        channels, height, width = 4 * channels, height // 2, width // 2
        modules: list[nn.Module] = []
        for _ in range(steps):
            convolutions = [] if kernel_size is None else _convolutions(channels, kernel_size, corners, options)
            modules.append(
                step.Sequence(
                    [
                        *(step.Inverse(layer) if direction == "inverse" else layer for layer in convolutions),
                        step.ActNorm(channels),
                        step.InvertibleConv1x1(channels),
                        step.AffineCoupling(step.coupling_network(channels, hidden_channels)),
                    ]
                )
            )
        shape = (channels, height, width)
        if level < levels:
            modules.append(step.learned_prior(channels))
            channels //= 2
        built.append(Level(shape, ReversibleSequence(modules) if reversible else step.Sequence(modules)))
    return built


def _convolutions(
    channels: int, kernel_size: int | tuple[int, int], corners: Corners, options: dict[str, Any]
) -> list[nn.Module]:
    several = isinstance(corners, Sequence) and len(corners) > 0 and not isinstance(corners[0], str)
    layers = corners if several else (corners,)
    return [InvertibleConv2d(channels, kernel_size, corners=each, **options) for each in layers]  # type: ignore


def as_parameters_are(images: Tensor, flow: nn.Module) -> Tensor:
    """The images, of any dtype, in that of the flow's parameters.

    Raises:
        TypeError: If they are no tensor.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    return images.to(next(flow.parameters()).dtype)


def as_class_numbers(name: str, classes: Tensor | None, num_classes: int | None, count: int | None) -> Tensor | None:
    """The classes of `count` images, or of any number of them, as int64.

    Raises:
        TypeError: If they are no tensor of integers.
        ValueError: If they are missing or uncalled for, or their number or, looked at on the CPU alone, a value does
            not fit.
    """
    if num_classes is None:
        if classes is not None:
            raise ValueError(
                f"{name}, the labels, must be None, as the flow has no classes, got {type(classes).__name__}"
            )
        return None
    if classes is None:
        raise ValueError(f"{name} must give the classes of the images, as the flow has classes, got None")
    if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.is_complex():
        kind = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"{name} must be a tensor of whole numbers, the classes of the images, got {kind}")
    if classes.dim() != 1 or count not in (None, len(classes)):
        expected = "B" if count is None else count
        raise ValueError(f"{name} must have shape [{expected}], a class for each image, got {tuple(classes.shape)}")
    if checks.values_are_at_hand(classes) and not ((classes >= 0) & (classes < num_classes)).all():
        raise ValueError(f"{name} must be classes from 0 to {num_classes - 1}, got {classes.tolist()}")
    return classes.long()
