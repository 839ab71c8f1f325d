"""What Pyro's conditional transforms are: they make a transform of a context. Its others are those of torch."""

from __future__ import annotations

from nflows_kconv import bijection
from nflows_kconv.distributions import has_cached_none, run_transform

try:
    from pyro.distributions.conditional import ConditionalTransform
except ImportError as error:
    raise ImportError("nflows_kconv.pyro needs Pyro, which comes with pip install pyro-ppl") from error

__all__: list[str] = []

bijection.register(
    ConditionalTransform,
    forward=lambda conditional, x, context: run_transform(conditional.condition(context), x),
    inverse=lambda conditional, y, context: run_transform(conditional.condition(context).inv, y),
    parts=lambda conditional, context: [conditional.condition(context)],
    says_no_inverse=has_cached_none,
)
