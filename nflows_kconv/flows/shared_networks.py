"""Evaluates the network of a coupling once for both directions of the coupling.

A coupling passes part of its input through unchanged, and its network takes this part, so both directions evaluate the
network on the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv.attributes import replaced
from nflows_kconv.bijection import Bijection
from nflows_kconv.torch_internals import tree_leaves, tree_map_only


@contextmanager
def evaluated_once(module: nn.Module) -> Iterator[None]:
    """Makes a step that is undone and then repeated evaluate each of its networks once, inside this context.

    Records the output of a network called without gradients, and returns it at the next call with gradients,
    differentiable in the arguments of that call, which may differ by rounding.

    Args:
        module: A module with couplings whose classes registered their networks with `nflows_kconv.bijection.register`.
    """
    with replaced(
        (coupling, name, _SharedNetwork(getattr(coupling, name)))
        for coupling in list(module.modules())
        for name in Bijection(coupling).networks
        if isinstance(getattr(coupling, name), nn.Module)
    ):
        yield


class _SharedNetwork:
    """A coupling's network while its step is undone and repeated, evaluated once for both."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.evaluations: list[tuple[list[Tensor], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the network, which couplings may read."""
        return getattr(self.network, name)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        """Returns the network's output: records it when the step is undone, replays it when the step is repeated."""
        if not torch.is_grad_enabled():
            # A non-leaf tensor, such as a resized context, may have an autograd history when repeated.
            arguments, options = tree_map_only(Tensor, _leaf, (arguments, options))
            with torch.enable_grad():
                output = self.network(*arguments, **options)
            self.evaluations.append((self._sources(arguments, options), output))
            return output.detach().clone()  # the coupling may modify it in place
        if not self.evaluations:  # the step was not undone, because its input was kept
            return self.network(*arguments, **options)
        return _Repeated.apply(self.evaluations.pop(), *self._sources(arguments, options))

    def _sources(self, *arguments: Any) -> list[Tensor]:
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return [*given, *self.network.parameters()]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


class _Repeated(torch.autograd.Function):
    """A recorded evaluation, made differentiable in these arguments."""

    @staticmethod
    def forward(ctx: Any, evaluation: tuple[list[Tensor], Tensor], *sources: Tensor) -> Tensor:
        ctx.sources, ctx.output = evaluation
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.sources, ctx.needs_input_grad[1:], strict=True)
        sources = [source for source, is_needed in needed if is_needed]
        found = dict(zip(sources, torch.autograd.grad(ctx.output, sources, gradients, allow_unused=True), strict=True))
        return None, *map(found.get, ctx.sources)
