"""Evaluates densities of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nflows_kconv import checks
from nflows_kconv.flows.images.arguments import at_least_float32, check_images


def bits_per_dim(log_prob: Tensor, image_shape: Sequence[int]) -> Tensor:
    """Computes -log2 of an image's probability per dimension: -log_prob / (D log 2), D = C H W.

    It compares models only if log_prob is that of the image in whole numbers, with the log-determinants of everything
    done to it, including the dequantisation. Guessing among 256 levels then takes 8 bits.

    Args:
        log_prob: In nats, [B], or their mean.
        image_shape: (C, H, W).

    Returns:
        A tensor of the shape of `log_prob`.

    Raises:
        TypeError: If `image_shape` is not a sequence of integers.
        ValueError: If `image_shape` does not have three sizes, each at least 1.
    """
    if not isinstance(image_shape, Sequence):
        raise TypeError(f"image_shape must be (C, H, W), got {image_shape!r}")
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {tuple(image_shape)}")
    for name, size in zip(("channels", "height", "width"), image_shape, strict=True):
        checks.positive(name, size)
    return -log_prob / (math.prod(image_shape) * math.log(2))


@torch.no_grad()
def importance_weighted_bound(log_prob: Callable[[Tensor], Tensor], images: Tensor, num_samples: int) -> Tensor:
    """Computes log (1/K) sum_k exp(log_prob_k(x)) over K draws of the dequantisation noise, for evaluation.

    Its expectation is a lower bound on log P(x) that grows with K and converges to it (Burda, Grosse, Salakhutdinov
    2016, arXiv 1509.00519, section 3). Memory holds one draw at a time and no gradients.

    Args:
        log_prob: A function from x to [B] in nats, with new noise at each call.
        images: x, [B, C, H, W].
        num_samples: K.

    Returns:
        The bound in nats, [B], in float32 at least.

    Raises:
        TypeError: If `images` is not a tensor, or `num_samples` is not an integer.
        ValueError: If `images` does not have four dimensions, `num_samples` is below 1, or `log_prob` returns another
            shape.
    """
    check_images(images)
    checks.positive("num_samples", num_samples)

    def draw() -> Tensor:
        sample = log_prob(images)
        if sample.shape != images.shape[:1]:
            raise ValueError(f"log_prob must return one number per image, [{len(images)}], got {tuple(sample.shape)}")
        return at_least_float32(sample)

    total = draw()
    for _ in range(num_samples - 1):
        total = torch.logaddexp(total, draw())
    return total - math.log(num_samples)
