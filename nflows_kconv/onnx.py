"""Translates the operators for torch's exporter to ONNX.

    torch.onnx.export(module, inputs, dynamo=True, custom_translation_table=nflows_kconv.onnx.translation_table())

A convolution becomes a Pad and a Conv per group of channels, see `ops`. This module translates the solution. In the
canonical frame of `stencil`, the pixels of one time tau . p depend only on earlier times. They are laid out by time and
by row (all axes but the last) and solved by a Scan, with one Conv over the earlier times per step. With the pivot P:

    x[t, r] = P^-1 y[t, r] - sum_l P^-1 W[l] x[t - tau . l, r - l]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Sequence  # noqa: UP035 - onnxscript supports no other on Python 3.10

import torch
from torch import Tensor

from nflows_kconv import ops, stencil

try:
    from onnxscript import BOOL, FLOAT, graph, ir, script
    from onnxscript import opset18 as op
    from onnxscript.values import Opset
except ImportError as error:
    raise ImportError('nflows_kconv.onnx needs onnxscript: pip install "nflows-kconv[onnx]"') from error

__all__ = ["translation_table"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the `custom_translation_table` with which `torch.onnx.export` exports layers and flows of this package.

    The batch size may be dynamic, and so may the image size if the module accepts any. ONNX Runtime's results equal
    torch's to rounding. Periodic layers, and conditional layers with a dynamic batch size, cannot be exported: the
    exporter's error message contains their `NotImplementedError`.

    Examples:
        >>> import torch
        >>> import nflows_kconv.onnx
        >>> from nflows_kconv import InvertibleConv2d
        >>> program = torch.onnx.export(
        ...     InvertibleConv2d(4).eval(),
        ...     (torch.randn(2, 4, 8, 8),),
        ...     dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        ...     dynamo=True,
        ...     custom_translation_table=nflows_kconv.onnx.translation_table(),
        ...     verbose=False,
        ... )
    """
    return {ops.solve: _solve, torch.ops.aten.linalg_solve_triangular.default: _solve_triangular}


def _solve(
    input: Any,
    weight: Any,
    bias: Any,
    log_diagonal: Any,
    stencils: Sequence[int],
    dilation: Sequence[int],
    unit_diagonal: bool,
    transpose: bool,
    repeats: int = 1,
) -> Any:
    """Translates `ops.solve`."""
    stencils = [*stencils] * repeats
    dtype, dimensions, count = input.dtype, len(dilation), len(stencils)
    channels, per_group, *kernel_size = weight.shape
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        input, weight, bias, log_diagonal = (
            value if value is None else op.Cast(value, to=ir.DataType.FLOAT)
            for value in (input, weight, bias, log_diagonal)
        )
    if bias is not None:
        input = op.Sub(input, op.Reshape(bias, [-1, *[1] * dimensions]))
    images, weight = _split(input, count), op.Reshape(weight, [-1])
    # The index of each entry in the weight.
    entries = torch.arange(channels * per_group * math.prod(kernel_size)).view(count, -1, per_group, *kernel_size)
    outputs: dict[int, Any] = {}
    for family in {stencil.family(code) for code in stencils}:
        members = [group for group, code in enumerate(stencils) if stencil.family(code) == family]
        frames = [stencil.opposite(stencils[g], dimensions) if transpose else stencils[g] for g in members]
        taps = torch.stack([stencil.canonical(entries[g], stencils[g], dimensions) for g in members]).flatten(3)
        if transpose:
            taps = taps.transpose(1, 2)
        lags = stencil.lags(family, kernel_size)
        *others, pivot = taps[..., : len(lags)].unbind(3)
        if unit_diagonal:
            diagonal = op.CastLike(_constant(torch.ones(pivot.shape[:2])), weight)
        elif log_diagonal is not None:
            diagonal = op.Exp(op.Gather(log_diagonal, _constant(torch.arange(channels).view(count, -1)[members])))
        else:
            diagonal = op.Gather(weight, _constant(pivot.diagonal(dim1=1, dim2=2)))
        inverse = _inverse(op.Gather(weight, _constant(pivot)), diagonal, per_group, transpose)
        y = _joined([_canonical(images[g], frame, dimensions) for g, frame in zip(members, frames, strict=True)])
        x = op.Reshape(op.MatMul(inverse, op.Reshape(y, [0, len(members), per_group, -1])), op.Shape(y))
        if others:
            relative = op.MatMul(inverse, op.Gather(weight, _constant(torch.cat(others, 2))))
            relative = op.Reshape(relative, [len(members) * per_group, len(others), per_group])
            steps = stencil.exchanged(family, dilation)
            dilated = [[length * step for length, step in zip(lag, steps, strict=True)] for lag in lags[:-1]]
            x = _substitute(x, relative, dilated, len(members))
        for g, frame, part in zip(members, frames, _split(x, len(members)), strict=True):
            outputs[g] = _from_canonical(part, frame, dimensions)
    return op.Cast(_joined([outputs[group] for group in range(count)]), to=dtype)


def _substitute(y: Any, weight: Any, lags: Sequence[Sequence[int]], groups: int) -> Any:
    """Solves x[p] = y[p] - sum_l weight[l] x[p - l] for x, given y, [B, C, ...], and the weight, [C, lags, C/G]."""
    tau = stencil.schedule(lags)
    axes = len(tau)
    *heights, width = (op.Squeeze(op.Shape(y, start=axis, end=axis + 1)) for axis in range(2, axes + 2))
    duration = sum((t * (height - 1) for t, height in zip(tau[:-1], heights, strict=True)), width)
    time, *rows = (_range(size, axis, axes) for axis, size in enumerate((duration, *heights)))
    column = time - sum(t * row for t, row in zip(tau[:-1], rows, strict=True))
    inside = op.And(op.GreaterOrEqual(column, 0), op.Less(column, width))
    places = _place((*rows, op.Where(inside, column, 0)), (*heights, width))
    by_time = op.Transpose(op.Gather(op.Reshape(y, [0, 0, -1]), places, axis=2), perm=[2, 0, 1, *range(3, axes + 2)])

    reads = [(sum(t * length for t, length in zip(tau, lag, strict=True)), *lag[:-1]) for lag in lags]
    kernel, options = _kernel(weight, reads)
    times = op.Constant(value_ints=[max(time for time, *_ in reads)])
    before = op.Concat(op.Shape(by_time, start=1, end=3), times, op.Shape(by_time, start=3), axis=0)
    zeros = op.Expand(op.CastLike(0.0, y), before)
    x = _scan(zeros, by_time, op.Unsqueeze(inside, [1, 2]), kernel, groups=groups, **options)

    x = op.Reshape(op.Transpose(x, perm=[1, 2, 0, *range(3, axes + 2)]), [0, 0, -1])
    *rows, column = (_range(size, axis, axes) for axis, size in enumerate((*heights, width)))
    time = sum((t * row for t, row in zip(tau[:-1], rows, strict=True)), column)
    return op.Gather(x, _place((time, *rows), (duration, *heights)), axis=2)


def _kernel(weight: Any, reads: Sequence[Sequence[int]]) -> tuple[Any, dict[str, list[int]]]:
    """Returns the kernel of a step and the options of its Conv, for taps with these lags in time and along rows.

    The kernel ends with the last time that has a tap, and with the row itself. A tap of zeros fills positions without
    one.
    """
    axes = len(reads[0])
    furthest = [max(distances) for distances in zip(*reads, strict=True)]
    apart = [math.gcd(*distances) or 1 for distances in zip(*reads, strict=True)]
    sizes = [far // step + (axis > 0) for axis, (far, step) in enumerate(zip(furthest, apart, strict=True))]
    taps = torch.full(sizes, len(reads))
    for tap, read in enumerate(reads):
        taps[tuple((far - near) // step for far, near, step in zip(furthest, read, apart, strict=True))] = tap
    kernel = op.Gather(op.Pad(weight, [0, 0, 0, 0, 1, 0]), _constant(taps), axis=1)
    options = {"dilations": apart, "pads": [0, *furthest[1:], *[0] * axes], "strides": [apart[0], *[1] * (axes - 1)]}
    return op.Transpose(kernel, perm=[0, axes + 1, *range(1, axes + 1)]), options


@script(Opset("nflows_kconv", 1), default_opset=op)
def _scan(
    before: FLOAT,
    y: FLOAT,
    inside: BOOL,
    weight: FLOAT,
    groups: int,
    dilations: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
) -> FLOAT:
    """Computes x by time, [T, B, C, ...]; `before`, [B, C, times, ...], holds x before time 0."""

    @graph()
    def step(known, y_now, inside_now):  # type: ignore[no-untyped-def]
        read = op.Conv(known, weight, group=groups, dilations=dilations, pads=pads, strides=strides)
        x_now = op.Where(inside_now, y_now - op.Squeeze(read, [2]), op.CastLike(0.0, y_now))
        return op.Concat(op.Slice(known, [1], [2147483647], [2]), op.Unsqueeze(x_now, [2]), axis=2), x_now

    _, x = op.Scan(before, y, inside, body=step, num_scan_inputs=2)
    return x


def _solve_triangular(self: Any, B: Any, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """Translates `torch.linalg.solve_triangular`, which inverts 1 x 1 convolutions."""
    size = self.shape[-1]
    identity = op.CastLike(_constant(torch.eye(size)), self)
    diagonal = op.ReduceSum(identity if unitriangular else op.Mul(self, identity), [-1], keepdims=0)
    inverse = _inverse(self, diagonal, size, upper)
    return op.MatMul(inverse, B) if left else op.MatMul(B, inverse)


def _inverse(matrix: Any, diagonal: Any, size: int, upper: bool) -> Any:
    """Computes the inverse of a triangular matrix, [..., n, n], with this diagonal, [..., n].

    The inverses of two diagonal blocks give the inverse of a block twice as large:

        [[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]
    """
    inverse = op.Div(op.CastLike(_constant(torch.eye(size)), matrix), op.Unsqueeze(diagonal, [-1]))
    length = 1
    while length < size:
        block = torch.arange(size) // length
        below = (block[:, None] == block + 1) & (block % 2 == 0)
        between = op.Where(_constant(below.mT if upper else below), matrix, op.CastLike(0.0, matrix))
        inverse = op.Sub(inverse, op.MatMul(op.MatMul(inverse, between), inverse))
        length *= 2
    return inverse


def _canonical(image: Any, code: int, dimensions: int) -> Any:
    """Translates `stencil.canonical`."""
    return _mirrored(_exchanged(image, code, dimensions), code, dimensions)


def _from_canonical(image: Any, code: int, dimensions: int) -> Any:
    """Translates `stencil.from_canonical`."""
    return _exchanged(_mirrored(image, code, dimensions), code, dimensions)


def _exchanged(image: Any, code: int, dimensions: int) -> Any:
    return op.Transpose(image, perm=[0, 1, *stencil.exchanged(code, range(2, dimensions + 2))])


def _mirrored(image: Any, code: int, dimensions: int) -> Any:
    axes = stencil.mirrored(code, dimensions)
    count = len(axes)
    return op.Slice(image, [-1] * count, [-(2**63)] * count, axes, [-1] * count) if axes else image


def _place(coordinates: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """Returns the index of a pixel in the memory of an image of these sizes."""
    place = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        place = place * size + coordinate
    return place


def _range(size: Any, axis: int, axes: int) -> Any:
    """Returns 0 to size - 1 along an axis."""
    return op.Reshape(op.Range(0, size, 1), [-1 if each == axis else 1 for each in range(axes)])


def _split(images: Any, count: int) -> Sequence[Any]:
    return [images] if count == 1 else op.Split(images, axis=1, num_outputs=count)


def _joined(images: Sequence[Any]) -> Any:
    return images[0] if len(images) == 1 else op.Concat(*images, axis=1)


def _constant(tensor: Tensor) -> Any:
    return op.Constant(value=ir.tensor(tensor))
