"""Finds the steps of a flow at which a round trip, from images to latent variables and back, loses precision."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_kconv import checks
from nflows_kconv.attributes import replaced
from nflows_kconv.bijection import Bijection, as_bijection, is_bijection
from nflows_kconv.layer import InvertibleConv
from nflows_kconv.torch_internals import deep_copy

_HARMLESS = 1e-4  # 1/40 of a gray level of 256
_UNEXPLAINED = 100  # roundings, beyond which the growth at steps does not explain an error


class StepError(NamedTuple):
    """Errors of a round trip at a step. Each is the largest error relative to the largest entry.

    Attributes:
        name: The name of the step's module in the flow.
        kind: Its class.
        local: The error of undoing the step directly, from its own output.
        arriving: The error on the way back at the step's entry, on the side of the latent variable.
        leaving: The error on the way back at the step's exit, on the side of the data.
        growth: leaving / arriving, with an arriving error of at least one rounding; 1 for a step that rounds to whole
            numbers.
    """

    name: str
    kind: str
    local: float
    arriving: float
    leaving: float
    growth: float


class RoundTrip(NamedTuple):
    """The errors of a round trip, printed as a table.

    Attributes:
        steps: From data to latent variable; the way back goes through them from last to first.
        error: The largest leaving error of a step. Steps that round to whole numbers, as dequantisation does on the way
            back, do not count: at the edge of a cell the smallest error changes the result by one.
        rounding: The size of one rounding, the resolution of the dtype.
        settings: The settings for the precision of float32 convolutions and matrix products on this device.
        verdict: Whether the error is harmless, at most 1e-4, and if not, which kind of step causes it, if any.
        cure: What helps; empty if nothing is wrong.
    """

    steps: tuple[StepError, ...]
    error: float
    rounding: float
    settings: dict[str, str]
    verdict: str
    cure: str

    def __str__(self) -> str:
        """Returns the table, one line per step, with settings, verdict and cure."""
        width = max(len(step.name) for step in self.steps)
        kind_width = max(len(step.kind) for step in self.steps)
        lines = [f"{'step':{width}}  {'kind':{kind_width}}     local  arriving   leaving    growth"]
        for name, kind, *errors in self.steps:
            lines.append(f"{name:{width}}  {kind:{kind_width}}" + "".join(f"  {error:8.1e}" for error in errors))
        lines.append(", ".join(f"{name}: {value}" for name, value in self.settings.items()))
        return "\n".join([*lines, self.verdict, *([self.cure] if self.cure else [])])


@torch.no_grad()
def round_trip(flow: Any, images: Tensor, context: Any = None) -> RoundTrip:
    """Sends images to latent variables and back, and finds the steps where errors arise and grow.

    A step is a module that `nflows_kconv.bijection` supports, from one tensor to another, that contains no such modules
    or has its own parameters. Containers, and transforms of torch.distributions and zuko that consist of others, are
    opened. A copy of the flow runs in evaluation mode; the flow, its gradients and random numbers do not change.

    Images of a data set show how well the flow reconstructs. Try samples too, which may lie where it amplifies more.

    Args:
        flow: A flow or a transform of nflows, normflows, torch.distributions, Pyro, zuko, FrEIA or torchflows, a module
            with `forward` and `inverse`, or one of a registered class. Whole flows run from data to latent first,
            others in their library's forward direction.
        images: [B, ...], as for the flow's `log_prob`; converted to the dtype of the parameters.
        context: What the flow is conditioned on, or None. Labels that affect only the base distribution may be omitted.

    Returns:
        The errors, a verdict and a cure.

    Raises:
        TypeError: If `flow` is none of these, or `images` is not a dense real tensor.
        NotImplementedError: If the flow has no inverse (`nflows_kconv.bijection.NoInverse`).
        ValueError: If it has no steps, or the way back does not run through them in reverse order.

    Examples:
        >>> import torch
        >>> from nflows_kconv import InvertibleConv2d
        >>> from nflows_kconv.diagnostics import round_trip
        >>> result = round_trip(InvertibleConv2d(12), torch.randn(10, 12, 16, 16))
        >>> result.error < 10 * result.rounding
        True
    """
    checks.real("images", images)
    bijection = as_bijection(_evaluating_copy(as_bijection(flow).module))
    parts = bijection.parts(context)
    if parts[0].module is not bijection.module:
        # Parts built for the context may contain modules that were not copied with the flow.
        context = None
        if not isinstance(bijection.module, nn.Module):
            parts = [as_bijection(_evaluating_copy(part.module)) for part in parts]
    names, modules = _names(bijection.module, parts)
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    # FrEIA has integer parameters.
    dtypes = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    images = images.to(next(dtypes, images.dtype))
    devices = {tensor.device for tensor in (images, *parameters) if tensor.is_cuda}
    recorder = _Recorder()
    there = [(part.module, partial(_forward, part, context)) for part in parts]
    back = [(part.module, partial(part.undo, context=context)) for part in reversed(parts)]
    with torch.random.fork_rng(devices), replaced(recorder.replacements(modules)):
        latent, encoding = recorder.record(there, images.clone())
        _, decoding = recorder.record(back, latent)
        decoding.reverse()
        if not encoding or [id(call.module) for call in encoding] != [id(call.module) for call in decoding]:
            there_and_back = (", ".join(names[id(call.module)] for call in calls) for calls in (encoding, decoding))
            raise ValueError(
                "flow must call its bijections in reverse order on the way back, got [{}] forward and, reversed, "
                "[{}] back".format(*there_and_back)
            )
        undone = [second.repeat(first.output.clone()) for first, second in zip(encoding, decoding, strict=True)]

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
        steps.append(StepError(names[id(first.module)], type(first.module).__name__, local, arriving, leaving, growth))
    error = max(errors)
    settings = _settings(encoding[0].output.device.type)
    verdict, cure = _judge(encoding, steps, error, rounding, settings)
    return RoundTrip(tuple(steps), error, rounding, settings, verdict, cure)


class _Call(NamedTuple):
    """A step's call in one direction, which can be repeated with another input."""

    module: Any
    input: Tensor
    output: Tensor
    repeat: Callable[[Tensor], Tensor]


class _Recorder:
    """Records the calls of steps by replacing their methods."""

    def __init__(self) -> None:
        self._calls: list[_Call] | None = None

    def replacements(self, modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        """Returns the replacements for the methods by which others run each bijection."""
        for module in modules:
            if is_bijection(module):
                for name in as_bijection(module).methods:
                    yield module, name, self._recording(module, getattr(module, name))

    def record(self, parts: Sequence[tuple[Any, Callable[[Any], Any]]], input: Any) -> tuple[Any, list[_Call]]:
        """Returns the result of the parts, (module, function), in sequence, and the calls of their steps.

        A part that calls no steps is itself a step.
        """
        calls: list[_Call] = []
        self._calls = calls
        try:
            for module, function in parts:
                count, given = len(calls), _clone(input)
                input = function(input)
                returned = _clone(input)
                if len(calls) == count and given is not None and returned is not None:
                    calls.append(_Call(module, given, returned, function))
            return input, calls
        finally:
            self._calls = None

    def _recording(self, module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # some code reads signatures
        def wrapped(input: Any, *args: Any, **kwargs: Any) -> Any:
            if self._calls is None:
                return function(input, *args, **kwargs)
            start = len(self._calls)
            given = _clone(input)  # some steps modify their input
            result = function(input, *args, **kwargs)
            returned = _clone(_first(result))
            inner = self._calls[start:]
            if inner and _is_container(module, _same(inner[0].input, given), _same(inner[-1].output, returned)):
                return result
            del self._calls[start:]
            if given is not None and returned is not None:

                def repeat(other: Tensor) -> Tensor:
                    again = function(other if isinstance(input, Tensor) else [other], *args, **kwargs)
                    return _only_tensor(_first(again))  # type: ignore[return-value]

                self._calls.append(_Call(module, given, returned, repeat))
            return result

        return wrapped


def _forward(part: Bijection, context: Any, x: Any) -> Any:
    return part.forward(x, context)[0]


def _evaluating_copy(flow: Any) -> Any:
    """Returns a copy in evaluation mode. Transforms of torch have no mode, and some cannot be copied."""
    return deep_copy(flow).eval() if isinstance(flow, nn.Module) else flow


def _names(flow: Any, parts: list[Bijection]) -> tuple[dict[int, str], list[nn.Module]]:
    """Returns names of parts and inner modules by id, because torch's transforms have no hash; and the modules."""
    names = {id(part.module): str(index) for index, part in enumerate(parts)} | {id(flow): "(flow)"}
    modules: dict[int, nn.Module] = {}
    for owner in (flow, *(part.module for part in parts)):
        if isinstance(owner, nn.Module):
            modules |= {id(module): module for module in owner.modules()}
            names |= {id(module): name for name, module in owner.named_modules() if name}
    return names, list(modules.values())


def _is_container(module: nn.Module, begins: bool, ends: bool) -> bool:
    """Returns whether a module only calls steps, one of which takes its input and one of which returns its output.

    Multiscale flows split and join tensors, so one of the two suffices. A step with its own parameters may call another
    first, as nflows' OneByOneConvolution permutes before it multiplies.
    """
    has_parameters = next(module.parameters(recurse=False), None) is not None
    return (begins and ends) or ((begins or ends) and not has_parameters)


def _clone(value: Any) -> Tensor | None:
    tensor = _only_tensor(value)
    return None if tensor is None else tensor.clone()


def _only_tensor(value: Any) -> Tensor | None:
    """Returns the only tensor, which FrEIA wraps in a tuple; None for several tensors."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, Tensor) else None


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _same(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())


def _error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest error over the largest entry; infinity if something is not finite."""
    dtype = torch.promote_types(actual.dtype, torch.float32)  # some devices have no float64
    difference = (actual.to(dtype) - expected.to(dtype)).abs()
    if not difference.numel() or not difference.any():
        return 0.0
    error = (difference.max() / expected.to(dtype).abs().max()).item()
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
            "Look for a module that computes something besides calling its steps, and give round_trip its parts.",
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
    if isinstance(module, InvertibleConv):
        cure = (
            "Train with layers of max_inverse_gain=4, or run the flow in float64, flow.double(); "
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
