"""Calls of the operators, and the backends that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor


class OperatorCall(NamedTuple):
    """One operator call with checked arguments.

    Attributes:
        operation: "conv", "solve", "weight_gradient", or "log_abs_det", the sum of each image, [B].
        input: [B, C, H, W] or [B, C, D, H, W]; for "log_abs_det" a log-diagonal, expanded to all images and pixels.
        other: The weight, [C, C/G, ...]; for "weight_gradient", the gradient, with the shape of the input.
        stencils: One per channel group, see `stencil`.
        bias: [C], or None.
        log_diagonal: [C], or None if the pivot's diagonal is the weight's own.
        unit_diagonal: Whether the pivot's diagonal counts as 1; for "weight_gradient", whether it has no gradient.
        transpose: Whether A^T stands for A; for "log_abs_det", whether to negate it, as for a solution.
        kernel_size: Size of the kernel.
        dilation: One number per axis.
    """

    operation: str
    input: Tensor
    other: Tensor
    stencils: Sequence[int]
    bias: Tensor | None = None
    log_diagonal: Tensor | None = None
    unit_diagonal: bool = False
    transpose: bool = False
    kernel_size: Sequence[int] = ()
    dilation: Sequence[int] = (1,)

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return self.input.dim() - 2

    @property
    def dilated(self) -> bool:
        """Whether any dilation exceeds 1."""
        return max(self.dilation) > 1


class Status(NamedTuple):
    """Whether a backend can run here, with what, or why not."""

    available: bool
    reason: str


class Implementation(NamedTuple):
    """What a backend registers.

    Attributes:
        name: The name for `use_backend`.
        device: The device type of its tensors, or "any".
        status: Returns whether it can run here, with what, or why not.
        why_not: Returns why it cannot run a call on its device type; None if it can.
        run: Runs a call.
        attempt: Takes the name and first arguments of an operator, checked only to be plain tensors, and returns the
            result, or None for any reason. Skips the checks in Python, which take longer than a small call.
    """

    name: str
    device: str
    status: Callable[[], Status]
    why_not: Callable[[OperatorCall], str | None]
    run: Callable[[OperatorCall], Tensor]
    attempt: Callable[..., Tensor | None] | None = None


_registered: dict[str, Implementation] = {}
# Shared by all threads, because backward passes have their own.
_chosen: Implementation | None = None
attempt: Callable[..., Tensor | None] | None = None  # of the chosen backend, or of the first that has one


def register(implementation: Implementation) -> None:
    """Adds a backend. The first registered one that can run a call runs it."""
    _registered[implementation.name] = implementation
    global attempt
    attempt = attempt or implementation.attempt


def registered() -> Sequence[Implementation]:
    """Returns all backends, in the order of registration."""
    return tuple(_registered.values())


def run(call: OperatorCall) -> Tensor:
    """Runs a call on the chosen backend, or on the first that can run it.

    Raises:
        RuntimeError: If the chosen backend, or every backend, cannot run it.
    """
    device, chosen = call.input.device.type, _chosen
    if chosen is not None:
        reason = f"it runs {chosen.device} tensors" if chosen.device not in ("any", device) else chosen.why_not(call)
        if reason is not None:
            raise RuntimeError(f'backend "{chosen.name}" must be able to run this call on {device} tensors: {reason}')
        return chosen.run(call)
    for _, for_device, _, why_not, run_call, _ in _registered.values():
        if for_device in (device, "any") and why_not(call) is None:
            return run_call(call)
    reasons = [f"{each.name}: {each.why_not(call)}" for each in _registered.values() if each.device == device]
    raise RuntimeError(f"{call.operation} on {device} tensors needs a backend that can run it, got {reasons or 'none'}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes all calls of this process run on one backend, inside this context, instead of on the fastest.

    Args:
        name: A key of `available_backends()`.

    Raises:
        ValueError: If the backend does not exist or is not available here.
        RuntimeError: In a call inside, if the backend cannot run it, for example because of its device.

    Examples:
        >>> import torch
        >>> from nflows_kconv import InvertibleConv2d, use_backend
        >>> layer, images = InvertibleConv2d(4), torch.randn(2, 4, 8, 8)
        >>> with use_backend("reference"):
        ...     expected, _ = layer.inverse(images)
    """
    if not isinstance(name, str) or name not in _registered:
        raise ValueError(f"backend must be one of {tuple(_registered)}, got {name!r}")
    status = _registered[name].status()
    if not status.available:
        raise ValueError(f'backend "{name}" must be available here, but {status.reason}')
    global _chosen, attempt
    before = _chosen, attempt
    _chosen, attempt = _registered[name], _registered[name].attempt
    try:
        yield
    finally:
        _chosen, attempt = before
