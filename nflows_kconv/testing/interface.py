"""A transform of any library as two functions, found by its features: no library is imported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EXPECTED = (
    "a transform must have forward(x) -> (y, log_abs_det) and inverse, as in nflows and normflows; or __call__, inv "
    "and log_abs_det_jacobian, as in torch.distributions; or be a whole flow of nflows or normflows"
)


class NoInverse(AssertionError):
    """The transform says that it has no inverse, or none in its present mode."""


class Bijection:
    """A copy of a transform as `forward(x) -> (y, log_abs_det)` and `inverse(y) -> (x, log_abs_det)`.

    Arguments are tensors [B, ...] and stay as they are. Log-determinants are [B]; those of a torch Transform are summed
    over what is no event, and a single number is accepted from subclasses of normflows' Flow, as its own Squeeze,
    ActNorm and Invertible1x1Conv give it. Outputs that are lists, as of a multiscale flow, are flattened side by side.
    Each call starts from the same state of torch's random numbers, so that noise repeats, and puts them back. What the
    transform raises comes out as an AssertionError.

    Args:
        transform: An nflows Transform or Flow, a normflows Flow, NormalizingFlow or MultiscaleFlow, a torch Transform,
            or a module of no library. Forward is from data to latent for whole flows, and what the library calls
            forward for all others.
        context: Second argument of each call; left out if None.

    Attributes:
        prepare: What a call does to its copy of the argument first.
        side_effects: What the calls did beside returning a result.

    Raises:
        TypeError: If the transform is none of these, or cannot be copied.
    """

    def __init__(self, transform: Any, context: Any = None) -> None:
        try:
            with _CopyOfNonLeaves():
                transform, context = copy.deepcopy((transform, context))
        except Exception as error:
            raise TypeError(
                f"a transform must be deep-copyable, to be left as it is by its tests; got {error!r}"
            ) from error
        if hasattr(transform, "transform_to_noise"):  # nflows' Flow
            transform, context = transform._transform, transform._embedding_net(context)
        self.transform, self.context = transform, context
        self.module = transform if isinstance(transform, nn.Module) else None
        self.is_torch = hasattr(transform, "log_abs_det_jacobian") and hasattr(transform, "inv")
        if hasattr(transform, "inverse_and_log_det") and hasattr(transform, "forward_and_log_det"):
            self._methods = {"forward": "inverse_and_log_det", "inverse": "forward_and_log_det"}
        else:
            self._methods = {"forward": "__call__" if callable(transform) else "forward", "inverse": "inverse"}
        methods = [getattr(transform, name, None) for name in self._methods.values()]
        if isinstance(transform, type) or not (self.is_torch or all(map(callable, methods))):
            raise TypeError(f"{EXPECTED}; got {transform!r}")
        if self.is_torch and context is not None:
            raise TypeError("context must be None for a torch Transform, which takes none")
        self.prepare: Callable[[Tensor], Tensor] = as_it_is
        self.side_effects: set[str] = set()
        self._latent_shapes: list[torch.Size] | None = None
        self.step()

    def describe(self) -> str:
        """Type and mode."""
        name = f"{type(self.transform).__module__}.{type(self.transform).__qualname__}"
        return name if self.module is None else f"{name} in {'training' if self.module.training else 'evaluation'} mode"

    def copy(self) -> Bijection:
        """An independent copy, without what the library caches."""
        with _CopyOfNonLeaves():
            other = copy.deepcopy(self)
        other.step()
        return other

    def in_float64(self) -> Bijection:
        """A copy with parameters, buffers and context in float64."""
        other = self.copy()
        if other.module is not None:
            other.module.to(torch.float64)
        if isinstance(other.context, Tensor) and other.context.is_floating_point():
            other.context = other.context.double()
        return other

    def step(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Changes trained parameters in place, in training mode, on entering which libraries drop their caches."""
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
        """The outputs and their log-determinants."""
        return self.call("forward", x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of outputs as `forward` returns them, and its log-determinants."""
        return self.call("inverse", y)

    def call(self, direction: str, argument: Tensor) -> tuple[Tensor, Tensor]:
        """Calls "forward" or "inverse"."""
        name = f"{type(self.transform).__name__}.{direction}"
        own = self.prepare(argument.clone())
        before = own.detach().clone()
        try:
            with self._seeded(argument.device):
                result = self._run(direction, own)
        except Exception as error:
            kind = NoInverse if direction == "inverse" and _says_no_inverse(error) else AssertionError
            raise kind(f"{name} raised {error!r} for {describe(argument)}") from error
        if not torch.equal(own.nan_to_num(), before.nan_to_num()):
            self.side_effects.add(f"{name} changes its argument in place")
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise AssertionError(f"{name} must return outputs and log-determinants, got {type(result).__name__}")
        outputs, log_abs_det = result
        if isinstance(outputs, (tuple, list)):
            self._latent_shapes = [part.shape for part in outputs]
            outputs = torch.cat([part.flatten(1) for part in outputs], 1)
        log_abs_det = self._of_each_sample(direction, log_abs_det, argument)
        for value in (outputs, log_abs_det):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise AssertionError(f"{name} must return tensors of floating-point numbers, got {describe(value)}")
        return outputs, log_abs_det

    def _run(self, direction: str, argument: Tensor) -> tuple[Any, Any]:
        if self.is_torch:
            transform = self.transform.inv if direction == "inverse" else self.transform
            outputs = transform(argument)
            return outputs, transform.log_abs_det_jacobian(argument, outputs)
        parts: Tensor | list[Tensor] = argument
        if direction == "inverse" and self._latent_shapes is not None:
            flat = argument.split([shape[1:].numel() for shape in self._latent_shapes], 1)
            parts = [part.reshape(-1, *shape[1:]) for part, shape in zip(flat, self._latent_shapes, strict=True)]
        context = () if self.context is None else (self.context,)
        return getattr(self.transform, self._methods[direction])(parts, *context)

    def _of_each_sample(self, direction: str, log_abs_det: Any, argument: Tensor) -> Any:
        expected = argument.shape[:1]
        if self.is_torch:
            domain = self.transform.codomain if direction == "inverse" else self.transform.domain
            expected = argument.shape[: argument.dim() - domain.event_dim]
        elif _of_normflows(self.transform) and (not isinstance(log_abs_det, Tensor) or log_abs_det.dim() == 0):
            log_abs_det = torch.as_tensor(log_abs_det, dtype=argument.dtype, device=argument.device).expand(expected)
        if not isinstance(log_abs_det, Tensor) or log_abs_det.shape != expected:
            name = f"{type(self.transform).__name__}.{direction}"
            got = describe(log_abs_det)
            raise AssertionError(f"{name} must return log-determinants of shape {list(expected)}, got {got}")
        return log_abs_det.flatten(1).sum(1) if log_abs_det.dim() > 1 else log_abs_det

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


class _CopyOfNonLeaves(TorchFunctionMode):
    """Lets deepcopy pass tensors with a history, which a transform may hold as constants or in a cache."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


def describe(value: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _of_normflows(transform: Any) -> bool:
    return any(base.__module__.partition(".")[0] == "normflows" for base in type(transform).__mro__)


def _says_no_inverse(error: Exception) -> bool:
    if isinstance(error, NotImplementedError):
        return "not implemented for '" not in str(error)  # which torch says of a dtype
    return type(error).__name__ == "InverseNotAvailable"  # nflows'
