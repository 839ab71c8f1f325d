"""Runs dilated calls without dilated kernels: pixels that are d apart form an image of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nflows_kconv.backends.registry import OperatorCall


def run(call: OperatorCall, run_undilated: Callable[[OperatorCall], Tensor]) -> Tensor:
    """Runs a dilated call on the phases of its images, with phases of equal size in one batch.

    The first n mod d phases of n pixels have one pixel more than the others, so there are at most two sizes per axis.
    Phases cannot be padded: a side reads both ways, and would read solutions in the padding.
    """
    undilated, dilation = call._replace(dilation=[1] * len(call.dilation)), call.dilation
    if call.operation != "weight_gradient":
        output = torch.empty_like(call.input)
        count = len(dilation)
        for phases, outputs in zip(_phases(call.input, dilation), _phases(output, dilation), strict=True):
            solved = run_undilated(undilated._replace(input=_batch(phases, dilation)))
            # [phases of each axis ..., B, C, pixels of each ...]
            solved = solved.unflatten(0, phases.shape[: count + 1])
            if outputs.numel() == output.numel():  # writing in order is twice as fast
                order = [count, count + 1, *(dim for axis in range(count) for dim in (count + 2 + axis, axis))]
                joined = solved.permute(order).reshape(output.shape)
                return joined if joined.stride() == output.stride() else output.copy_(joined)
            outputs.copy_(solved)
        return output
    # Rounds half precision once, after the sum.
    input, grad = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (call.input, call.other))
    channels = input.shape[1]
    total = input.new_zeros(channels, channels // len(call.stencils), *call.kernel_size)
    for phases, grads in zip(_phases(input, dilation), _phases(grad, dilation), strict=True):
        total += run_undilated(undilated._replace(input=_batch(phases, dilation), other=_batch(grads, dilation)))
    return total.to(call.input.dtype)


def _phases(images: Tensor, dilation: Sequence[int]) -> Iterator[Tensor]:
    """Yields views [phases of each axis ..., B, C, ...] of images, one per size of the phases."""
    # From the size on, all steps do the same, and the stride of a larger one might overflow.
    dilation = [min(step, max(size, 1)) for size, step in zip(images.shape[2:], dilation, strict=True)]
    axes = []
    for size, step in zip(images.shape[2:], dilation, strict=True):
        pixels, rest = divmod(size, step)
        sizes = (0, rest, pixels + 1), (rest, step - rest, pixels)  # the first phase, how many, pixels of each
        axes.append([each for each in sizes if each[1] and each[2]])
    count = len(dilation)
    for kinds in itertools.product(*axes):
        view = images
        for axis, ((first, phases, pixels), step) in enumerate(zip(kinds, dilation, strict=True), 2):
            view = view.narrow(axis, first, (pixels - 1) * step + phases).unfold(axis, phases, step)
        yield view.movedim(tuple(range(-count, 0)), tuple(range(count)))


def _batch(phases: Tensor, dilation: Sequence[int]) -> Tensor:
    return phases.flatten(0, len(dilation))
