"""Measures how much a layer and its inverse amplify: the operator 2-norms of A and A^-1 on images of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nflows_kconv import bound, checks, functional, ops, stencil
from nflows_kconv.conditional import ConditionalInvertibleConv
from nflows_kconv.float64 import to_float64
from nflows_kconv.layer import InvertibleConv
from nflows_kconv.periodic import PeriodicConv

Operator = Callable[[Tensor], Tensor]

# A vector orthogonal to the largest singular vector would seem to converge.
_STARTS = 8


class Conditioning(NamedTuple):
    """How a layer amplifies errors.

    Attributes:
        gain: ||A||_2, the largest factor by which the convolution amplifies.
        inverse_gain: ||A^-1||_2, the same for the inverse. With zero borders it never falls as the image grows; if
            `inverse_gain_bound` is infinite, it may grow without limit, even exponentially.
        condition_number: ||A||_2 ||A^-1||_2; a round trip may lose this many roundings.
        inverse_gain_bound: An upper bound on ||A^-1||_2 at any image size, see `max_inverse_gain`; infinity if none is
            known. With a unit diagonal it is at most `max_inverse_gain`.
    """

    gain: float
    inverse_gain: float
    condition_number: float
    inverse_gain_bound: float


@torch.no_grad()
def conditioning(
    layer: InvertibleConv | PeriodicConv,
    image_size: Sequence[int],
    *,
    exact: bool = False,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> Conditioning:
    """Measures how much a layer and its inverse amplify, in float64; on the CPU if the device has no float64.

    Estimates the norms from below, by power iteration on A^T A and A^-T A^-1 from several vectors, the same at each
    call. Large norms converge quickly to many digits; norms close to 1 may come out a few thousandths too small. Norms
    of a `PeriodicConv2d` are exact: the largest singular values of its matrices at all frequencies.

    Args:
        layer: A layer for any library. For a conditional layer, pass an `InvertibleConv2d` with one of its
            `weights(context)`.
        image_size: (L,), (H, W) or (D, H, W).
        exact: Whether to compute the largest singular values of the dense matrices, [CHW, CHW], instead, for small
            images.
        tolerance: Relative change between iterations at which the power iteration stops.
        max_iterations: Largest number of iterations.

    Returns:
        The norms; infinity if they overflow.

    Raises:
        TypeError: If `layer` is not an `InvertibleConv1d`, `2d` or `3d` or a `PeriodicConv1d`, `2d` or `3d`, or a size
            or a number of iterations is not an integer.
        ValueError: If a size or a number of iterations is not positive, `image_size` has the wrong length, or it is
            smaller than the kernel of a `PeriodicConv2d`.

    Examples:
        >>> from nflows_kconv import InvertibleConv2d
        >>> from nflows_kconv.diagnostics import conditioning
        >>> layer = InvertibleConv2d(12, corners="TL", max_inverse_gain=4)
        >>> gains = [conditioning(layer, (side, side)).inverse_gain for side in (4, 8, 16)]
        >>> max(gains) < 4
        True
    """
    if not isinstance(layer, InvertibleConv | PeriodicConv) or isinstance(layer, ConditionalInvertibleConv):
        raise TypeError(
            f"layer must be an InvertibleConv1d, 2d or 3d, or a PeriodicConv1d, 2d or 3d, got {type(layer).__name__}"
        )
    if not isinstance(image_size, Sequence) or len(image_size) != layer.dimensions:
        raise ValueError(f"image_size must have the layer's {layer.dimensions} dimensions, got {image_size!r}")
    sizes = checks.per_axis("image_size", image_size, layer.dimensions)
    checks.positive("max_iterations", max_iterations)

    weight = to_float64(layer.weight)
    if isinstance(layer, PeriodicConv):
        return _of_periodic(layer, weight, sizes)
    start = torch.randn(
        _STARTS, layer.num_channels, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(weight.device)
    stencils = stencil.parse(layer.corners, layer.dimensions)
    norms = []
    operations: tuple[ops.Operation, ...] = "conv", "solve"
    for operation in operations:

        def function(images: Tensor, operation: ops.Operation = operation) -> Tensor:
            return functional.run(operation, images, weight, None, None, stencils, False, layer.dilation)

        norm = _dense_norm(function, start) if exact else _power_iteration(function, start, tolerance, max_iterations)
        norms.append(norm)
    diagonal = stencil.pivot_diagonal(weight, stencils)
    on_diagonal = stencil.diagonal_entries(weight.shape, stencils, weight.device)
    relative = weight.masked_fill(on_diagonal, 0) / stencil.on_weight(diagonal, weight)
    return Conditioning(norms[0], norms[1], norms[0] * norms[1], _inverse_gain_bound(diagonal, relative))


def _of_periodic(layer: PeriodicConv, weight: Tensor, sizes: Sequence[int]) -> Conditioning:
    layer._check_size(sizes)
    values = torch.linalg.svdvals(layer._at_frequencies(weight, sizes))
    gain, inverse_gain = values.max().item(), 1 / values.min().item()
    diagonal = weight.new_ones(len(weight)) if layer.log_diagonal is None else to_float64(layer.log_diagonal).exp()
    relative = layer._relative(weight, diagonal)
    return Conditioning(gain, inverse_gain, gain * inverse_gain, _inverse_gain_bound(diagonal, relative))


def _dense_norm(operator: Operator, images: Tensor) -> float:
    identity = torch.eye(images[0].numel(), dtype=images.dtype, device=images.device)
    rows = operator(identity.view(-1, *images.shape[1:])).flatten(1)  # rows of the transpose
    return torch.linalg.matrix_norm(rows, 2).item() if rows.isfinite().all() else math.inf


def _power_iteration(operator: Operator, vectors: Tensor, tolerance: float, max_iterations: int) -> float:
    norm = 0.0
    vectors = vectors / _norms(vectors)
    for _ in range(max_iterations):
        with torch.enable_grad():
            outputs = operator(vectors.requires_grad_())
        norms = _norms(outputs.detach())
        last, norm = norm, norms.max().item()
        if not math.isfinite(norm):
            return math.inf
        if abs(norm - last) <= tolerance * norm:
            break
        # Applies the transpose to the outputs.
        (vectors,) = torch.autograd.grad(outputs, vectors, outputs.detach() / norms)
        vectors = vectors / _norms(vectors)
    return norm


def _norms(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images, dim=list(range(1, images.dim())), keepdim=True)


def _inverse_gain_bound(diagonal: Tensor, relative: Tensor) -> float:
    """Returns the bound on the inverse of D (I + N), see `bound`, given D and the weight of N."""
    norms = bound.off_diagonal_norm(relative)
    inverses = diagonal.abs().reciprocal().unflatten(0, (len(norms), -1)).amax(1)
    return torch.where(norms < 1, inverses / (1 - norms), math.inf).max().item()
