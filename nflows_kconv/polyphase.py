"""Dilation without dilated operators: the pixels that are d apart are an image of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def over_phases(function: Callable[[Tensor], Tensor], images: Tensor, dilation: Sequence[int]) -> Tensor:
    """Applies a function of images [B, C, ...] to the phases of images, which it takes as one batch.

    Where d divides the size of each axis, in one call. Else one axis after the other: of n pixels, the first n mod d
    phases have one more than the others, so that images of equal size are taken together, in at most two calls an axis.
    None is padded: a side reads both ways, and would read what it made of the padding.

    Args:
        function: Keeps the shape.
        images: [B, C, ...].
        dilation: d of each axis.
    """
    axis = next((axis for axis, step in enumerate(dilation) if step > 1), None)
    if axis is None:
        return function(images)
    if all([size % step == 0 for size, step in zip(images.shape[2:], dilation, strict=True)]):
        return _over_equal_phases(function, images, dilation)
    step, dim = dilation[axis], axis + 2
    other_axes = [1 if other == axis else each for other, each in enumerate(dilation)]

    def of_phases(phases: Tensor) -> Tensor:  # [B, C, ..., pixels, phases]
        batch = phases.movedim(-1, 0).flatten(0, 1).movedim(-1, dim)
        outputs = over_phases(function, batch, other_axes).movedim(dim, -1)
        return outputs.unflatten(0, (phases.shape[-1], -1)).movedim(0, -1)

    pixels = images.movedim(dim, -1)
    size = pixels.shape[-1]
    each, rest = size // step, size % step  # torch.compile knows no divmod of dynamic sizes
    whole = pixels[..., : each * step].unflatten(-1, (each, step))
    if rest == 0:
        return of_phases(whole).flatten(-2).movedim(-1, dim)
    longer = of_phases(torch.cat([whole[..., :rest], pixels[..., None, each * step :]], -2))
    whole = torch.cat([longer[..., :each, :], of_phases(whole[..., rest:])], -1)
    return torch.cat([whole.flatten(-2), longer[..., each, :]], -1).movedim(-1, dim)


def _over_equal_phases(function: Callable[[Tensor], Tensor], images: Tensor, dilation: Sequence[int]) -> Tensor:
    count = len(dilation)
    split = images
    for axis in reversed(range(count)):
        split = split.unflatten(axis + 2, (images.shape[axis + 2] // dilation[axis], dilation[axis]))
    # From [B, C, pixels, phases, pixels, phases, ...] to [phases, phases, ..., B, C, pixels, pixels, ...]
    order = [*range(3, 3 + 2 * count, 2), 0, 1, *range(2, 2 + 2 * count, 2)]
    phases = split.permute(order)
    outputs = function(phases.flatten(0, count)).unflatten(0, phases.shape[: count + 1])
    return outputs.permute([order.index(dim) for dim in range(len(order))]).reshape(images.shape)
