"""Hypothesis strategies for images, layers and flows that shrink to one pixel, one channel and one tap."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import stencil
from nflows_kconv.layer import InvertibleConv, InvertibleConv2d

try:
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ImportError as error:
    raise ImportError(
        'nflows_kconv.testing.strategies needs hypothesis: pip install "nflows-kconv[testing]"'
    ) from error

__all__ = ["corners", "flows", "images", "kernel_sizes", "layers", "noise", "register_profiles", "weight", "weights"]

_SEEDS = st.integers(0, 2**16)
_GENERATORS = _SEEDS.map(lambda seed: torch.Generator().manual_seed(seed))


def register_profiles() -> None:
    """Registers hypothesis profiles for `pytest --hypothesis-profile NAME`, and loads one.

    "default" draws 20 cases per test, "thorough" 1000. "ci" draws the same cases at every run and prints how to
    reproduce a failure. Loads "ci" if the environment variable CI is set, else "default". No profile has a deadline,
    because a busy machine is not a failure. Call it in conftest.py.
    """
    phases = [phase for phase in Phase if phase != Phase.explain]  # explaining traces every line, including torch's
    settings.register_profile(
        "default", max_examples=20, deadline=None, phases=phases, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
    settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
    settings.load_profile("ci" if "CI" in os.environ else "default")


def noise(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws normal noise, or values 0..255 for an integer dtype. A failure names drawn images by this call."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(256, tuple(shape), generator=generator).to(dtype)


@st.composite
def _shapes(draw: DrawFn, given: Sequence[int | None]) -> tuple[int, ...]:
    """Draws the sizes of [B, C, H, W] that are None."""
    shape = [
        draw(st.integers(1, most)) if size is None else size for size, most in zip(given, (3, 8, 6, 6), strict=True)
    ]
    free = [axis for axis in (0, 2, 3) if given[axis] is None]
    if free and shape[0] * shape[2] * shape[3] == 1:
        shape[free[0]] = 2
    return tuple(shape)


def images(
    channels: int | None = None,
    *,
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SearchStrategy[Tensor]:
    """Draws batches of images, [B, C, H, W]: normal noise, or values 0..255 for an integer dtype.

    A batch has at least two pixels, unless B, H and W are all given, so every channel has a variance for the
    initialisation of an ActNorm.

    Args:
        channels: C; 1 to 8 if None.
        batch: B; 1 to 3 if None.
        height: H; 1 to 6 if None.
        width: W; 1 to 6 if None.
        dtype: Dtype of the images.
    """
    shapes = _shapes((batch, channels, height, width))
    return st.builds(noise, shapes, _SEEDS, **({} if dtype == torch.float32 else {"dtype": st.just(dtype)}))


def corners(groups: int | None = None, dimensions: int = 2) -> SearchStrategy[tuple[str, ...]]:
    """Draws a corner or a side for each channel group; 1 to 4 groups if None."""
    least, most = (1, 4) if groups is None else (groups, groups)
    return st.lists(st.sampled_from(tuple(stencil.STENCILS[dimensions])), min_size=least, max_size=most).map(tuple)


def kernel_sizes(max_size: int = 4, dimensions: int = 2) -> SearchStrategy[tuple[int, ...]]:
    """Draws kernel sizes, (kh, kw) in two dimensions, even, odd and oblong."""
    return st.tuples(*[st.integers(1, max_size)] * dimensions)


def weights(
    conditioning: str = "well",
    *,
    corners: str | Sequence[str] = stencil.CORNERS[2],
    per_group: int | None = None,
    kernel_size: tuple[int, ...] | None = None,
    dimensions: int = 2,
    dtype: torch.dtype = torch.float32,
) -> SearchStrategy[Tensor]:
    """Draws weights for `nflows_kconv.functional.conv2d`, [C, C/G, kh, kw], or for `conv1d` or `conv3d`.

    With D the diagonal of the convolution A = D (1 - N), "well" draws |D| between 1/2 and 2 and absolute row sums of N
    up to 1/2: in the maximum norm, ||A^-1|| <= ||D^-1|| / (1 - ||N||) <= 4. "ill" draws |D| between 1/32 and 32 and N
    >= 0 with row sums of 2 away from the border, so nothing cancels in A^-1 = (1 + N + N^2 + ...) D^-1 and the inverse
    amplifies more for larger images.

    Args:
        conditioning: "well" or "ill".
        corners: One per channel group.
        per_group: C/G; 1 to 3 if None.
        kernel_size: (kh, kw); up to 4 along each axis if None.
        dimensions: Number of spatial dimensions.
        dtype: Dtype of the weight.

    Raises:
        ValueError: If `conditioning` is neither.
    """
    if conditioning not in ("well", "ill"):
        raise ValueError(f'conditioning must be "well" or "ill", got {conditioning!r}')
    return st.builds(
        weight,
        st.just(conditioning),
        st.just(corners),
        st.integers(1, 3) if per_group is None else st.just(per_group),
        kernel_sizes(dimensions=dimensions) if kernel_size is None else st.just(kernel_size),
        _SEEDS,
        st.just(dtype),
    )


def weight(
    conditioning: str,
    corners: str | Sequence[str],
    per_group: int,
    kernel_size: tuple[int, ...],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the weight that `weights` draws; failures print this call."""
    well, groups = conditioning == "well", stencil.parse(corners, len(kernel_size))
    shape, generator = (len(groups) * per_group, per_group, *kernel_size), torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    # Earlier draws keep their values while the kernel shrinks.
    column = shape[0], *[1] * (len(shape) - 1)
    sign = torch.where(uniform(*column) < 0.5, 1, -1)
    diagonal = sign * 2 ** ((2 * uniform(*column) - 1) * (1 if well else 5))
    coupling = 2 * uniform(*shape) - 1 if well else uniform(*shape)
    coupling[stencil.masked_entries(shape, groups, diagonal=True)] = 0
    coupling *= (0.5 if well else 2) / coupling.abs().flatten(1).sum(1).clamp_min(1e-300).view(column)
    return torch.where(stencil.diagonal_entries(shape, groups), diagonal, -diagonal * coupling).to(dtype)


@st.composite
def layers(
    draw: DrawFn,
    layer_class: Callable[..., InvertibleConv] = InvertibleConv2d,
    *,
    conditioning: str = "well",
    channels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> InvertibleConv:
    """Draws layers with corners, kernel sizes, options and parameters.

    Args:
        draw: Given by hypothesis.
        layer_class: `InvertibleConv1d`, `2d` or `3d` of the package or of an adapter.
        conditioning: See `weights`; for a unit diagonal, rows are divided by the diagonal.
        channels: C; 1 to 8 if None.
        dtype: Dtype of the parameters.
    """
    size = draw(st.integers(1, 8)) if channels is None else channels
    groups = draw(st.sampled_from([groups for groups in (1, 2, 3, 4) if size % groups == 0]))
    dimensions = getattr(layer_class, "dimensions", 2)
    names, diagonal, bias = (
        draw(corners(groups, dimensions)),
        draw(st.sampled_from(("unit", "learned"))),
        draw(st.booleans()),
    )
    per_group, float64 = size // groups, torch.float64
    drawn = draw(weights(conditioning, corners=names, per_group=per_group, dimensions=dimensions, dtype=float64))
    with torch.random.fork_rng(devices=[]):
        layer = layer_class(size, drawn.shape[2:], corners=names, diagonal=diagonal, bias=bias).to(dtype)
    scale = stencil.pivot_diagonal(drawn, stencil.parse(names, dimensions))
    rows = (scale if diagonal == "unit" else scale.sign()).view(-1, *[1] * (drawn.dim() - 1))
    with torch.no_grad():
        layer.raw_weight.copy_(drawn / rows)
        if layer.log_diagonal is not None:
            layer.log_diagonal.copy_(scale.abs().log())
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(size, generator=draw(_GENERATORS)))
    return layer


@st.composite
def flows(draw: DrawFn, finc_flow: Callable[..., Any], image_shape: tuple[int, int, int] = (1, 4, 4)) -> nn.Module:
    """Draws small flows of images with values 0..255 and changed parameters.

    Args:
        draw: Given by hypothesis.
        finc_flow: The `finc_flow` of an adapter.
        image_shape: (C, H, W), H and W multiples of 4.
    """
    generator = draw(_GENERATORS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        flow = finc_flow(
            image_shape,
            levels=draw(st.integers(1, 2)),
            steps=draw(st.integers(1, 2)),
            hidden_channels=4,
            kernel_size=draw(kernel_sizes(3)),
            corners=draw(st.sampled_from((("TL",), ("BR", "TL"), stencil.CORNERS[2], (("TL",), ("BR",))))),
            diagonal=draw(st.sampled_from(("unit", "learned"))),
            direction=draw(st.sampled_from(("forward", "inverse"))),
        )
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return flow
