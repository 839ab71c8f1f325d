"""The layer as a lazy transform of zuko, which builds a transform from a context."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform

from nflows_kconv import bijection, distributions
from nflows_kconv.distributions import run_transform
from nflows_kconv.layer import KernelLayer

try:
    from zuko.lazy import Flow, LazyTransform
    from zuko.transforms import ComposedTransform
except ImportError as error:
    raise ImportError("nflows_kconv.zuko needs zuko: pip install zuko") from error

__all__ = ["ConditionalInvertibleConv1d", "ConditionalInvertibleConv2d", "ConditionalInvertibleConv3d"]


class _Lazy(distributions._Conditional, LazyTransform):
    """A layer with the interface of zuko."""

    def forward(self, c: Tensor) -> Transform:  # type: ignore[override]
        """Returns the transform for contexts, as `condition` does."""
        return self.condition(c)

    def inverse(self, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Does `inverse` of `nflows_kconv.ConditionalInvertibleConv2d`, but runs no hooks."""
        return KernelLayer.forward(self, y, c, inverse=True)


class ConditionalInvertibleConv2d(_Lazy, distributions.ConditionalInvertibleConv2d):
    """`nflows_kconv.distributions.ConditionalInvertibleConv2d` as a `zuko.lazy.LazyTransform`.

    zuko's flows run from data to noise: they convolve for the density and solve for samples; with `layer.inv`, the
    other way round. The unconditional layer is in `nflows_kconv.distributions`.

    Examples:
        >>> import torch, zuko
        >>> from nflows_kconv.zuko import ConditionalInvertibleConv2d
        >>> noise = zuko.lazy.UnconditionalDistribution(
        ...     zuko.distributions.DiagNormal, torch.zeros(12, 8, 8), torch.ones(12, 8, 8), ndims=3
        ... )
        >>> flow = zuko.flows.Flow([ConditionalInvertibleConv2d(12, context_features=5)], noise)
        >>> flow(torch.randn(10, 5)).sample().shape
        torch.Size([10, 12, 8, 8])
    """


class ConditionalInvertibleConv1d(_Lazy, distributions.ConditionalInvertibleConv1d):
    """`ConditionalInvertibleConv2d` for sequences."""


class ConditionalInvertibleConv3d(_Lazy, distributions.ConditionalInvertibleConv3d):
    """`ConditionalInvertibleConv2d` for volumes."""


def _sample(flow: Flow, num_samples: int, context: Any) -> Tensor:
    return flow().sample((num_samples,)) if context is None else flow(context).sample()


bijection.register(
    LazyTransform,
    forward=lambda lazy, x, context: run_transform(lazy(context), x),
    inverse=lambda lazy, y, context: run_transform(lazy(context).inv, y),
    parts=lambda lazy, context: [lazy(context)],
)
bijection.register(
    Flow,
    forward=lambda flow, x, context: run_transform(flow.transform(context), x),
    inverse=lambda flow, z, context: run_transform(flow.transform(context).inv, z),
    sample=_sample,
    parts=lambda flow, context: [flow.transform(context)],
)
bijection.register(ComposedTransform, parts=lambda transform, context: transform.transforms)
