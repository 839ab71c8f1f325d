"""The interface of invertible transformations, and a registry that adapts modules of any library to it.

`as_bijection(module)` returns a `Bijection`: forward and inverse with log-determinants, a context, a device, samples.
`testing`, `diagnostics`, `reversible` and `sampling` use it for all modules they take. It supports modules of nflows,
normflows, torch.distributions, Pyro, zuko, FrEIA and torchflows, and any module with `forward(x) -> (y, log_abs_det)`
and `inverse`. `register` adds others.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Bijection", "NoInverse", "as_bijection", "is_bijection", "register"]

# A tensor, or several from a module that splits its input.
Value = Tensor | Sequence[Tensor]
Direction = str | Callable[[Any, Any, Any], Any]

# The adapter that registers the classes of each package, imported when the first such class appears.
_ADAPTERS = {
    "FrEIA": "nflows_kconv.freia",
    "nflows": "nflows_kconv.nflows",
    "normflows": "nflows_kconv.normflows",
    "pyro": "nflows_kconv.pyro",
    "torch.distributions": "nflows_kconv.distributions",
    "torchflows": "nflows_kconv.torchflows",
    "zuko": "nflows_kconv.zuko",
}

_EXPECTED = (
    "must have forward(x) -> (y, log_abs_det) and inverse, as in nflows and normflows, be a transform or a flow of "
    "nflows, normflows, torch.distributions, Pyro, zuko, FrEIA or torchflows, or have a class registered with "
    "nflows_kconv.bijection.register"
)

# What each class registered. For anything else its bases count, in the order of its MRO.
_registry: dict[type, dict[str, Any]] = {}


class NoInverse(NotImplementedError):
    """Raised when a transformation has no inverse, or none that it can compute."""


class Bijection:
    """An invertible transformation, made by `as_bijection`.

    It holds only the module, so it reflects every change to it. Errors of the module propagate, except that errors for
    a missing inverse become `NoInverse`.

    Attributes:
        module: The module, without the wrapper of torch.compile.
    """

    def __init__(self, module: Any) -> None:
        self.module = _unwrapped(module)

    def __repr__(self) -> str:
        """Returns the class of the module."""
        return f"Bijection({type(self.module).__name__})"

    def forward(self, x: Value, context: Any = None) -> tuple[Value, Tensor]:
        """Computes y = f(x) and log |det dy/dx|: from data to latent for whole flows, else in the library's forward.

        Args:
            x: [B, ...].
            context: What the transformation is conditioned on, one row per sample. None omits it.

        Returns:
            [B, ...], or a list of such tensors if the module returns several; and [B].

        Raises:
            TypeError: If the module does not return outputs and log-determinants.
            ValueError: If the log-determinants have another shape than [B].
        """
        return self._checked("forward", x, self._call("forward", x, context))

    def inverse(self, y: Value, context: Any = None) -> tuple[Value, Tensor]:
        """Computes x = f^-1(y) and log |det dx/dy|, without the cache of a `torch.distributions.Transform`.

        Args:
            y: What `forward` returns.
            context: As in `forward`.

        Returns:
            As `forward`. If the module returns only x, the log-determinant is minus that of `forward`.

        Raises:
            NoInverse: If the module reports that it has no inverse.
            TypeError: As `forward`.
            ValueError: As `forward`.
        """
        result = self._inverted(y, context)
        if isinstance(result, Tensor):
            result = result, -self.forward(result, context)[1]
        return self._checked("inverse", y, result)

    def undo(self, y: Value, context: Any = None) -> Value:
        """Returns only x of `inverse`, with one call of the module; raises NoInverse as `inverse` does."""
        result = self._inverted(y, context)
        return result if isinstance(result, Tensor) else result[0]

    def sample(self, num_samples: int, context: Any = None) -> Tensor:
        """Draws samples of a whole flow, [num_samples, ...].

        Args:
            num_samples: How many to draw.
            context: What they are conditioned on, one row per sample.

        Raises:
            ValueError: If a context is given and the flow takes none.
        """
        return _apply(_told(self.module, "sample", "sample"), self.module, num_samples, context)

    @property
    def can_sample(self) -> bool:
        """Whether it is a whole flow, so that `sample` can draw from it."""
        return _is_there(self.module, _told(self.module, "sample", "sample"))

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the attributes that hold a coupling's networks; none for other modules."""
        return tuple(_told(self.module, "networks", ()))

    @property
    def why_not_captured(self) -> str | None:
        """What a CUDA graph of it would do wrong in its current state, or None, as registered."""
        return _told(self.module, "why_not_captured", _nothing)(self.module)

    def parts(self, context: Any = None) -> list[Bijection]:
        """Returns the transformations that make up this one, in order; itself if none are registered.

        Registered parts take no context, because they are built for this one.
        """
        parts = _told(self.module, "parts", _nothing)(self.module, context)
        return [inner for part in parts for inner in as_bijection(part).parts()] if parts else [self]

    @property
    def methods(self) -> set[str]:
        """The names of the methods by which other modules run it, in either direction.

        These are forward, inverse and the registered methods; for a registered function of the inverse, the one method
        that it calls.
        """
        directions = [_told(self.module, direction, direction) for direction in ("forward", "inverse")]
        names = {"forward", "inverse", *(name for name in directions if isinstance(name, str))}
        if inspect.isfunction(directions[1]):
            called = {
                name for name in directions[1].__code__.co_names if inspect.ismethod(getattr(self.module, name, None))
            }
            names |= called if len(called) == 1 else set()
        return {name for name in names if _is_there(self.module, name)}

    @property
    def device(self) -> torch.device:
        """The device of all parameters and buffers; the CPU if there are none.

        Raises:
            RuntimeError: If they are on several devices.
        """
        if not isinstance(self.module, nn.Module):
            return torch.device("cpu")
        tensors = chain(self.module.named_parameters(), self.module.named_buffers())
        names = {tensor.device: name for name, tensor in tensors}
        if len(names) > 1:
            found = ", ".join(f"{name} on {device}" for device, name in names.items())
            raise RuntimeError(f"{type(self.module).__name__} must be on one device, got {found}")
        return next(iter(names), torch.device("cpu"))

    def _call(self, direction: str, value: Value, context: Any) -> Any:
        return _apply(_told(self.module, direction, direction), self.module, value, context)

    def _inverted(self, y: Value, context: Any) -> Any:
        try:
            return self._call("inverse", y, context)
        except Exception as error:
            if _says_no_inverse(error) or _told(self.module, "says_no_inverse", _says_no_inverse)(error):
                raise NoInverse(f"{type(self.module).__name__} has no inverse: {error}") from error
            raise

    def _checked(self, direction: str, value: Value, result: Any) -> tuple[Value, Tensor]:
        name = f"{type(self.module).__name__}.{direction}"
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"{name} must return outputs and log-determinants, got {_describe(result)}")
        output, log_abs_det = result
        batch = list((value if isinstance(value, Tensor) else value[0]).shape[:1])
        if not isinstance(log_abs_det, Tensor) or list(log_abs_det.shape) != batch:
            raise ValueError(f"{name} must return log-determinants of shape {batch}, got {_describe(log_abs_det)}")
        return output, log_abs_det


def as_bijection(module: Any) -> Bijection:
    """Returns a module of any library as a `Bijection`.

    Args:
        module: A transform or a flow of nflows, normflows, torch.distributions, Pyro, zuko, FrEIA or torchflows; a
            module with `forward(x) -> (y, log_abs_det)` and `inverse`, which may take a context as second argument; a
            module of a registered class; or a `Bijection`, which is returned.

    Raises:
        TypeError: If it is none of these.

    Examples:
        >>> import torch
        >>> from torch.distributions import SigmoidTransform
        >>> from nflows_kconv.bijection import as_bijection
        >>> y, log_abs_det = as_bijection(SigmoidTransform()).forward(torch.zeros(2, 3))
        >>> log_abs_det.shape
        torch.Size([2])
    """
    if isinstance(module, Bijection):
        return module
    if not is_bijection(module):
        raise TypeError(f"{type(module).__name__} {_EXPECTED}")
    return Bijection(module)


def is_bijection(module: Any) -> bool:
    """Returns whether `as_bijection` accepts a module."""
    if isinstance(module, type):
        return False
    module = _unwrapped(module)
    return all(_is_there(module, _told(module, direction, direction)) for direction in ("forward", "inverse"))


def register(
    cls: type,
    *,
    forward: Direction | None = None,
    inverse: Direction | None = None,
    sample: Direction | None = None,
    parts: Callable[[Any, Any], Sequence[Any] | None] | None = None,
    networks: Sequence[str] | None = None,
    says_no_inverse: Callable[[Exception], bool] | None = None,
    why_not_captured: Callable[[Any], str | None] | None = None,
) -> None:
    """Registers how to use modules of a class and its subclasses as invertible transformations.

    Omitted arguments come from the base classes; the defaults are `forward(x) -> (y, log_abs_det)` and `inverse`.

    Args:
        cls: The class.
        forward: The name of a method, or a function of (module, x, context). Either returns outputs and
            log-determinants, [B].
        inverse: The same for the other direction. It may return only the result.
        sample: For a whole flow, the name of a method, or a function of (module, num_samples, context), that returns
            that many samples, one per row of the context. It raises a ValueError for a context that the flow does not
            take.
        parts: A function of (module, context) that returns the transformations whose composition, without a context, is
            the module, or None.
        networks: For couplings, the names of the attributes that hold their networks. Both directions must evaluate
            each network once, with the same values.
        says_no_inverse: Which exceptions raised in `inverse` mean that there is none, besides NotImplementedError.
        why_not_captured: A function of the module that returns what a CUDA graph of it would do wrong, or None.

    Raises:
        TypeError: If `cls` is not a class.

    Examples:
        >>> from torch import nn
        >>> from nflows_kconv import bijection
        >>> class Scale(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x, x.new_full([len(x)], x[0].numel() * 0.6931)
        ...
        ...     def reverse(self, y):
        ...         return y / 2
        >>> bijection.register(Scale, inverse="reverse")
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, got {cls!r}")
    told = dict(
        forward=forward,
        inverse=inverse,
        sample=sample,
        parts=parts,
        networks=networks,
        says_no_inverse=says_no_inverse,
        why_not_captured=why_not_captured,
    )
    _registry.setdefault(cls, {}).update({kind: value for kind, value in told.items() if value is not None})
    _told_by_class.cache_clear()


def per_sample(log_abs_det: Any, value: Value) -> Any:
    """Expands to [B] a log-determinant that a library returns as one number for all samples."""
    if isinstance(log_abs_det, Tensor) and log_abs_det.dim():
        return log_abs_det
    first = value if isinstance(value, Tensor) else value[0]
    dtype = log_abs_det.dtype if isinstance(log_abs_det, Tensor) else torch.promote_types(first.dtype, torch.float32)
    return torch.as_tensor(log_abs_det, dtype=dtype, device=first.device).expand(first.shape[:1])


def _told(module: Any, kind: str, default: Any) -> Any:
    """Returns what the class of a module registered as `kind`, or the default."""
    return _told_by_class(type(module), kind, default)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _told_by_class(cls: type, kind: str, default: Any) -> Any:
    for base in cls.__mro__:
        _import_adapter(base.__module__)
        if kind in _registry.get(base, {}):
            return _registry[base][kind]
    return default


def _unwrapped(module: Any) -> Any:
    """Returns the module inside the wrapper of torch.compile."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


def is_of_a_library(module_name: str) -> bool:
    """Returns whether a Python module belongs to torch or to a supported library."""
    return _adapter(module_name) is not None or f"{module_name}.".startswith("torch.")


def _adapter(module_name: str) -> str | None:
    return next((_ADAPTERS[package] for package in _ADAPTERS if f"{module_name}.".startswith(f"{package}.")), None)


@functools.lru_cache(maxsize=4096)
def _import_adapter(module_name: str) -> None:
    """Imports the adapter of a library, which registers its classes, given the name of a module of the library."""
    if adapter := _adapter(module_name):
        importlib.import_module(adapter)


def _apply(function: Direction, module: Any, value: Any, context: Any) -> Any:
    if not isinstance(function, str):
        return function(module, value, context)
    # Through __call__, to run hooks.
    method = module if function == "forward" and callable(module) else getattr(module, function)
    return method(value) if context is None else method(value, context)


def _is_there(module: Any, function: Direction) -> bool:
    return not isinstance(function, str) or callable(getattr(module, function, None))


def _nothing(*arguments: Any) -> None:
    return None


def _says_no_inverse(error: Exception) -> bool:
    # torch raises "not implemented for 'Half'" if it has no kernel for a dtype.
    return isinstance(error, NotImplementedError) and "not implemented for '" not in str(error)


def _describe(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
