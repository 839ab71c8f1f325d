"""The layer for torch.distributions, and so for Pyro and zuko, which build on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints

from nflows_kconv import bijection, conditional, functional, layer, ops, periodic
from nflows_kconv.batch import flatten_batch, flatten_contexts

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "InvertibleConv1d",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
]


class _Bijective(Transform):
    """Base of all transforms in this module."""

    bijective = True
    sign = 1  # det > 0: the Jacobian is triangular with a positive diagonal, or connected to one by invertible matrices

    def with_cache(self, cache_size: Literal[0, 1] = 1) -> _Bijective:
        """Returns a transform that shares the parameters and has another cache size.

        Raises:
            ValueError: If `cache_size` is neither 0 nor 1.
        """
        if cache_size == self._cache_size:
            return self
        twin = self.__new__(type(self))  # not copy.copy, which parametrizations refuse
        twin.__dict__.update(self.__dict__)  # shares the dictionaries of parameters and buffers
        Transform.__init__(twin, cache_size)
        return twin


class _Transform(layer.KernelLayer, _Bijective):
    """A layer with the interface of torch.distributions."""

    __hash__ = object.__hash__  # Transform removes it, and modules need it

    def __init__(
        self, num_channels: int, kernel_size: int | Sequence[int] = 3, *, cache_size: Literal[0, 1] = 0, **options: Any
    ) -> None:
        super().__init__(num_channels, kernel_size, **options)
        Transform.__init__(self, cache_size)
        self._cached_state: list[tuple[int, int]] = []

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log |det dy/dx|, [...], in float32 at least.

        Args:
            x: [..., C, H, W]; only its shape matters.
            y: Ignored.

        Raises:
            ValueError: If x has fewer dimensions.
        """
        log_abs_det = self._log_abs_det(flatten_batch(x, self.dimensions), self._jacobian(), 1)
        return log_abs_det.reshape(x.shape[: -1 - self.dimensions])

    def __call__(self, x: Tensor) -> Tensor:
        """Computes y = A x, [..., C, H, W]. Errors are those of `nflows_kconv.functional.conv2d`."""
        self._forget_if_changed()
        return Transform.__call__(self, x)

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget_if_changed()
        return super()._inv_call(y)

    def _forget_if_changed(self) -> None:
        if self._cache_size:
            tensors = chain(self.parameters(), self.buffers())  # pruning and spectral_norm have buffers
            state = [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]
            if state != self._cached_state:
                self._cached_x_y, self._cached_state = (None, None), state

    def _call(self, x: Tensor) -> Tensor:
        return nn.Module.__call__(self, flatten_batch(x, self.dimensions))[0].reshape(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse(flatten_batch(y, self.dimensions))[0].reshape(y.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and files, without the cached inverse and values."""
        return {**super().__getstate__(), "_inv": None, "_cached_x_y": (None, None)}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Transform:
        """Copies the state, without `__getstate__`, which parametrizations replace."""
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__ = copy.deepcopy(_Transform.__getstate__(self), memo)
        return twin


class InvertibleConv2d(_Transform, layer.InvertibleConv2d):
    """`nflows_kconv.InvertibleConv2d` as a `torch.distributions.Transform` of images [..., C, H, W].

    A call convolves: y = A x; `inv` solves: x = A^-1 y. FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266).
    Parameters, state_dict and the methods `forward` and `inverse` are those of `nflows_kconv.InvertibleConv2d`.

    `torch.distributions.TransformedDistribution` takes transforms from noise to data. With `inv` it convolves for the
    density and solves for samples; without, the other way round (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634). It
    does not register the parameters: keep the transform itself in a module, or pass it to `pyro.module`. In zuko, whose
    flows run from data to noise, `zuko.lazy.UnconditionalTransform(torch.nn.Identity(), InvertibleConv2d(12))`
    registers it.

    Args:
        num_channels: C, a multiple of the number of corners.
        kernel_size: k, or (kh, kw).
        cache_size: 1 keeps the last x and y until parameters change, other than through `.data`: `transform(x)` then
            returns the same tensor, and `transform.inv(y)` returns x.
        options: Other arguments of `nflows_kconv.InvertibleConv2d`: `corners`, `diagonal` and so on.

    Raises:
        TypeError: See `nflows_kconv.InvertibleConv2d`.
        ValueError: See `nflows_kconv.InvertibleConv2d`; and if `cache_size` is neither 0 nor 1.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, TransformedDistribution
        >>> from nflows_kconv.distributions import InvertibleConv2d
        >>> transform = InvertibleConv2d(12, diagonal="learned")
        >>> noise = Normal(torch.zeros(12, 8, 8), torch.ones(12, 8, 8))
        >>> images = TransformedDistribution(noise, [transform.inv])
        >>> images.log_prob(images.sample((5,))).shape
        torch.Size([5])
    """

    domain = codomain = constraints.independent(constraints.real, 3)


class InvertibleConv1d(_Transform, layer.InvertibleConv1d):
    """`nflows_kconv.InvertibleConv1d` as a `torch.distributions.Transform`; see `InvertibleConv2d`."""

    domain = codomain = constraints.independent(constraints.real, 2)


class InvertibleConv3d(_Transform, layer.InvertibleConv3d):
    """`nflows_kconv.InvertibleConv3d` as a `torch.distributions.Transform`; see `InvertibleConv2d`."""

    domain = codomain = constraints.independent(constraints.real, 4)


class PeriodicConv2d(_Transform, periodic.PeriodicConv2d):
    """`nflows_kconv.PeriodicConv2d` as a `torch.distributions.Transform`; see `InvertibleConv2d`."""

    domain = codomain = constraints.independent(constraints.real, 3)


class PeriodicConv1d(_Transform, periodic.PeriodicConv1d):
    """`nflows_kconv.PeriodicConv1d` as a `torch.distributions.Transform`; see `InvertibleConv2d`."""

    domain = codomain = constraints.independent(constraints.real, 2)


class PeriodicConv3d(_Transform, periodic.PeriodicConv3d):
    """`nflows_kconv.PeriodicConv3d` as a `torch.distributions.Transform`; see `InvertibleConv2d`."""

    domain = codomain = constraints.independent(constraints.real, 4)


class _OfContexts(_Bijective):
    """A conditional layer for given contexts, [*batch, E]: weights [*batch, C, ...], log-diagonals [*batch, C]."""

    def __init__(
        self,
        layer: conditional.ConditionalInvertibleConv,
        batch: torch.Size,
        weights: Tensor,
        log_diagonals: Tensor | None,
    ) -> None:
        super().__init__()
        self.domain = self.codomain = constraints.independent(constraints.real, layer.dimensions + 1)
        self._layer, self._batch, self._weights, self._log_diagonals = layer, batch, weights, log_diagonals

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of results, whose batch is the broadcast batch of images and contexts.

        Raises:
            ValueError: If the batches do not broadcast.
        """
        batch, event = tuple(shape[: -self.event_dim]), shape[-self.event_dim :]
        try:
            return torch.Size((*torch.broadcast_shapes(batch, self._batch), *event))
        except RuntimeError:
            found = f"{batch} and {tuple(self._batch)}"
            raise ValueError(f"the batches of images and contexts must broadcast, got {found}") from None

    inverse_shape = forward_shape

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log |det dy/dx|, [...], as `InvertibleConv2d` does."""
        x, log_diagonals = self._broadcast(x), self._log_diagonals
        batch = x.shape[: -self.event_dim]
        if log_diagonals is not None:
            log_diagonals = log_diagonals.expand(1, *batch, -1).flatten(0, -2)
        return layer.log_abs_det(flatten_batch(x, self._layer.dimensions), log_diagonals).view(batch)

    def _call(self, x: Tensor) -> Tensor:
        return self._run("conv", x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run("solve", y)

    def _broadcast(self, images: Tensor) -> Tensor:
        self._layer._check_images(flatten_batch(images, self._layer.dimensions))
        return images.expand(self.forward_shape(images.shape))

    def _run(self, operation: ops.Operation, images: Tensor) -> Tensor:
        images, own, axes = self._broadcast(images), self._layer, len(self._batch)
        at = images.dim() - self.event_dim - axes  # the first axis of the contexts
        samples, batch, event = images.shape[:at], images.shape[at : at + axes], images.shape[at + axes :]

        def of_each(tensor: Tensor) -> Tensor:
            return tensor.expand(1, *batch, *tensor.shape[axes:]).flatten(0, axes)

        # Several images with one context are a batch for its weight.
        output = functional.run_each(
            operation,
            images.reshape(math.prod(samples), math.prod(batch), *event),
            of_each(self._weights),
            None if self._log_diagonals is None else of_each(self._log_diagonals),
            own._stencils,
            own.dilation,
        )
        return output.reshape(images.shape)


class _Conditional(conditional.ConditionalInvertibleConv):
    """A layer that returns transforms for contexts."""

    def condition(self, context: Tensor) -> Transform:
        """Returns the `torch.distributions.Transform` for contexts, with weights computed now.

        Args:
            context: [..., E], in the dtype of the parameters. The batches of contexts and images broadcast.

        Raises:
            TypeError: If the context is not a tensor of that dtype.
            ValueError: If it has another shape.
        """
        rows = flatten_contexts(context)
        functional.check_context(rows, self.raw_weight, None, self.context_features)
        batch, (weights, log_diagonals) = context.shape[:-1], self._parameters_of_each(rows)
        weights = weights.view(*batch, *self.raw_weight.shape)
        return _OfContexts(
            self, batch, weights, None if log_diagonals is None else log_diagonals.view(*batch, self.num_channels)
        )


class ConditionalInvertibleConv2d(_Conditional, conditional.ConditionalInvertibleConv2d):
    """`nflows_kconv.ConditionalInvertibleConv2d` that returns a `torch.distributions.Transform` for contexts.

    `condition(context)` computes the weights once and returns the transform, in the directions of `InvertibleConv2d`.
    The batches of contexts, [..., E], and images broadcast, so one context may serve all images, and each of several
    contexts many samples. Arguments, parameters, state_dict, `forward` and `inverse` are those of
    `nflows_kconv.ConditionalInvertibleConv2d`. A distribution does not register the parameters: keep the layer in a
    module. For Pyro and zuko use the classes in `nflows_kconv.pyro` and `nflows_kconv.zuko`.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, TransformedDistribution
        >>> from nflows_kconv.distributions import ConditionalInvertibleConv2d
        >>> layer = ConditionalInvertibleConv2d(12, context_features=5)
        >>> noise = Normal(torch.zeros(12, 8, 8), torch.ones(12, 8, 8))
        >>> images = TransformedDistribution(noise, [layer.condition(torch.randn(10, 5)).inv])
        >>> images.log_prob(images.sample()).shape
        torch.Size([10])
    """


class ConditionalInvertibleConv1d(_Conditional, conditional.ConditionalInvertibleConv1d):
    """`ConditionalInvertibleConv2d` for sequences."""


class ConditionalInvertibleConv3d(_Conditional, conditional.ConditionalInvertibleConv3d):
    """`ConditionalInvertibleConv2d` for volumes."""


def run_transform(transform: Transform, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a transform's result for values [B, ...] and the log-determinants [B], summed over a sample's events."""
    value = value.view_as(value)  # a new tensor, to miss the transform's cache
    output = transform(value)
    log_abs_det = transform.log_abs_det_jacobian(value, output)
    expected = value.shape[: value.dim() - transform.domain.event_dim]
    if log_abs_det.shape != expected:
        raise ValueError(
            f"{type(transform).__name__} must return log-determinants of shape {list(expected)}, got "
            f"{list(log_abs_det.shape)}"
        )
    return output, log_abs_det.flatten(1).sum(1) if log_abs_det.dim() > 1 else log_abs_det


def _run(transform: Transform, value: Tensor, context: Any, inverse: bool) -> tuple[Tensor, Tensor]:
    if context is not None:
        raise TypeError(f"context must be None for a torch Transform, which takes none, got {type(context).__name__}")
    return run_transform(transform.inv if inverse else transform, value)


def has_cached_none(error: Exception) -> bool:
    """Returns whether a Pyro transform raised the error because its only inverse, the cached one, is gone."""
    return isinstance(error, KeyError) and "cache" in str(error)


bijection.register(
    Transform,
    forward=partial(_run, inverse=False),
    inverse=partial(_run, inverse=True),
    says_no_inverse=has_cached_none,
)
bijection.register(ComposeTransform, parts=lambda transform, context: transform.parts)
