"""At which steps of a flow the error of a round trip, from images to latent variables and back, arises."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_kconv.layer import InvertibleConv2d

_HARMLESS = 1e-4  # 1/40 of a gray level of 256
_UNEXPLAINED = 100  # roundings; what the growths of steps do not tell is more


class StepError(NamedTuple):
    """What a round trip loses at a step. All errors are the largest one, relative to the largest entry.

    Attributes:
        name: Of the step's module in the flow.
        kind: Its class.
        local: Error of undoing the step at once, from its own output.
        arriving: Error of the way back from the latent variable where it enters the step.
        leaving: The same where it leaves the step, on the data's side.
        growth: leaving / arriving, where an arriving error counts as one rounding at least; 1 for a step that rounds to
            whole numbers.
    """

    name: str
    kind: str
    local: float
    arriving: float
    leaving: float
    growth: float


class RoundTrip(NamedTuple):
    """The errors of a round trip; printed, it is a table.

    Attributes:
        steps: The one next to the data first; the way back goes through them from the last to the first.
        error: The largest error that leaves a step. Steps that round to whole numbers, as dequantisation does on the
            way back, do not count: at the edge of a cell the smallest error makes a difference of one.
        rounding: What one rounding is: the resolution of the dtype.
        settings: What decides on the precision of convolutions and matrix products in float32, on this device.
        verdict: Whether the error is harmless, at most 1e-4, and if not, which kind of step is to blame, or that none
            is.
        cure: What helps; empty if nothing needs to.
    """

    steps: tuple[StepError, ...]
    error: float
    rounding: float
    settings: dict[str, str]
    verdict: str
    cure: str

    def __str__(self) -> str:
        """The table, a line a step, with settings, verdict and cure."""
        width = max(len(step.name) for step in self.steps)
        kind_width = max(len(step.kind) for step in self.steps)
        lines = [f"{'step':{width}}  {'kind':{kind_width}}     local  arriving   leaving    growth"]
        for name, kind, *errors in self.steps:
            lines.append(f"{name:{width}}  {kind:{kind_width}}" + "".join(f"  {error:8.1e}" for error in errors))
        lines.append(", ".join(f"{name}: {value}" for name, value in self.settings.items()))
        return "\n".join([*lines, self.verdict, *([self.cure] if self.cure else [])])


@torch.no_grad()
def round_trip(flow: nn.Module, images: Tensor, context: Tensor | None = None) -> RoundTrip:
    """Sends images to latent variables and back, and finds the steps at which errors arise and grow.

    A step is a module with `forward` and `inverse` from one tensor to another that does not consist of such modules, or
    that has parameters of its own; containers of any kind are looked through. A copy of the flow runs, in evaluation
    mode; the flow, its gradients and random numbers stay as they are.

    With images of a data set it tells about density and reconstruction. What `sample` returns may lie where the flow
    amplifies more: give it samples, too.

    Args:
        flow: A flow of nflows or normflows, or any module whose `forward` and `inverse` return a tensor or a tuple that
            begins with one; the latter runs forward first.
        images: [B, ...], as the flow's `log_prob` takes them; converted to the dtype of the parameters.
        context: If given, the condition, as the second argument of each call.

    Returns:
        The errors, a verdict and what helps.

    Raises:
        TypeError: If `flow` is no module with two directions, or `images` no tensor.
        ValueError: If it has no steps, or the way back does not run through them in the reverse order.

    Examples:
        >>> import torch
        >>> from nflows_kconv import InvertibleConv2d
        >>> from nflows_kconv.diagnostics import round_trip
        >>> result = round_trip(InvertibleConv2d(12), torch.randn(10, 12, 16, 16))
        >>> result.error < 10 * result.rounding
        True
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    flow = _checked_copy(flow)
    names = {module: name or "(flow)" for name, module in flow.named_modules()}
    recorder = _Recorder(flow)
    images = images.to(next((parameter.dtype for parameter in flow.parameters()), images.dtype))
    devices = {tensor.device for tensor in (images, *flow.parameters()) if tensor.is_cuda}
    there, back = _directions(flow, () if context is None else (context,))
    with torch.random.fork_rng(devices):
        latent, encoding = recorder.record(there, images.clone())
        _, decoding = recorder.record(back, latent)
        decoding.reverse()
        if not encoding or [call.module for call in encoding] != [call.module for call in decoding]:
            there_and_back = (", ".join(names[call.module] for call in calls) for calls in (encoding, decoding))
            raise ValueError(
                "flow must consist of modules with forward and inverse that the way back calls in reverse order, got "
                "[{}] there and, reversed, [{}] back".format(*there_and_back)
            )
        undone = [_first(call.opposite(call.output.clone())) for call in encoding]

    rounding = torch.finfo(encoding[0].output.dtype).eps
    steps, errors = [], [0.0]
    for first, second, restored in zip(encoding, decoding, undone, strict=True):
        local = _error(restored, first.input)
        arriving, leaving = _error(second.input, first.output), _error(second.output, first.input)
        if _is_whole(first.input) and _is_whole(second.output):
            growth = 1.0
        else:
            growth = 1.0 if leaving == arriving else leaving / max(arriving, rounding)
            errors.append(leaving)
        steps.append(StepError(names[first.module], type(first.module).__name__, local, arriving, leaving, growth))
    error = max(errors)
    settings = _settings(encoding[0].output.device.type)
    verdict, cure = _judge(encoding, steps, error, rounding, settings)
    return RoundTrip(tuple(steps), error, rounding, settings, verdict, cure)


class _Call(NamedTuple):
    """A step's call in one direction, with the function of the other one."""

    module: nn.Module
    input: Tensor
    output: Tensor
    opposite: Callable[[Tensor], Any]


class _Recorder:
    """Records the calls of a flow's steps, after it has replaced the methods of its modules."""

    def __init__(self, flow: nn.Module) -> None:
        self._calls: list[_Call] | None = None
        for module in flow.modules():
            if callable(getattr(module, "inverse", None)):
                forward, inverse = module.forward, module.inverse
                vars(module).update(
                    forward=self._recording(module, forward, inverse), inverse=self._recording(module, inverse, forward)
                )

    def record(self, function: Callable[[Any], Any], input: Any) -> tuple[Any, list[_Call]]:
        """What a function returns, and the calls of steps in it."""
        calls: list[_Call] = []
        self._calls = calls
        try:
            return function(input), calls
        finally:
            self._calls = None

    def _recording(self, module: nn.Module, function: Any, opposite: Any) -> Callable[..., Any]:
        def wrapped(input: Any, *args: Any, **kwargs: Any) -> Any:
            if self._calls is None:
                return function(input, *args, **kwargs)
            start = len(self._calls)
            given = _clone(input)  # some steps work in place
            result = function(input, *args, **kwargs)
            returned = _clone(_first(result))
            inner = self._calls[start:]
            if inner and _is_container(module, _same(inner[0].input, given), _same(inner[-1].output, returned)):
                return result
            del self._calls[start:]
            if given is not None and returned is not None:
                self._calls.append(_Call(module, given, returned, lambda output: opposite(output, *args, **kwargs)))
            return result

        return wrapped


def _is_container(module: nn.Module, begins: bool, ends: bool) -> bool:
    """Whether a module does nothing beside calling steps, of which one begins with its input, one ends with its output.

    Multiscale flows split and join what their steps take and give, so that one of the two must do. A step with
    parameters of its own may call another first, as nflows' OneByOneConvolution permutes before it multiplies.
    """
    has_parameters = next(module.parameters(recurse=False), None) is not None
    return (begins and ends) or ((begins or ends) and not has_parameters)


def _checked_copy(flow: nn.Module) -> nn.Module:
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow must be a torch.nn.Module, got {type(flow).__name__}")
    if not (hasattr(flow, "inverse_and_log_det") or hasattr(flow, "transform_to_noise") or hasattr(flow, "inverse")):
        raise TypeError(
            f"flow must be a flow of nflows or normflows, or have forward and inverse, got {type(flow).__name__}"
        )
    return copy.deepcopy(flow).eval()


def _directions(flow: Any, context: tuple[Tensor, ...]) -> tuple[Callable[[Any], Any], ...]:
    """From images to latent variables, and back."""
    if hasattr(flow, "inverse_and_log_det"):  # normflows
        functions = flow.inverse_and_log_det, flow.forward_and_log_det
    elif hasattr(flow, "transform_to_noise"):  # nflows
        context = tuple(map(flow._embedding_net, context))
        functions = flow._transform, flow._transform.inverse
    else:
        functions = flow.forward, flow.inverse
    return tuple(partial(_called, function, context) for function in functions)


def _called(function: Callable[..., Any], context: tuple[Tensor, ...], input: Any) -> Any:
    return _first(function(input, *context))


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _clone(value: Any) -> Tensor | None:
    return value.clone() if isinstance(value, Tensor) else None


def _same(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest entry; infinity if something is not finite."""
    difference = (actual.double() - expected.double()).abs()
    if not difference.numel() or not difference.any():
        return 0.0
    error = (difference.max() / expected.double().abs().max()).item()
    return error if math.isfinite(error) else math.inf


def _is_whole(values: Tensor) -> bool:
    return torch.equal(values, values.round())


def _settings(device_type: str) -> dict[str, str]:
    operations = ("cudnn.conv", "cuda.matmul") if device_type == "cuda" else ("mkldnn.conv", "mkldnn.matmul")
    names = (f"{operation}.fp32_precision" for operation in operations)
    settings = {f"torch.backends.{name}": attrgetter(name)(torch.backends) for name in names}
    if torch.is_autocast_enabled(device_type):
        settings["torch.autocast"] = str(torch.get_autocast_dtype(device_type))
    return settings


def _judge(
    calls: list[_Call], steps: list[StepError], error: float, rounding: float, settings: dict[str, str]
) -> tuple[str, str]:
    for call, step in zip(calls, steps, strict=True):
        if not call.output.isfinite().all():
            return f"The way to the latent variable is not finite from {step.name} on.", "Lower the learning rate."
    if error <= _HARMLESS:
        return f"The round trip errs by {error:.1e}: nothing is lost.", ""
    growth: dict[str, float] = defaultdict(float)
    for step in steps:
        growth[step.kind] += math.log10(max(step.growth, 1e-99))
    of_steps = sum(math.log10(max(step.growth, 1)) for step in steps)
    if math.log10(min(error, 1e300)) > of_steps + math.log10(_UNEXPLAINED * rounding):
        return (
            f"The round trip errs by {error:.1e}, but the steps together multiply an error by {10**of_steps:.1e} only: "
            "it arises between them.",
            "Look for a module that calls steps and computes something beside them, and give round_trip its parts.",
        )
    kind = max(growth, key=lambda kind: growth[kind])
    worst, module = max(
        ((step, call.module) for step, call in zip(steps, calls, strict=True) if step.kind == kind),
        key=lambda pair: pair[0].growth,
    )
    verdict = (
        f"The round trip errs by {error:.1e}. All {kind} together multiply the error by "
        f"{10 ** min(growth[kind], 300):.1e}, the worst, {worst.name}, by {worst.growth:.1e}."
    )
    reduced = [f"{name} = {value}" for name, value in settings.items() if value not in ("none", "ieee")]
    if isinstance(module, InvertibleConv2d):
        cure = (
            "Train with InvertibleConv2d(..., max_inverse_gain=4), or run the flow in float64, flow.double(); "
            "nflows_kconv.diagnostics.conditioning tells how much a layer amplifies."
        )
    elif reduced and any(isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) for part in module.modules()):
        cure = (
            f"The networks inside compute in reduced precision ({', '.join(reduced)}), and so jump where their input "
            'changes by a rounding: where a round trip must be exact, set "ieee" and leave autocast.'
        )
    else:
        cure = (
            f"Bound what {kind} scales with, or run the flow in float64, flow.double(); if the error stays as it is, "
            "the inverse is wrong."
        )
    return verdict, cure
