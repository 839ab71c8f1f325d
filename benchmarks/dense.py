"""The inverse by dense linear algebra: the layer's Jacobian as dense triangular matrices.

Each group is a separate system. With pixels in raster order from the group's corner, and the channels of a pixel
contiguous, its matrix is lower triangular.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads import Case
from nflows_kconv import functional

MOST_BYTES = 4 * 2**30  # larger matrices are not measured


def matrix_bytes(case: Case) -> int:
    """Returns the bytes of the float32 matrices [G, N, N] with N = C/G H W."""
    channels, height, width = case.shape
    size = channels // len(case.corners) * height * width
    return 4 * len(case.corners) * size**2


def matrices(weight: Tensor, case: Case) -> Tensor:
    """Returns the Jacobian of each group, [G, N, N], output by input."""
    groups = weight.chunk(len(case.corners))
    return torch.stack([_jacobian(group, corner, case) for group, corner in zip(groups, case.corners, strict=True)])


def right_hand_sides(y: Tensor, case: Case) -> Tensor:
    """Returns images [B, C, H, W] as columns of each group, [G, N, B]."""
    groups = zip(y.chunk(len(case.corners), 1), case.corners, strict=True)
    return torch.stack([_raster(group, corner).mT for group, corner in groups]).contiguous()


def solve(jacobian: Tensor, columns: Tensor) -> Tensor:
    """Returns the columns of x with jacobian x = columns."""
    return torch.linalg.solve_triangular(jacobian, columns, upper=False)


def _jacobian(weight: Tensor, corner: str, case: Case) -> Tensor:
    per_group, (_, height, width) = len(weight), case.shape
    identity = torch.eye(per_group * height * width, device=weight.device, dtype=weight.dtype)
    images = identity.unflatten(1, (height, width, per_group)).permute(0, 3, 1, 2).flip(_flipped(corner))
    return _raster(functional.conv2d(images, weight, corners=corner), corner).T.contiguous()


def _raster(images: Tensor, corner: str) -> Tensor:
    return images.flip(_flipped(corner)).permute(0, 2, 3, 1).flatten(1)


def _flipped(corner: str) -> list[int]:
    return [dim for dim, letter in ((-2, "B"), (-1, "R")) if letter in corner]
