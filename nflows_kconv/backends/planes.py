"""Solves volumes plane by plane, with one two-dimensional call per plane."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import reference
from nflows_kconv.backends.registry import OperatorCall


def solve(call: OperatorCall, solve_planes: Callable[[OperatorCall], Tensor]) -> Tensor:
    """Computes x = A^-1 (y - b), or x = A^-T (y - b), for corners in three dimensions.

    A plane reads earlier planes through an unmasked convolution over planes and channels, and itself through the taps
    in the pivot's plane. All groups are in their canonical frames, so one convolution serves all.

    Args:
        call: A solution in three dimensions.
        solve_planes: Runs two-dimensional solutions.
    """
    if call.input.numel() == 0:
        return torch.empty_like(call.input)
    # Solves all planes in float32, to round half precision once.
    dtype = torch.promote_types(call.input.dtype, torch.float32)
    bias, log_diagonal = (None if t is None else t.to(dtype) for t in (call.bias, call.log_diagonal))
    stencils, count, transpose = call.stencils, len(call.stencils), call.transpose
    frames = [stencil.opposite(code, 3) if transpose else code for code in stencils]
    images = zip(call.input.to(dtype).chunk(count, 1), frames, strict=True)
    y = torch.stack([stencil.canonical(image, frame, 3) for image, frame in images], 1)  # [B, G, C/G, D, H, W]
    weights = zip(call.other.to(dtype).chunk(count), stencils, strict=True)
    kernels = torch.stack([stencil.canonical(kernel, code, 3) for kernel, code in weights])

    # The two-dimensional corner whose operator, or its transpose, reads as the canonical frame does.
    corner = stencil.opposite(0, 2) if transpose else 0
    of_plane = call._replace(
        other=stencil.from_canonical(kernels[:, :, :, -1], corner, 2).flatten(0, 1).contiguous(),
        stencils=[corner] * count,
        bias=bias,
        log_diagonal=log_diagonal,
        kernel_size=kernels.shape[4:],
    )
    earlier = (kernels.transpose(1, 2) if transpose else kernels)[:, :, :, :-1]
    above, left = kernels.shape[4] - 1, kernels.shape[5] - 1
    bordered = y.new_zeros(*y.shape[:4], y.shape[4] + above, y.shape[5] + left)
    x = bordered[..., above:, left:]
    for d in range(y.shape[3]):
        rhs, known = y[:, :, :, d].flatten(1, 2), min(d, earlier.shape[3])
        if known:
            weight = earlier[:, :, :, -known:].flatten(2, 3).flatten(0, 1).contiguous(memory_format=torch.channels_last)
            with reference.in_own_precision(rhs.device):
                rhs = rhs - F.conv2d(bordered[:, :, :, d - known : d].flatten(1, 3), weight, groups=count)
        x[:, :, :, d] = solve_planes(of_plane._replace(input=rhs)).unflatten(1, (count, -1))
    solved = [stencil.from_canonical(x[:, g], frame, 3) for g, frame in enumerate(frames)]
    return torch.empty_like(call.input).copy_(torch.cat(solved, 1))
