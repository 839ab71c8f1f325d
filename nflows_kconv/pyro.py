"""The layer as a conditional transform of Pyro, which builds a transform from a context."""

from __future__ import annotations

from nflows_kconv import bijection, distributions
from nflows_kconv.distributions import has_cached_none, run_transform

try:
    from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
except ImportError as error:
    raise ImportError("nflows_kconv.pyro needs Pyro: pip install pyro-ppl") from error

__all__ = ["ConditionalInvertibleConv1d", "ConditionalInvertibleConv2d", "ConditionalInvertibleConv3d"]


class ConditionalInvertibleConv2d(distributions.ConditionalInvertibleConv2d, ConditionalTransformModule):
    """`nflows_kconv.distributions.ConditionalInvertibleConv2d` as a `ConditionalTransformModule` of Pyro.

    A `ConditionalTransformedDistribution` runs from noise to data: `layer.inv` convolves for the density and solves for
    samples. Pass the layer to `pyro.module`. The unconditional layer is in `nflows_kconv.distributions`.

    Examples:
        >>> import torch
        >>> from pyro.distributions import ConditionalTransformedDistribution, Normal
        >>> from nflows_kconv.pyro import ConditionalInvertibleConv2d
        >>> layer = ConditionalInvertibleConv2d(12, context_features=5)
        >>> noise = Normal(torch.zeros(12, 8, 8), 1.0).to_event(3)
        >>> density = ConditionalTransformedDistribution(noise, [layer.inv])
        >>> density.condition(torch.randn(10, 5)).sample().shape
        torch.Size([10, 12, 8, 8])
    """


class ConditionalInvertibleConv1d(distributions.ConditionalInvertibleConv1d, ConditionalTransformModule):
    """`ConditionalInvertibleConv2d` for sequences."""


class ConditionalInvertibleConv3d(distributions.ConditionalInvertibleConv3d, ConditionalTransformModule):
    """`ConditionalInvertibleConv2d` for volumes."""


bijection.register(
    ConditionalTransform,
    forward=lambda conditional, x, context: run_transform(conditional.condition(context), x),
    inverse=lambda conditional, y, context: run_transform(conditional.condition(context).inv, y),
    parts=lambda conditional, context: [conditional.condition(context)],
    says_no_inverse=has_cached_none,
)
