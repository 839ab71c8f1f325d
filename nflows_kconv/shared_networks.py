"""One evaluation of a coupling's network for both directions of the coupling.

A coupling leaves a part of its input as it is, and its network takes this part, so that both directions evaluate the
network with the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The attributes that hold the networks of each kind of coupling. A direction calls each of them once.
Networks = Mapping[type[nn.Module], tuple[str, ...]]


@contextmanager
def evaluated_once(module: nn.Module, networks: Networks) -> Iterator[None]:
    """While it is entered, a step that is undone and then repeated evaluates each of its networks once.

    What a network gives where it is called without gradients is recorded, and taken where it is next called with
    gradients, differentiable as if it came from the input given then, which may differ by rounding.

    Args:
        module: Holds couplings.
        networks: Which of their modules are networks.
    """
    couplings = [
        (coupling, name)
        for coupling in module.modules()
        for kind, names in networks.items()
        if isinstance(coupling, kind)
        for name in names
        if isinstance(getattr(coupling, name), nn.Module)
    ]
    for coupling, name in couplings:
        # An attribute of the instance hides the module of that name, which stays where it is.
        vars(coupling)[name] = _SharedNetwork(getattr(coupling, name))
    try:
        yield
    finally:
        for coupling, name in couplings:
            del vars(coupling)[name]


class _SharedNetwork:
    """A coupling's network while its step is undone and repeated, evaluated once for both."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.evaluations: list[tuple[list[Any], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        """An attribute of the network, as couplings may read."""
        return getattr(self.network, name)

    def __call__(self, input: Tensor, *context: Any) -> Tensor:
        """The network's output; where the step is undone it is recorded, and where it is repeated taken from there."""
        if not torch.is_grad_enabled():
            leaf = input.detach().requires_grad_()
            with torch.enable_grad():
                output = self.network(leaf, *context)
            self.evaluations.append(([leaf, *context, *self.network.parameters()], output))
            return output.detach().clone()  # the coupling may change it in place
        if not self.evaluations:  # the step's input was known
            return self.network(input, *context)
        return _Repeated.apply(self.evaluations.pop(), input, *context, *self.network.parameters())


class _Repeated(torch.autograd.Function):
    """A recorded evaluation, as if it had been with this input."""

    @staticmethod
    def forward(ctx: Any, evaluation: tuple[list[Any], Tensor], *sources: Any) -> Tensor:
        ctx.sources, ctx.output = evaluation
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sources = [source for source in ctx.sources if isinstance(source, Tensor) and source.requires_grad]
        found = dict(zip(sources, torch.autograd.grad(ctx.output, sources, gradients, allow_unused=True), strict=True))
        return None, *map(found.get, ctx.sources)
