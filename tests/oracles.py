"""The required results, from the definition alone: nothing here uses the package.

A pixel p of a group reads the pixels p + d (t - pivot), d the dilation, through the taps t of its kernel; the image is
zero outside its borders:

    y[o, p] = sum_{i, t} W[o, i, t] x[i, p + d (t - pivot)]

A corner (FInC Flow, arXiv 2301.09266, section 3) has its pivot at a corner of the kernel; W's entries with i > o at the
pivot count as zero. A side, "T", "B", "L" or "R", has it in the middle of a border of the kernel, and one half of that
border also counts as zero.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The error of a sum of n terms of either sign is about sqrt(n) roundings, n is below 10,000 here, and the inverses in
# the table of cases have small norms: 64 units in the last place of the largest entry. Half precision must be the
# float32 result rounded once: each entry is within half a unit, or within one unit of another such result, plus
# float32's own error.
ROUNDINGS = 64
HALF_PRECISION = (torch.float16, torch.bfloat16)
SIDES = ("T", "B", "L", "R")  # only in two dimensions

Dilation = int | Sequence[int]


def assert_close(actual: Tensor, expected: Tensor, factor: float = 1) -> None:
    """Asserts equality up to rounding in the dtype of `actual`; `factor` multiplies the tolerance of sums."""
    half = actual.dtype in HALF_PRECISION
    roundings = 1 if expected.dtype == actual.dtype else 1 / 2
    computed = torch.float32 if half else actual.dtype
    actual_, expected_ = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, expected))
    scale = max(1.0, expected_.abs().nan_to_num(0, 0, 0).max().item()) if expected_.numel() else 1.0
    tolerance = {
        "rtol": roundings * torch.finfo(actual.dtype).eps if half else 0,
        "atol": factor * ROUNDINGS * torch.finfo(computed).eps * scale,
        "equal_nan": True,
    }
    if actual_.shape != expected_.shape or not torch.allclose(actual_, expected_, **tolerance):
        torch.testing.assert_close(actual_, expected_, **tolerance)  # slower, but says what differs


def is_side(name: str, dimensions: int) -> bool:
    """Returns whether the name is a side; in one dimension "L" and "R" are corners."""
    return dimensions == 2 and name in SIDES


def pivot(name: str, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Returns the index of the tap that reads the pixel itself."""
    if is_side(name, len(kernel_size)):
        rows, columns = kernel_size
        return {
            "T": (rows - 1, (columns - 1) // 2),
            "B": (0, columns // 2),
            "L": ((rows - 1) // 2, columns - 1),
            "R": (rows // 2, 0),
        }[name]
    return tuple(0 if letter in "FBR" else size - 1 for letter, size in zip(name, kernel_size, strict=True))


def padding(name: str, kernel_size: Sequence[int], dilation: Dilation = 1) -> tuple[int, ...]:
    """Returns the padding for F.pad: (left, right) in one dimension, (left, right, top, bottom) in two."""
    steps = _per_axis(dilation, len(kernel_size))
    axes = zip(pivot(name, kernel_size), kernel_size, steps, strict=True)
    before_after = [(step * place, step * (size - 1 - place)) for place, size, step in axes]
    return tuple(itertools.chain(*reversed(before_after)))


def masked(shape: Sequence[int], corners: Sequence[str]) -> Tensor:
    """Returns a mask of the entries of a weight that count as zero."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    for name, group in zip(corners, mask.unflatten(0, (len(corners), -1)), strict=True):
        place = pivot(name, shape[2:])
        group[(..., *place)] = torch.ones(shape[1], shape[1], dtype=torch.bool).triu(1)
        if is_side(name, len(shape) - 2):
            row, column = place
            after = {
                "T": (row, slice(column + 1, None)),
                "B": (row, slice(0, column)),
                "L": (slice(row + 1, None), column),
                "R": (slice(0, row), column),
            }[name]
            group[(..., *after)] = True
    return mask


def diagonal(weight: Tensor, corners: Sequence[str]) -> Tensor:
    """Returns W[o, o, pivot] for each channel o, [C]."""
    return torch.stack([weight[entry] for entry in _diagonal_entries(weight.shape, corners)])


def set_diagonal(weight: Tensor, corners: Sequence[str], values: Tensor) -> None:
    """Writes `values`, [C] or one for all, to the entries that `diagonal` reads."""
    for entry, value in zip(_diagonal_entries(weight.shape, corners), values.expand(len(weight)), strict=True):
        weight[entry] = value


def effective(weight: Tensor, corners: Sequence[str]) -> Tensor:
    """Returns the weight in float64 on the CPU, with masked entries zero."""
    return weight.to("cpu", torch.float64).masked_fill(masked(weight.shape, corners), 0)


def conv(input: Tensor, weight: Tensor, corners: Sequence[str], dilation: Dilation = 1) -> Tensor:
    """Computes y = A x by F.pad and torch's convolutions, in float64."""
    input, weight = input.to("cpu", torch.float64), effective(weight, corners)
    if 0 in input.shape:
        return input.clone()  # F.conv2d refuses padded images smaller than the kernel
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[input.dim()]
    groups = zip(input.chunk(len(corners), 1), weight.chunk(len(corners)), corners, strict=True)
    return torch.cat(
        [convolution(F.pad(x, padding(name, w.shape[2:], dilation)), w, dilation=dilation) for x, w, name in groups], 1
    )


def matrices(weight: Tensor, corners: Sequence[str], size: Sequence[int], dilation: Dilation = 1) -> list[Tensor]:
    """Returns A of each group as a dense float64 matrix, lower triangular in the group's `_order`."""
    result, steps = [], tuple(_per_axis(dilation, len(size)))
    for group, name in zip(effective(weight, corners).chunk(len(corners)), corners, strict=True):
        pixels, reads, taps = map(torch.from_numpy, _entries(name, tuple(weight.shape[2:]), tuple(size), steps))
        matrix = group.new_zeros(math.prod(size), math.prod(size), weight.shape[1], weight.shape[1])
        matrix[pixels, reads] = group.flatten(2).movedim(2, 0)[taps]
        result.append(matrix.transpose(1, 2).flatten(2).flatten(0, 1))
    return result


@cache
def _entries(
    name: str, kernel_size: tuple[int, ...], size: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Returns ranks of pixels in `_order`, ranks of the pixels that they read, and through which taps."""
    # In NumPy, because tensors made inside a torch.func transform belong to it, and this keeps them.
    entries: list[tuple[np.ndarray, ...]] = []
    place, ranks = pivot(name, kernel_size), np.argsort(_order(name, size).tolist()).reshape(size)
    for index, tap in enumerate(itertools.product(*map(range, kernel_size))):
        pixel = read = ranks
        for axis, (length, t, p, step) in enumerate(zip(size, tap, place, steps, strict=True)):
            shift = step * (t - p)
            before, after = min(length, max(0, -shift)), min(length, max(0, shift))
            count = length - before - after
            pixel = pixel.take(range(before, before + count), axis)
            read = read.take(range(after, after + count), axis)
        entries.append((pixel.ravel(), read.ravel(), np.full(pixel.size, index)))
    return tuple(map(np.concatenate, zip(*entries, strict=True)))


def circular_matrices(weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Returns the dense float64 matrix of each group with circular borders, in memory order, channels outermost.

    The tap (k - 1) // 2 along each axis reads the pixel itself: y[o, p] = sum_{i, t} W[o, i, t]
    x[i, (p + t - (k - 1) // 2) mod size].
    """
    result = []
    for group in weight.detach().to("cpu", torch.float64).split(weight.shape[1]):
        matrix = 0
        for tap in itertools.product(*map(range, weight.shape[2:])):
            axes = zip(size, tap, weight.shape[2:], strict=True)
            reads = [torch.eye(n, dtype=torch.float64).roll(t - (k - 1) // 2, 1) for n, t, k in axes]
            matrix = matrix + torch.kron(group[(..., *tap)], reduce(torch.kron, reads))
        result.append(matrix)
    return result


def solve(
    input: Tensor, weight: Tensor, corners: Sequence[str], dilation: Dilation = 1, *, transpose: bool = False
) -> Tensor:
    """Computes x with A x = y, or A^T x = y, by a dense triangular solve, in float64."""

    def operation(matrix: Tensor, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(matrix.mT if transpose else matrix, columns, upper=transpose)

    return _dense(operation, input, weight, corners, dilation)


def multiply(
    input: Tensor, weight: Tensor, corners: Sequence[str], dilation: Dilation = 1, *, transpose: bool = False
) -> Tensor:
    """Computes y = A x, or y = A^T x, by a dense product, in float64."""

    def operation(matrix: Tensor, columns: Tensor) -> Tensor:
        return (matrix.mT if transpose else matrix) @ columns

    return _dense(operation, input, weight, corners, dilation)


def log_abs_det(weight: Tensor, corners: Sequence[str], size: Sequence[int]) -> Tensor:
    """Computes log |det A| from the dense matrices, in float64."""
    return sum(torch.linalg.slogdet(matrix).logabsdet for matrix in matrices(weight, corners, size))


def weight_gradient(
    input: Tensor, grad: Tensor, weight: Tensor, corners: Sequence[str], dilation: Dilation = 1
) -> Tensor:
    """Computes the gradient of <grad, A input> in the weight by autograd of torch's convolutions, in float64."""
    weight = weight.detach().to("cpu", torch.float64).requires_grad_()
    product = (conv(input, weight, corners, dilation) * grad.to("cpu", torch.float64)).sum() + 0 * weight.sum()
    return torch.autograd.grad(product, weight)[0]


def followers(marked: Tensor, name: str) -> Tensor:
    """Returns a mask of the pixels, [B, C, ...], that marked pixels can affect, at any distance."""
    size = marked.shape[2:]
    if is_side(name, len(size)):
        order = _order(name, size)
        return (marked.flatten(2)[..., order].cumsum(-1) > 0)[..., order.argsort()].unflatten(2, size)
    far = [axis for axis, letter in enumerate(name, 2) if letter in "FBR"]
    spread = marked.flip(far)
    for axis in range(2, marked.dim()):
        spread = spread.cumsum(axis)
    return spread.flip(far) > 0


def _per_axis(dilation: Dilation, dimensions: int) -> Sequence[int]:
    return [dilation] * dimensions if isinstance(dilation, int) else dilation


def _diagonal_entries(shape: Sequence[int], corners: Sequence[str]) -> Iterator[tuple[int, ...]]:
    channels, per_group = shape[:2]
    for channel in range(channels):
        yield channel, channel % per_group, *pivot(corners[channel // per_group], shape[2:])


def _order(name: str, size: Sequence[int]) -> Tensor:
    """Returns the pixels in an order in which each reads only itself and earlier ones."""
    pixels = torch.arange(math.prod(size)).view(*size)
    if is_side(name, len(size)):  # row by row, or column by column, from that side
        pixels = pixels.mT if name in "LR" else pixels
        return pixels.flatten().flip(0) if name in "BR" else pixels.flatten()
    return pixels.flip([axis for axis, letter in enumerate(name) if letter in "FBR"]).flatten()


def _dense(
    operation: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    weight: Tensor,
    corners: Sequence[str],
    dilation: Dilation,
) -> Tensor:
    """Applies an operation on (matrix, images as columns) to each group."""
    size, outputs = input.shape[2:], []
    matrices_ = matrices(weight, corners, size, dilation)
    groups = input.to("cpu", torch.float64).chunk(len(corners), 1)
    for x, matrix, name in zip(groups, matrices_, corners, strict=True):
        order = _order(name, size)
        columns = x.flatten(2)[..., order].permute(2, 1, 0)
        result = operation(matrix, columns.flatten(0, 1)).view(columns.shape)
        outputs.append(result.permute(2, 1, 0)[..., order.argsort()].unflatten(2, size))
    return torch.cat(outputs, 1)
