"""Bounds the gain of the inverse by construction, at every image size.

Let D be the pivot's diagonal at every pixel and A = D (I + N), where N is the convolution with all other entries of the
weight, each row divided by its diagonal. ||N||_2 is at most r, the sum over the taps of the spectral norms of their C/G
x C/G matrices. So

    ||A^-1||_2 <= ||D^-1||_2 / (1 - r)    for r < 1

at every image size, with zero or circular borders; docs/numerics.md has the proof. Gram iteration bounds the spectral
norms (Delattre, Barthelemy, Araujo, Allauzen 2023, arXiv 2305.16173). It uses only matrix products, which are
differentiable and work in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends.reference import in_own_precision

# Overestimates norms of n x n matrices by a factor of at most n^(2^-6): 1.06 for n = 48.
_GRAM_STEPS = 5
# The smallest norm whose second derivatives are finite in float32.
_SMALLEST_NORM = 1e-12


def off_diagonal_norm(relative: Tensor) -> Tensor:
    """Returns the bound r on ||N||_2 in each group, [G], in float32 at least.

    Args:
        relative: The weight of N, [C, C/G, ...], zero where it is masked and, unless borders are circular, on the
            pivot's diagonal.
    """
    dtype = torch.promote_types(relative.dtype, torch.float32)
    with in_own_precision(relative.device):
        taps = relative.to(dtype).unflatten(0, (-1, relative.shape[1])).flatten(3).permute(0, 3, 1, 2)
        return _spectral_norm(taps).sum(1)


def scale(relative: Tensor, max_inverse_gain: float) -> Tensor:
    """Returns the factor, [C, 1, ...], at most 1, that scales N to r <= 1 - 1/max_inverse_gain.

    Args:
        relative: See `off_diagonal_norm`.
        max_inverse_gain: The bound on ||(I + N)^-1||_2, above 1.
    """
    excess = off_diagonal_norm(relative) / (1 - 1 / max_inverse_gain)
    factor = excess.clamp_min(1).reciprocal()
    return stencil.on_weight(factor.repeat_interleave(relative.shape[1]).to(relative.dtype), relative)


def _spectral_norm(matrices: Tensor) -> Tensor:
    """Returns an upper bound of the largest singular value, [..., n, n] -> [...].

    With M_0 = M and M_(j+1) = M_j M_j^T, it is that of M_j to the power of 2^-j, and at most ||M_j||_F^(2^-j). Dividing
    M_j by its norm, which goes into the result, avoids overflow.
    """
    norm = _frobenius_norm(matrices)
    bound = norm
    for step in range(1, _GRAM_STEPS + 1):
        matrices = matrices / norm[..., None, None]
        matrices = matrices @ matrices.mT
        norm = _frobenius_norm(matrices)
        bound = bound * norm**0.5**step
    return bound


def _frobenius_norm(matrices: Tensor) -> Tensor:
    return matrices.square().sum((-2, -1)).clamp_min(_SMALLEST_NORM**2).sqrt()
