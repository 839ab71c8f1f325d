"""Wraps a copy of a transform of any library and records everything a call does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import bijection
from nflows_kconv.float64 import to_device_with_float64, to_float64
from nflows_kconv.torch_internals import deep_copy, tree_map_only

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours

MAX_SHOWN = 24  # entries of a tensor that a failure prints


class NoInverse(AssertionError):
    """The transform has no inverse, or none in its current mode."""


class Subject:
    """A copy of a transform as `forward(x) -> (y, log_abs_det)` and `inverse(y) -> (x, log_abs_det)`.

    Arguments are tensors [B, ...] and do not change; results are finite. Several output tensors, as of a multiscale
    flow, are flattened and concatenated. Each call starts from the same state of torch's random numbers, so noise
    repeats, and restores it. Errors of the transform become AssertionErrors.

    Args:
        transform: A transform that `nflows_kconv.bijection.as_bijection` accepts.
        context: Second argument of each call; omitted if None.

    Attributes:
        prepare: A function that a call first applies to its copy of the argument.
        side_effects: Descriptions of side effects of the calls.

    Raises:
        TypeError: If `as_bijection` does not accept the transform, or it cannot be copied.
    """

    def __init__(self, transform: Any, context: Any = None) -> None:
        try:
            transform, context = deep_copy((transform, context))
        except Exception as error:
            raise TypeError(f"a transform must be deep-copyable, for tests to work on copies, got {error!r}") from error
        self.bijection, self.context = bijection.as_bijection(transform), context
        self.transform = self.bijection.module
        self.module = self.transform if isinstance(self.transform, nn.Module) else None
        self.prepare: Callable[[Tensor], Tensor] = as_it_is
        self.side_effects: set[str] = set()
        self._latent_shapes: list[torch.Size] | None = None
        self.step()

    def describe(self) -> str:
        """Returns the type and mode of the transform."""
        name = f"{type(self.transform).__module__}.{type(self.transform).__qualname__}"
        return name if self.module is None else f"{name} in {'training' if self.module.training else 'evaluation'} mode"

    def copy(self) -> Subject:
        """Returns an independent copy without the library's caches."""
        other = deep_copy(self)
        other.step()
        return other

    def in_float64(self) -> Subject:
        """Returns a copy with parameters, buffers and context in float64; on the CPU if their device has no float64."""
        other = self.copy()
        if other.module is not None:
            other.module._apply(to_device_with_float64).to(torch.float64)
        other.context = tree_map_only(
            Tensor,
            lambda tensor: to_float64(tensor) if tensor.is_floating_point() else to_device_with_float64(tensor),
            other.context,
        )
        return other

    def step(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Changes trained parameters in place, in training mode, in which libraries drop their caches."""
        if self.module is None:
            return
        modes = {part: part.training for part in self.module.modules()}
        self.module.train()
        if change is not None:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(change(parameter))
        for part, mode in modes.items():
            part.training = mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outputs and their log-determinants."""
        return self.call("forward", x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inverse of outputs of `forward`, and its log-determinants."""
        return self.call("inverse", y)

    def call(self, direction: str, argument: Tensor) -> tuple[Tensor, Tensor]:
        """Calls "forward" or "inverse"."""
        name = f"{type(self.transform).__name__}.{direction}"
        own = self.prepare(argument.clone())
        before = own.detach().clone()
        try:
            with self._seeded(argument.device):
                outputs, log_abs_det = getattr(self.bijection, direction)(self._parts(direction, own), self.context)
        except Exception as error:
            if isinstance(error, bijection.NoInverse):
                raise NoInverse(str(error)) from error
            # The message of `as_bijection` already names the module.
            got = error if str(error).startswith(type(self.transform).__name__) else f"{name} raised {error!r}"
            raise AssertionError(f"{got} for {describe(argument)}") from error
        if not torch.equal(own.nan_to_num(), before.nan_to_num()):
            self.side_effects.add(f"{name} changes its argument in place")
        if not isinstance(outputs, Tensor):
            self._latent_shapes = [part.shape for part in outputs]
            outputs = torch.cat([part.flatten(1) for part in outputs], 1)
        for what, value in {"outputs": outputs, "log-determinants": log_abs_det}.items():
            if not value.is_floating_point():
                raise AssertionError(f"{name} must return floating-point tensors, got {describe(value)}")
            if not value.isfinite().all():
                index = value.isfinite().logical_not().nonzero()[0].tolist()
                got = f"{name} returns {what} that are not finite, {value[tuple(index)].item()} at {index}"
                raise AssertionError(f"{got}, for {describe(argument)}{_without_variance(argument)}")
        return outputs, log_abs_det

    def _parts(self, direction: str, argument: Tensor) -> Tensor | list[Tensor]:
        """Splits concatenated outputs into the tensors that `forward` returned."""
        if direction == "forward" or self._latent_shapes is None:
            return argument
        flat = argument.split([shape[1:].numel() for shape in self._latent_shapes], 1)
        return [part.reshape(-1, *shape[1:]) for part, shape in zip(flat, self._latent_shapes, strict=True)]

    @contextmanager
    def _seeded(self, device: torch.device) -> Iterator[None]:
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        before = [generator.get_state() for generator in generators]
        starts = [generator.manual_seed(0).get_state() for generator in generators]
        try:
            yield
            if not all(torch.equal(g.get_state(), start) for g, start in zip(generators, starts, strict=True)):
                self.side_effects.add(f"{type(self.transform).__name__} draws from torch's global random numbers")
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def as_it_is(tensor: Tensor) -> Tensor:
    """Returns the tensor."""
    return tensor


def describe(value: Any) -> str:
    """Returns dtype and shape of a tensor, or the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def show(tensor: Tensor) -> str:
    """Returns the Python code of a small tensor, or a description of a large one."""
    if tensor.numel() > MAX_SHOWN:
        return describe(tensor)
    digits = {torch.float64: 17, torch.float32: 9}.get(tensor.dtype, 5)
    numbers = re.sub(r"[^][, ]+", lambda number: f"{float(number[0]):.{digits}g}", str(tensor.tolist()))
    return f"torch.tensor({numbers}, dtype={tensor.dtype})"


def _without_variance(inputs: Tensor) -> str:
    """Returns a note if the inputs cannot initialise a normalisation."""
    channels = inputs.unsqueeze(-1).transpose(0, 1).flatten(1)
    if not (channels == channels[:, :1]).all(1).any():
        return ""
    return " with a channel that is the same everywhere: it has no variance, if that is to be normalised"
