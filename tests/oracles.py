"""What the results must be, from the formula alone: nothing here uses the package.

The formula is FInC Flow's (arXiv 2301.09266, section 3). For one group in corner TL, with the image zero outside its
borders,

    y[o, h, w] = sum_{i, a, b} W[o, i, a, b] x[i, h - (kh-1-a), w - (kw-1-b)]

where W's entries with i > o in the last tap, the pivot, count as zero; the other corners are its mirror images.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A sum of n terms of either sign errs by about sqrt(n) roundings, n is below 10,000 here, and the inverses of the table
# of cases have norms of a few: 64 units in the last place of the largest entry. Half precision must be the result in
# float32 rounded once: each entry is right to half a unit, or to one unit of another such result, beside float32's own
# error.
ROUNDINGS = 64
HALF_PRECISION = (torch.float16, torch.bfloat16)

MIRRORED = {"columns": dict(TL="TR", TR="TL", BL="BR", BR="BL"), "rows": dict(TL="BL", BL="TL", TR="BR", BR="TR")}


def assert_close(actual: Tensor, expected: Tensor, factor: float = 1) -> None:
    """Asserts equality to the rounding of the dtype of `actual`; a `factor` forgives that many times more of sums."""
    half = actual.dtype in HALF_PRECISION
    roundings = 1 if expected.dtype == actual.dtype else 1 / 2
    computed = torch.float32 if half else actual.dtype
    actual_, expected_ = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, expected))
    finite = expected_[expected_.isfinite()].abs()
    scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual_,
        expected_,
        rtol=roundings * torch.finfo(actual.dtype).eps if half else 0,
        atol=factor * ROUNDINGS * torch.finfo(computed).eps * scale,
        equal_nan=True,
    )


def padding(corner: str, kernel_size: Sequence[int]) -> tuple[int, int, int, int]:
    """What F.pad adds to the (left, right, top, bottom)."""
    rows, columns = kernel_size[0] - 1, kernel_size[1] - 1
    return {
        "TL": (columns, 0, rows, 0),
        "TR": (0, columns, rows, 0),
        "BL": (columns, 0, 0, rows),
        "BR": (0, columns, 0, rows),
    }[corner]


def pivot(corner: str, kernel_size: Sequence[int]) -> tuple[int, int]:
    """Where the kernel holds the tap that reads the pixel itself."""
    last_row, last_column = kernel_size[0] - 1, kernel_size[1] - 1
    return {"TL": (last_row, last_column), "TR": (last_row, 0), "BL": (0, last_column), "BR": (0, 0)}[corner]


def masked(shape: Sequence[int], corners: Sequence[str]) -> Tensor:
    """True at the entries of a weight of this shape that count as zero."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    for group, corner in enumerate(corners):
        row, column = pivot(corner, shape[-2:])
        for output in range(shape[1]):
            mask[group * shape[1] + output, output + 1 :, row, column] = True
    return mask


def diagonal(weight: Tensor, corners: Sequence[str]) -> Tensor:
    """W[o, o, pivot] for each channel o, [C]."""
    return torch.stack([weight[entry] for entry in _diagonal_entries(weight.shape, corners)])


def set_diagonal(weight: Tensor, corners: Sequence[str], values: Tensor) -> None:
    """Writes `values` [C] where `diagonal` reads."""
    for entry, value in zip(_diagonal_entries(weight.shape, corners), values, strict=True):
        weight[entry] = value


def effective(weight: Tensor, corners: Sequence[str]) -> Tensor:
    """The weight in float64 on the CPU, zero where it counts as zero."""
    return weight.to("cpu", torch.float64).masked_fill(masked(weight.shape, corners), 0)


def conv(input: Tensor, weight: Tensor, corners: Sequence[str]) -> Tensor:
    """y = A x by F.pad and F.conv2d, in float64."""
    input, weight = input.to("cpu", torch.float64), effective(weight, corners)
    if 0 in input.shape:
        return input.clone()  # F.conv2d refuses images that are smaller than the kernel even with their padding
    groups = zip(input.chunk(len(corners), 1), weight.chunk(len(corners)), corners, strict=True)
    return torch.cat([F.conv2d(F.pad(x, padding(corner, w.shape[-2:])), w) for x, w, corner in groups], 1)


def matrices(weight: Tensor, corners: Sequence[str], height: int, width: int) -> list[Tensor]:
    """A of each group as a dense float64 matrix; it is lower triangular in the order of `_dense`."""
    weight = effective(weight, corners)
    result = []
    for group, corner in zip(weight.chunk(len(corners)), corners, strict=True):
        row, column = pivot(corner, weight.shape[-2:])
        size = height * width * weight.shape[1]
        matrix = weight.new_zeros(size, size)
        for a in range(weight.shape[2]):
            for b in range(weight.shape[3]):
                rows, columns = _shift(height, a - row, "B" in corner), _shift(width, b - column, "R" in corner)
                matrix = matrix + torch.kron(torch.kron(rows, columns), group[:, :, a, b])
        result.append(matrix)
    return result


def solve(input: Tensor, weight: Tensor, corners: Sequence[str], transpose: bool = False) -> Tensor:
    """x with A x = y, or A^T x = y, by a dense triangular solve, in float64."""

    def operation(matrix: Tensor, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(matrix.mT if transpose else matrix, columns, upper=transpose)

    return _dense(operation, input, weight, corners)


def multiply(input: Tensor, weight: Tensor, corners: Sequence[str], transpose: bool = False) -> Tensor:
    """y = A x, or y = A^T x, by a dense product, in float64."""
    return _dense(lambda matrix, columns: (matrix.mT if transpose else matrix) @ columns, input, weight, corners)


def log_abs_det(weight: Tensor, corners: Sequence[str], height: int, width: int) -> Tensor:
    """log |det A| from the dense matrices, in float64."""
    return sum(torch.linalg.slogdet(matrix).logabsdet for matrix in matrices(weight, corners, height, width))


def weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, corners: Sequence[str]) -> Tensor:
    """The gradient of <grad, A input> in the weight by F.conv2d's autograd, in float64."""
    weight = weight.detach().to("cpu", torch.float64).requires_grad_()
    product = (conv(input, weight, corners) * grad.to("cpu", torch.float64)).sum() + 0 * weight.sum()
    return torch.autograd.grad(product, weight)[0]


def _diagonal_entries(shape: Sequence[int], corners: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    channels, per_group = shape[:2]
    for channel in range(channels):
        yield channel, channel % per_group, *pivot(corners[channel // per_group], shape[-2:])


def _shift(size: int, offset: int, mirrored: bool) -> Tensor:
    """S with (S x)[i] = x[i + offset], zero outside; on both sides in reverse order if mirrored."""
    index = torch.arange(size)
    return (index[:, None] + (-offset if mirrored else offset) == index).to(torch.float64)


def _dense(
    operation: Callable[[Tensor, Tensor], Tensor], input: Tensor, weight: Tensor, corners: Sequence[str]
) -> Tensor:
    """Applies an operation on (matrix, images as columns) to each group.

    The columns are in raster order from the group's corner on, channels inside a pixel.
    """
    outputs = []
    matrices_ = matrices(weight, corners, *input.shape[-2:])
    for x, matrix, corner in zip(
        input.to("cpu", torch.float64).chunk(len(corners), 1), matrices_, corners, strict=True
    ):
        mirrored = [dim for dim, side in ((-2, "B"), (-1, "R")) if side in corner]
        columns = x.flip(mirrored).permute(2, 3, 1, 0)
        result = operation(matrix, columns.flatten(0, 2)).view(columns.shape)
        outputs.append(result.permute(3, 2, 0, 1).flip(mirrored))
    return torch.cat(outputs, 1)
