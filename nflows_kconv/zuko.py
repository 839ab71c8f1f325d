"""What zuko's modules are: they make a transform of a context."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nflows_kconv import bijection
from nflows_kconv.distributions import run_transform

try:
    from zuko.lazy import Flow, LazyTransform
    from zuko.transforms import ComposedTransform
except ImportError as error:
    raise ImportError("nflows_kconv.zuko needs zuko, which comes with pip install zuko") from error

__all__: list[str] = []


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
