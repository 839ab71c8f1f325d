"""Assertions that hold for every transform, for a test suite.

Each takes any transform that `nflows_kconv.bijection.as_bijection` accepts, and leaves parameters, buffers, modes,
gradients and torch's random state unchanged. Tolerances follow from dtype and conditioning unless `atol` or `rtol` is
given. Failures are AssertionErrors that state the worst element, its error and tolerance, and how to reproduce it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from nflows_kconv.testing import state
from nflows_kconv.testing.derivatives import check_collisions, check_gradients, check_orientation, jacobian
from nflows_kconv.testing.hooks import check_hooks
from nflows_kconv.testing.probe import SAFETY, SECOND, Probe, Values
from nflows_kconv.testing.subject import NoInverse, Subject, as_it_is
from nflows_kconv.torch_internals import tree_map_only

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours

MAX_JACOBIAN = 4096  # entries of a sample; the Jacobian has their square


def assert_invertible(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that inverse(forward(x)) = x.

    Args:
        transform: What to test.
        inputs: x, [B, ...].
        context: Second argument of the transform's calls; omitted if None.
        tolerance: `atol` and `rtol`. Either is 0 if only the other is given.

    Raises:
        AssertionError: If it does not hold, the transform raises an error, or it has no inverse.
        TypeError: If the transform has no supported interface or cannot be deep-copied.
        ValueError: If the inputs are empty or not finite.
    """
    with _probe(transform, inputs, context, tolerance) as probe:
        probe.need_inverse()
        probe.compare(
            "inverse(forward(x)) is not x",
            lambda t, x: {"inverse's outputs": t.inverse(t.forward(x)[0])[0]},
            lambda t, x: {"inverse's outputs": x},
        )


def assert_log_dets_cancel(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that the log-determinants of forward at x and of inverse at forward(x) sum to 0.

    Arguments and errors are those of `assert_invertible`.
    """
    with _probe(transform, inputs, context, tolerance) as probe:
        probe.need_inverse()
        name = "inverse's log-determinants"
        sensitivity = probe.sensitivity(lambda change: change[name] + change[SECOND])
        probe.compare(
            "the log-determinants of forward and inverse do not cancel",
            lambda t, x: {name: t.inverse(t.forward(x)[0])[1]},
            lambda t, x: {name: -t.forward(x)[1]},
            {name: sensitivity},
        )


def assert_log_abs_det_matches_jacobian(
    transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None
) -> None:
    """Asserts that forward's log-determinants equal log |det dy/dx| by autograd, and the inverse's its negative.

    The Jacobian, [B, D, D] for D entries per sample, takes D backward passes, in float64. The inverse is compared with
    the same Jacobian, so it need not be differentiable. A transform without inverse must be injective: det dy/dx must
    keep its sign at and between the inputs, and no other point may be found with their outputs.

    Arguments and errors are those of `assert_invertible`; no inverse is needed, and

    Raises:
        ValueError: If the inputs are discrete (integers, or whole numbers if the transform takes no others), or samples
            have more than 4096 entries.
    """
    with _probe(transform, inputs, context, tolerance) as probe:
        if probe.discrete:
            raise ValueError("inputs must be real numbers for a Jacobian to exist, got only whole numbers")

        def log_dets(t: Subject, x: Tensor) -> Values:
            results = probe.results(t, x)
            return {name: -value if "inverse" in name else value for name, value in results.items() if "log" in name}

        sensitivities = probe.sensitivity_of_results
        exact, given = log_dets(probe.exact, probe.exact_inputs), log_dets(probe.given, probe.inputs)
        for name in exact:
            claim = "results differ from those in float64"
            probe.require(claim, name, given[name], exact[name], sensitivities[name], probe.inputs.dtype)
        if inputs[0].numel() > MAX_JACOBIAN:
            raise ValueError(
                f"samples must have at most {MAX_JACOBIAN} entries for a Jacobian, got {inputs[0].numel()}"
            )
        if isinstance(probe.no_inverse, NoInverse):
            check_orientation(probe)
            check_collisions(probe)
        matrices = jacobian(probe.exact, probe.exact_inputs)
        if matrices.shape[1] != matrices.shape[2]:
            raise AssertionError(
                f"the Jacobian must be square, got {matrices.shape[1]} outputs of {matrices.shape[2]} inputs"
            )
        expected = torch.linalg.slogdet(matrices).logabsdet
        # The error of log |det| is eps times the condition number, and unbounded beyond 1 / eps.
        eps = torch.finfo(probe.exact_inputs.dtype).eps
        condition = torch.linalg.cond(matrices, "fro").nan_to_num(torch.inf).clamp(max=1 / eps).max().item() / SAFETY
        for name in exact:
            claim = "results differ from log |det| of the Jacobian"
            probe.require(claim, name, exact[name], expected, sensitivities[name] + condition, probe.exact_inputs.dtype)


def assert_gradients_match_finite_differences(
    transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None
) -> None:
    """Asserts that autograd's gradients in inputs and parameters, through forward and inverse, are right.

    Differentiates a random weighting of outputs and log-determinants along random directions, in float64, by central
    differences with steps h and h/2, and takes their disagreement as the error. Fails only if three directions fail, so
    a kink of a piecewise linear network between the points is not a failure.

    Arguments and errors are those of `assert_invertible`; no inverse is needed.
    """
    with _probe(transform, inputs, context, tolerance) as probe:
        for direction, argument in probe.directions(probe.exact, probe.exact_inputs):
            check_gradients(probe, direction, argument.detach())


def assert_batch_independent(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that every sample is transformed as it would be alone, in another batch or in another order.

    Doubles a batch of one; the rows of tensors [B, ...] in the context follow the samples. Skips forward for discrete
    inputs, whose noise depends on the batch.

    Arguments and errors are those of `assert_invertible`; no inverse is needed.
    """
    inputs, context = _at_least_two(inputs, context)
    with _probe(transform, inputs, context, tolerance) as probe:
        rows, whole = torch.arange(len(probe.inputs)), cache(probe.results)
        for part, selected in {
            "the first": rows[:1],
            "all but the first": rows[1:],
            "all in reverse": rows.flip(0),
        }.items():

            def apart(t: Subject, direction: str, argument: Tensor, selected: Tensor = selected) -> Any:
                if direction == "forward" and probe.discrete:
                    return [value[selected] for value in t.call(direction, argument)]
                context = t.context
                t.context = _by_row(lambda tensor: tensor[selected], context, len(argument))
                result = t.call(direction, argument[selected])
                t.context = context
                return result

            probe.compare(
                f"{part} of the samples differ from those in the whole batch",
                lambda t, x, apart=apart: probe.results(t, x, apart, whole(t, x)["forward's outputs"]),
                lambda t, x, rows=selected: {name: value[rows] for name, value in whole(t, x).items()},
            )


def assert_shape_and_dtype_preserved(transform: Any, inputs: Tensor, context: Any = None) -> None:
    """Asserts that batch size, number of entries, dtype and device are kept, and that the inverse restores the shape.

    Transforms of torch.distributions may change the number of entries as their `forward_shape` says. Log-determinants
    must be floating-point, [B], on the same device. One number for all samples is accepted only from layers of
    libraries that return one.

    Arguments and errors are those of `assert_invertible`; no inverse is needed.
    """
    with _probe(transform, inputs, context, {}) as probe:
        x, t = probe.inputs, probe.given
        y = t.forward(x)[0]
        if isinstance(t.transform, Transform):
            wanted = t.transform.forward_shape(x.shape)
            if y.shape != wanted:
                raise AssertionError(f"forward must return shape {list(wanted)}, got {list(y.shape)}")
        elif len(y) != len(x) or y.numel() != x.numel():
            wanted = f"{len(x)} samples of {x[0].numel()} entries"
            raise AssertionError(f"forward must return {wanted}, got shape {list(y.shape)}")
        for direction, argument in probe.directions(t, x):
            outputs, log_abs_det = t.call(direction, argument)
            if direction == "inverse" and outputs.shape != x.shape:
                raise AssertionError(f"inverse must return shape {list(x.shape)}, got {list(outputs.shape)}")
            if outputs.dtype != x.dtype:
                raise AssertionError(f"{direction} must return {x.dtype}, got {outputs.dtype}")
            if not outputs.device == log_abs_det.device == x.device:
                raise AssertionError(
                    f"{direction} must return tensors on {x.device}, got {outputs.device} and {log_abs_det.device}"
                )


def assert_hooks_run(transform: Any, inputs: Tensor, context: Any = None) -> None:
    """Asserts that both directions call the parts of a module, not their `forward`.

    Calling `part.forward(x)` instead of `part(x)` skips the part's hooks, on which pruning, weight normalisation and
    FSDP rely. Code of libraries that `nflows_kconv.bijection` supports may do so. Other methods, such as a part's
    `inverse`, have no hooks in torch and may be called.

    Arguments and errors are those of `assert_invertible`; no inverse is needed.
    """
    with _probe(transform, inputs, context, {}) as probe:
        if probe.given.module is not None:
            for direction, argument in probe.directions(probe.given, probe.inputs):
                check_hooks(probe.given.copy(), direction, argument)


def assert_deterministic(transform: Any, inputs: Tensor, context: Any = None, **tolerance: float | None) -> None:
    """Asserts that results depend only on the values of the inputs, and that calls have no side effects.

    Results must not depend on earlier calls, random numbers, whether gradients are enabled, or the inputs' memory
    layout (a RuntimeError may refuse a layout). A call must not modify its argument in place or draw from torch's
    global random numbers.

    Arguments and errors are those of `assert_invertible`; no inverse is needed.
    """
    with _probe(transform, inputs, context, tolerance) as probe:
        for effect in sorted(probe.given.side_effects):
            raise AssertionError(effect)
        first = cache(probe.results)
        for what, (grad, layout) in VARIANTS.items():

            def call(t: Subject, direction: str, argument: Tensor, variant: Variant = (grad, layout)) -> Any:
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

            probe.compare(
                f"results differ with {what}",
                lambda t, x, call=call: probe.results(t, x, call, first(t, x)["forward's outputs"]),
                first,
            )


def assert_state_dict_round_trip(
    transform: Any,
    inputs: Tensor,
    context: Any = None,
    *,
    rebuild: Callable[[], Any] | None = None,
    **tolerance: float | None,
) -> None:
    """Asserts that the state_dict, saved and loaded, holds everything that results depend on.

    The state comes from a copy that has seen data and whose parameters then changed in place, as by an optimiser.
    Loaded with `weights_only=True`, it must give the same results in a transform that never ran, in one that ran with
    other parameters, and in one built on the meta device and emptied by `to_empty`: non-persistent buffers must be
    computed at use or by `reset_parameters`. Copying parameters and buffers in place, as DistributedDataParallel does,
    must give the same results too. A transform that is not a module has no state and passes.

    Without `rebuild` these transforms are copies, which share even state that saving loses. So a tensor or a module in
    a plain attribute, such as a list, counts as lost if results depend on it, unless it follows the parameters, as a
    cache does, or is a mask of -1, 0 and 1.

    Arguments and errors are those of `assert_invertible`; no inverse is needed, and

    Args:
        transform: What to test.
        inputs: x, [B, ...].
        context: Second argument of the transform's calls; omitted if None.
        rebuild: Builds the transform as a program that loads its state would, or None.
        tolerance: `atol` and `rtol`.

    Raises:
        TypeError: If `rebuild` is not a function.
    """
    _check_rebuild(rebuild, transform)
    with _probe(transform, inputs, context, tolerance) as probe:
        if probe.given.module is None:
            return
        x, source, used = probe.inputs, probe.given.copy(), probe.given.copy()
        probe.results(source, x)  # fills caches, which the step may make stale
        source.step(state.training_step)
        expected = probe.results(source, x)
        used.step(lambda parameter: state.training_step(state.training_step(parameter)))
        probe.results(used, x)

        sensitivities = probe.sensitivity_of_results
        fresh = Subject(probe.transform if rebuild is None else rebuild(), probe.given.context)
        emptied = state.emptied(fresh, x.device)
        loaded, copied = "it has loaded the state_dict", "parameters and buffers were copied in place, as by DDP"
        for name, target, action, take_over in (
            ("never ran", fresh.copy(), loaded, state.load_saved),
            ("ran with other parameters", used, loaded, state.load_saved),
            ("got its memory from to_empty", emptied, f"{loaded}{state.lost_buffers(fresh)}", state.load_saved),
            ("never ran", fresh, copied, state.copy_in_place),
        ):
            take_over(target, source)
            claim = f"a transform that {name} differs once {action}"
            with contextlib.suppress(AssertionError):  # other data must no longer initialise anything
                target.forward((x / 2).floor() if probe.discrete else x / 2)
            try:
                results = probe.results(target, x)
            except AssertionError as error:
                raise AssertionError(f"{claim}: {error}") from error.__cause__
            for key, value in results.items():
                probe.require(claim, key, value, expected[key], sensitivities[key], x.dtype)
        if rebuild is None:
            state.check_for_lost_tensors(probe, source, x)


def check_transform(
    transform: Any,
    inputs: Tensor,
    context: Any = None,
    *,
    rebuild: Callable[[], Any] | None = None,
    **tolerance: float | None,
) -> None:
    """Runs every assertion that applies, then again in evaluation mode after a change of all parameters.

    The change reveals stale caches and faults that initial values hide, such as in couplings that start as the
    identity. Skips assertions that need an inverse if there is none; determinism and the Jacobian for discrete inputs,
    which a flow dequantises with noise; the Jacobian if a torch Transform's `forward_shape` changes the number of
    entries; and, with a warning, the Jacobian of samples with more than 4096 entries, and of integers if the transform
    also takes fractions. Arguments and errors are those of `assert_state_dict_round_trip`; the error lists all
    failures, the likeliest cause first.
    """
    _check_rebuild(rebuild, transform)
    inputs, context = _at_least_two(inputs, context)
    probe = Probe(transform, inputs, context, tolerance)
    with torch.inference_mode(False):
        failures = _failures(probe, rebuild)
        if probe.given.module is not None and not failures.keys() & FUNDAMENTAL:
            changed = Probe(probe.given.module, inputs, probe.given.context, tolerance)
            changed.given.step(state.training_step)
            changed.given.transform.eval()
            later = _failures(changed, rebuild, {*failures, "assert_state_dict_round_trip"})
            for error in later.values():
                error.args = (f"after a change of all parameters, in evaluation mode: {error}",)
            probe = probe if failures else changed
            failures |= later
    if failures:
        probe.fail(list(failures.values()))


# After these failures nothing else can be judged.
FUNDAMENTAL = {"forward", "assert_shape_and_dtype_preserved"}


def _failures(
    probe: Probe, rebuild: Callable[[], Any] | None, skipped: Container[str] = ()
) -> dict[str, AssertionError]:
    """Returns the failures by name of assertion or direction, the likeliest cause first."""
    try:
        probe.look()
    except AssertionError as error:
        return {"forward": error}
    failures = {}
    if probe.no_inverse and not isinstance(probe.no_inverse, NoInverse):
        failures["inverse"] = probe.no_inverse
    for assertion, applies in {
        assert_shape_and_dtype_preserved: True,
        assert_hooks_run: True,
        assert_deterministic: not probe.discrete,
        assert_state_dict_round_trip: True,
        assert_batch_independent: True,
        assert_invertible: not probe.no_inverse,
        assert_log_abs_det_matches_jacobian: _has_jacobian(probe),
        assert_log_dets_cancel: not probe.no_inverse,
        assert_gradients_match_finite_differences: True,
    }.items():
        if applies and assertion.__name__ not in skipped:
            try:
                assertion(probe, probe.inputs, **({"rebuild": rebuild} if "state" in assertion.__name__ else {}))
            except AssertionError as error:
                failures[assertion.__name__] = error
                if assertion.__name__ in FUNDAMENTAL:
                    break
    return {name: error for name, error in failures.items() if name not in skipped}


def _has_jacobian(probe: Probe) -> bool:
    """Returns whether there is a Jacobian to compare with; warns if other inputs would have one."""
    entries, reason = probe.inputs[0].numel(), None
    if probe.discrete and probe.takes_fractions:
        reason = f"inputs must be floating-point unless the transform dequantises, got {probe.dtype}"
    elif not probe.discrete and entries > MAX_JACOBIAN:
        reason = f"samples must have at most {MAX_JACOBIAN} entries, got {entries}"
    if reason:
        warnings.warn(f"log-determinants were not compared with the Jacobian: {reason}", stacklevel=4)
    return not (probe.discrete or reason) and probe.given.forward(probe.inputs)[0].numel() == probe.inputs.numel()


def _probe(transform: Any, inputs: Tensor, context: Any, tolerance: dict[str, float | None]) -> Any:
    """Returns a probe as a context manager; a probe from `check_transform` leaves failures to it."""
    if isinstance(transform, Probe):
        return contextlib.nullcontext(transform)
    return Probe(transform, inputs, context, tolerance)


def _check_rebuild(rebuild: Any, transform: Any) -> None:
    if rebuild is not None and (not callable(rebuild) or isinstance(rebuild, type(transform))):
        raise TypeError(
            "rebuild must be a function that builds the transform, such as lambda: MyTransform(), "
            f"got {type(rebuild).__name__}"
        )


def _at_least_two(inputs: Tensor, context: Any) -> tuple[Tensor, Any]:
    """Returns inputs and context, doubled if the batch is one."""
    if not _is_batch(inputs, 1):
        return inputs, context
    return torch.cat([inputs, inputs]), _by_row(lambda row: torch.cat([row, row]), context, 1)


def _by_row(change: Callable[[Tensor], Tensor], context: Any, size: int) -> Any:
    """Applies a function to the tensors of the context, alone or in a tuple, that have one row per sample."""
    return tree_map_only(Tensor, lambda tensor: change(tensor) if _is_batch(tensor, size) else tensor, context)


def _is_batch(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _batch_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _with_gaps(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


# Ways to call a transform that must not matter: gradients enabled or not, and the argument's memory layout.
Variant = tuple[bool, Callable[[Tensor], Tensor]]
VARIANTS: dict[str, Variant] = {
    "a second call": (True, as_it_is),
    "gradients off": (False, as_it_is),
    "memory in channels_last order": (True, _channels_last),
    "memory in batch-last order": (True, _batch_last),
    "gaps in memory": (True, _with_gaps),
}
