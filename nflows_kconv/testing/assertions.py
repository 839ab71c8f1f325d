"""What must hold of every transform, as assertions for a test suite.

Each takes a transform of nflows, normflows or torch.distributions, or a module with `forward(x) -> (y, log_abs_det)`
and `inverse`, and leaves it as it is: parameters, buffers, modes, gradients, and the state of torch's random numbers.
Tolerances follow from dtype and conditioning unless `atol` or `rtol` is given. A failure is an AssertionError that
names the worst element, error, tolerance, and how to see it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nflows_kconv.testing import state
from nflows_kconv.testing.derivatives import check_gradients, jacobian
from nflows_kconv.testing.interface import Bijection, as_it_is
from nflows_kconv.testing.probe import SAFETY, Probe, Values

_with_gradients = torch.inference_mode(False)  # which also undoes no_grad

MAX_JACOBIAN = 4096  # entries of a sample, of which the Jacobian has the square


def assert_invertible(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that inverse(forward(x)) = x.

    Args:
        transform: What to test.
        inputs: x, [B, ...].
        context: Second argument of the transform's calls; left out if None.
        tolerance: `atol` and `rtol`, either of which is 0 if the other alone is given.

    Raises:
        AssertionError: If it does not hold, the transform raises an error, or it has no inverse.
        TypeError: If the transform has none of the interfaces, or cannot be deep-copied.
        ValueError: If the inputs hold no entries or others than finite ones.
    """
    probe = _probe(transform, inputs, context, **tolerance)
    probe.need_inverse()
    probe.compare(
        "inverse(forward(x)) is not x",
        lambda t, x: {"outputs": t.inverse(t.forward(x)[0])[0]},
        lambda t, x: {"outputs": x},
    )


def assert_log_dets_cancel(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that the log-determinants of forward at x and of inverse at forward(x) add up to 0.

    Arguments and errors are those of `assert_invertible`.
    """
    probe = _probe(transform, inputs, context, **tolerance)
    probe.need_inverse()
    probe.compare(
        "the log-determinants of forward and inverse do not cancel",
        lambda t, x: {"inverse's log-determinants": t.inverse(t.forward(x)[0])[1]},
        lambda t, x: {"inverse's log-determinants": -t.forward(x)[1]},
    )


@_with_gradients
def assert_log_abs_det_matches_jacobian(
    transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None
) -> None:
    """Asserts that forward's log-determinants are log |det dy/dx| by autograd, and the inverse's the negative.

    The Jacobian, [B, D, D] for D entries a sample, takes D backward passes, in float64. The inverse's is that of
    forward at the same point, so that the inverse need not be differentiable.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed, and

    Raises:
        ValueError: If the inputs are discrete, that is integers, or whole numbers where the transform takes no
            others; or if samples have more than 4096 entries.
    """
    probe = _probe(transform, inputs, context, **tolerance)
    if probe.discrete:
        raise ValueError("inputs must be real numbers for a Jacobian to exist, got whole numbers alone")

    def log_dets(t: Bijection, x: Tensor) -> Values:
        results = probe.results(t, x)
        return {name: -value if "inverse" in name else value for name, value in results.items() if "log" in name}

    sensitivities = probe.sensitivity(log_dets)
    exact, given = log_dets(probe.exact, probe.exact_inputs), log_dets(probe.given, probe.inputs)
    for name, sensitivity in sensitivities.items():
        claim = "results differ from those in float64"
        probe.require(claim, name, given[name], exact[name], sensitivity, probe.inputs.dtype)
    if inputs[0].numel() > MAX_JACOBIAN:
        raise ValueError(f"samples must have at most {MAX_JACOBIAN} entries for a Jacobian, got {inputs[0].numel()}")
    matrices = jacobian(probe.exact, probe.exact_inputs)
    if matrices.shape[1] != matrices.shape[2]:
        probe.fail(f"the Jacobian must be square, got {matrices.shape[1]} outputs of {matrices.shape[2]} inputs")
    expected = torch.linalg.slogdet(matrices).logabsdet
    # log |det| errs by eps times the condition number, beyond 1 / eps by anything.
    eps = torch.finfo(probe.exact_inputs.dtype).eps
    condition = torch.linalg.cond(matrices, "fro").nan_to_num(torch.inf).clamp(max=1 / eps).max().item() / SAFETY
    for name, sensitivity in sensitivities.items():
        claim = "results differ from log |det| of the Jacobian"
        probe.require(claim, name, exact[name], expected, sensitivity + condition, probe.exact_inputs.dtype)


@_with_gradients
def assert_gradients_match_finite_differences(
    transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None
) -> None:
    """Asserts that autograd's gradients in inputs and parameters, through forward and inverse, are the true ones.

    A random weighting of outputs and log-determinants is differentiated along random directions, in float64, by central
    differences with steps h and h/2, whose disagreement counts as their error. Three directions must fail, so that a
    kink of a piecewise linear network between the points is no failure.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed.
    """
    probe = _probe(transform, inputs, context, **tolerance)
    for direction, argument in probe.directions(probe.exact, probe.exact_inputs):
        check_gradients(probe, direction, argument.detach())


def assert_batch_independent(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that every sample is transformed as it would be alone, in another batch, or in another order.

    A batch of one is doubled; a context that is a tensor [B, ...] goes with the samples. Forward is left out for
    discrete inputs, whose noise depends on the batch.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed.
    """
    inputs, context = _at_least_two(inputs, context)
    probe = _probe(transform, inputs, context, **tolerance)
    rows = torch.arange(len(probe.inputs), device=inputs.device)
    for part, selected in {
        "the first": rows[:1],
        "all but the first": rows[1:],
        "all in reverse": rows.flip(0),
    }.items():

        def apart(t: Bijection, direction: str, argument: Tensor, selected: Tensor = selected) -> Any:
            if direction == "forward" and probe.discrete:
                return together(t, direction, argument)
            context = t.context
            if _is_batch(context, len(argument)):
                t.context = context[selected]
            result = t.call(direction, argument[selected])
            t.context = context
            return result

        def together(t: Bijection, direction: str, argument: Tensor, selected: Tensor = selected) -> Any:
            return [value[selected] for value in t.call(direction, argument)]

        probe.compare_calls(f"{part} of the samples differ from those in the whole batch", apart, together)


def assert_shape_and_dtype_preserved(transform: Any, inputs: Tensor, context: Any = None) -> None:
    """Asserts that batch size, number of entries, dtype and device stay, and that the inverse restores the shape.

    torch.distributions' transforms may change the number of entries as their `forward_shape` says. Log-determinants
    must be floating-point numbers [B] on the same device, in torch.distributions one for each event. One number for
    all samples, which normflows' own layers give, is accepted from subclasses of its `Flow`.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed.
    """
    probe = _probe(transform, inputs, context)
    x, t = probe.inputs, probe.given
    y = t.forward(x)[0]
    if t.is_torch:
        if y.shape != t.transform.forward_shape(x.shape):
            probe.fail(f"forward must return shape {list(t.transform.forward_shape(x.shape))}, got {list(y.shape)}")
    elif len(y) != len(x) or y.numel() != x.numel():
        probe.fail(f"forward must return {len(x)} samples of {x[0].numel()} entries, got shape {list(y.shape)}")
    for direction, argument in probe.directions(t, x):
        outputs, log_abs_det = t.call(direction, argument)
        if direction == "inverse" and outputs.shape != x.shape:
            probe.fail(f"inverse must return shape {list(x.shape)}, got {list(outputs.shape)}")
        if outputs.dtype != x.dtype:
            probe.fail(f"{direction} must return {x.dtype}, got {outputs.dtype}")
        if not outputs.device == log_abs_det.device == x.device:
            probe.fail(f"{direction} must return tensors on {x.device}, got {outputs.device} and {log_abs_det.device}")


def assert_deterministic(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that results are a function of the inputs' values: of nothing else, and with no side effect.

    That is, not of earlier calls, of random numbers, of whether gradients are on, or of the inputs' memory layout (one
    may be refused with a RuntimeError); and that a call neither changes its argument in place nor draws from torch's
    global random numbers.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed.
    """
    probe = _probe(transform, inputs, context, **tolerance)
    for effect in sorted(probe.given.side_effects):
        probe.fail(effect)
    for what, (grad, layout) in VARIANTS.items():

        def call(t: Bijection, direction: str, argument: Tensor, variant: Variant = (grad, layout)) -> Any:
            grad, t.prepare = variant
            try:
                with torch.set_grad_enabled(grad):
                    return t.call(direction, argument)
            except AssertionError as error:
                if t.prepare is as_it_is or not isinstance(error.__cause__, RuntimeError):
                    raise
            finally:
                t.prepare = as_it_is
            return t.call(direction, argument)

        probe.compare_calls(f"results differ with {what}", call)


def assert_state_dict_round_trip(
    transform: Any,
    inputs: Tensor,
    context: Any = None,
    *,
    rebuild: Callable[[], Any] | None = None,
    **tolerance: float | None,
) -> None:
    """Asserts that the state_dict, saved and loaded, carries all that results depend on, and that they follow it.

    The state is that of a copy which has seen data and whose parameters have then changed in place, as an optimiser
    changes them. Loaded with `weights_only=True`, it must give the same results in a transform that never ran and in
    one that ran with other parameters. A transform that is no module has no state, and passes.

    Without `rebuild` both are copies, which share with the original even what is lost at saving. So a tensor outside
    the state_dict counts as lost if results depend on it, it does not change with the parameters as a cache does, and
    its entries differ and are no mask of -1, 0 and 1.

    Arguments and errors are those of `assert_invertible`, but that the inverse is not needed, and

    Args:
        transform: What to test.
        inputs: x, [B, ...].
        context: Second argument of the transform's calls; left out if None.
        rebuild: Builds the transform as a program does that loads its state.
        tolerance: `atol` and `rtol`.

    Raises:
        TypeError: If `rebuild` is no function.
    """
    _check_rebuild(rebuild, transform)
    probe = _probe(transform, inputs, context, **tolerance)
    if probe.given.module is None:
        return
    x, source, used = probe.inputs, probe.given.copy(), probe.given.copy()
    probe.results(source, x)  # fills caches, which may go stale by the step
    source.step(state.training_step)
    expected = probe.results(source, x)
    used.step(lambda parameter: state.training_step(state.training_step(parameter)))
    probe.results(used, x)

    sensitivities = probe.sensitivity(probe.results)
    fresh = Bijection(transform if rebuild is None else rebuild(), context)
    for name, target in {"never ran": fresh, "ran with other parameters": used}.items():
        state.load_saved(probe, target, source)
        for key, value in probe.results(target, x).items():
            claim = f"a transform that {name} differs once it has loaded the state_dict"
            probe.require(claim, key, value, expected[key], sensitivities[key], x.dtype)
    if rebuild is None:
        state.check_for_lost_tensors(probe, source, x)


@_with_gradients
def check_transform(
    transform: Any,
    inputs: Tensor,
    context: Any = None,
    *,
    rebuild: Callable[[], Any] | None = None,
    **tolerance: float | None,
) -> None:
    """Runs every assertion that applies, and again after a change of all parameters, in evaluation mode.

    The change shows what goes stale, and what initial values hide, as of couplings that start as the identity. Left out
    are: what needs an inverse, if the transform says by NotImplementedError or nflows' InverseNotAvailable that it has
    none; determinism and the Jacobian for discrete inputs, which a flow dequantises with noise; the Jacobian where the
    number of entries changes as a torch Transform's `forward_shape` says; and, with a warning, the Jacobian of samples
    with more than 4096 entries, and of integers where the transform takes fractions as well. Arguments and errors are
    those of `assert_state_dict_round_trip`.
    """
    _check_rebuild(rebuild, transform)
    inputs, context = _at_least_two(inputs, context)
    probe = _probe(transform, inputs, context, **tolerance)
    _check(probe, inputs)
    if probe.given.module is None:
        return
    assert_state_dict_round_trip(transform, inputs, context, rebuild=rebuild, **tolerance)
    probe.given.step(state.training_step)
    probe.given.module.eval()
    try:
        _check(Probe(probe.given.module, inputs, probe.given.context, **tolerance), inputs)
    except AssertionError as error:
        raise AssertionError(f"after a change of all parameters, in evaluation mode: {error}") from error


def _check(probe: Probe, inputs: Tensor) -> None:
    assert_shape_and_dtype_preserved(probe, inputs)
    assertions: list[Callable[..., None]] = [] if probe.discrete else [assert_deterministic]
    assertions += [assert_batch_independent]
    if not probe.no_inverse:
        assertions += [assert_invertible]
    if probe.discrete:
        if probe.takes_fractions:
            warnings.warn(
                "the log-determinants were not compared with the Jacobian, for which inputs must be floating-point "
                f"numbers, got {inputs.dtype}: give such, unless the transform dequantises",
                stacklevel=4,
            )
    else:
        if inputs[0].numel() > MAX_JACOBIAN:
            warnings.warn(
                "the log-determinants were not compared with the Jacobian, which inputs of more than "
                f"{MAX_JACOBIAN} entries a sample make too large, got {inputs[0].numel()}",
                stacklevel=4,
            )
        elif probe.given.forward(probe.inputs)[0].numel() == inputs.numel():
            assertions += [assert_log_abs_det_matches_jacobian]
    if not probe.no_inverse:
        assertions += [assert_log_dets_cancel]
    assertions += [assert_gradients_match_finite_differences]
    for assertion in assertions:
        assertion(probe, inputs)


def _probe(transform: Any, inputs: Tensor, context: Any, **tolerance: float | None) -> Probe:
    """The probe itself where `check_transform` passes one, so that all assertions share it.

    Raises:
        TypeError: If a tolerance has another name than `atol` and `rtol`; see `Probe`.
    """
    if unknown := sorted(tolerance.keys() - {"atol", "rtol"}):
        raise TypeError(f"tolerances are atol and rtol, got {', '.join(unknown)}")
    return transform if isinstance(transform, Probe) else Probe(transform, inputs, context, **tolerance)


def _check_rebuild(rebuild: Any, transform: Any) -> None:
    if rebuild is not None and (not callable(rebuild) or isinstance(rebuild, type(transform))):
        raise TypeError(
            "rebuild must be a function that builds the transform, such as lambda: MyTransform(), "
            f"got {type(rebuild).__name__}"
        )


def _at_least_two(inputs: Tensor, context: Any) -> tuple[Tensor, Any]:
    """Inputs and context with a batch of one doubled."""
    if not _is_batch(inputs, 1):
        return inputs, context
    return torch.cat([inputs, inputs]), torch.cat([context, context]) if _is_batch(context, 1) else context


def _is_batch(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _batch_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _with_gaps(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


# Ways to call a transform that must not matter: whether gradients are on, and the argument's memory layout.
Variant = tuple[bool, Callable[[Tensor], Tensor]]
VARIANTS: dict[str, Variant] = {
    "a second call": (True, as_it_is),
    "gradients off": (False, as_it_is),
    "memory in channels_last order": (True, _channels_last),
    "memory in batch-last order": (True, _batch_last),
    "gaps in memory": (True, _with_gaps),
}
