"""Solves images by matrix products of torch, one for all pixels that can be solved at once.

Each step of the schedule (H + W - 1 steps for a corner) copies what its pixels read and multiplies once. All steps
together do the multiplications of the convolution, which dominate with many channels or images. Nothing is copied from
the host, so CUDA graphs can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nflows_kconv import stencil


def substitute(y: Tensor, taps: Tensor, lags: Sequence[Sequence[int]], transpose: bool) -> Tensor:
    """Substitutes back in the canonical frame: with pivot P, x[p] = P^-1 y[p] - sum_l P^-1 W[l] x[p - l].

    Pixels are ordered by time tau . p, then by row, so pixels of equal time are adjacent, and so are the pixels they
    read through one tap. A pixel holds y until it is solved. Everything outside the image is zero.

    Args:
        y: [B, G, C/G, H, W].
        taps: [G, C/G, C/G, lags], the pivot last.
        lags: Of the taps, rows and columns.
        transpose: Whether A^T stands for A.

    Returns:
        x, of the shape of y.
    """
    batch, groups, channels, height, width = y.shape
    inside = [index for index, (a, b) in enumerate(lags) if a < height and abs(b) < width]
    lags, matrices = [lags[index] for index in inside], [taps[..., index] for index in inside]
    *others, pivot = [matrix.mT for matrix in matrices] if transpose else matrices
    identity = torch.eye(channels, dtype=y.dtype, device=y.device).expand_as(pivot)
    weights = torch.linalg.solve_triangular(-pivot, torch.cat([*others, -identity], 2), upper=transpose).mT

    step = (stencil.schedule(lags) or (1,))[0]  # time from a row to the next
    before, above = max(step * a + b for a, b in lags), max(a for a, _ in lags)
    times = step * (height - 1) + width
    places = y.new_zeros(groups, before + times, above + height, batch, channels)
    group, time, row, *image = places.stride()
    x = places[:, before:, above:].as_strided(
        (groups, height, width, batch, channels), (group, step * time + row, time, *image)
    )
    x.copy_(y.permute(1, 3, 4, 0, 2))
    reads = [(before - step * a - b, above - a) for a, b in lags]  # positions that pixel (0, 0) reads
    for now in range(times):
        first, end = max(0, -((width - 1 - now) // step)), min(height, now // step + 1)
        read = [places[:, time + now, row + first : row + end].flatten(1, 2) for time, row in reads]
        torch.bmm(torch.cat(read, 2), weights, out=read[-1])
    return x.permute(3, 0, 4, 1, 2)
