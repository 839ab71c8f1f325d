"""The solution in three dimensions, plane by plane: one of two dimensions for each plane of the first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import reference
from nflows_kconv.backends.registry import Problem


def solve(problem: Problem, solve_planes: Callable[[Problem], Tensor]) -> Tensor:
    """x = A^-1 (y - b), or x = A^-T (y - b), for corners in three dimensions.

    A plane reads earlier planes through a convolution without masks, and itself through the taps of the pivot's plane,
    which are a convolution of two dimensions in the corner's own image rows and columns.

    Args:
        problem: A solution in three dimensions.
        solve_planes: Solves problems of two dimensions.
    """
    if problem.input.numel() == 0:
        return torch.empty_like(problem.input)
    # Half precision is rounded once: all planes are solved in float32.
    dtype = torch.promote_types(problem.input.dtype, torch.float32)
    bias, log_diagonal = (None if t is None else t.to(dtype) for t in (problem.bias, problem.log_diagonal))
    weight, stencils, transpose = problem.other.to(dtype), problem.stencils, problem.transpose
    is_far = [bool(code & 4) for code in stencils]
    # Groups are mirrored along the first axis: all read earlier planes, and kernels have the pivot's plane last.
    kernels = torch.cat([w.flip(2) if far else w for w, far in zip(weight.chunk(len(stencils)), is_far, strict=True)])
    codes = [code & 3 for code in stencils]
    of_plane = problem._replace(
        other=kernels[:, :, -1].contiguous(),
        stencils=codes,
        bias=bias,
        log_diagonal=log_diagonal,
        kernel_size=kernels.shape[3:],
    )
    y = _mirrored(problem.input.to(dtype), [far != transpose for far in is_far])
    x = torch.empty_like(y, memory_format=torch.contiguous_format)
    earlier = _Earlier(kernels[:, :, :-1], codes, transpose)
    for d in range(y.shape[2]):
        rhs = y[:, :, d] - earlier(x[:, :, :d]) if d and earlier.planes else y[:, :, d]
        x[:, :, d] = solve_planes(of_plane._replace(input=rhs))
    return torch.empty_like(problem.input).copy_(_mirrored(x, [far != transpose for far in is_far]))


class _Earlier:
    """What earlier planes add to one, a convolution in which they and channels are one dimension.

    Args:
        kernels: [C, C/G, planes, kh, kw].
        codes: The corner of each group in a plane.
        transpose: Whether A^T stands for A.
    """

    def __init__(self, kernels: Tensor, codes: Sequence[int], transpose: bool) -> None:
        self.planes = kernels.shape[2]
        self._groups = []
        for kernel, code in zip(kernels.chunk(len(codes)), codes, strict=True):
            if transpose:
                kernel, code = kernel.transpose(0, 1).flip(-2, -1), stencil.opposite(code, 2)
            self._groups.append((kernel, stencil.padding(code, kernel.shape[3:])))

    def __call__(self, solved: Tensor) -> Tensor:
        """[B, C, H, W] of the planes before it, [B, C, any number, H, W]."""
        count = min(self.planes, solved.shape[2])
        groups = zip(solved[:, :, -count:].chunk(len(self._groups), 1), self._groups, strict=True)
        with reference.in_own_precision(solved.device):
            added = [
                F.conv2d(F.pad(x.flatten(1, 2), padding), kernel[:, :, -count:].flatten(1, 2))
                for x, (kernel, padding) in groups
            ]
        return torch.cat(added, 1)


def _mirrored(images: Tensor, mirrored: Sequence[bool]) -> Tensor:
    groups = zip(images.chunk(len(mirrored), 1), mirrored, strict=True)
    return torch.cat([x.flip(2) if m else x for x, m in groups], 1)
