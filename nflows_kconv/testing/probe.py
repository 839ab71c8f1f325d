"""Compares results of a transform with expected ones, to a tolerance from precision and conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from nflows_kconv.float64 import to_float64
from nflows_kconv.testing.subject import NoInverse, Subject, describe, show

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours

Values = dict[str, Tensor]
Compute = Callable[[Subject, Tensor], Values]
Call = Callable[[Subject, str, Tensor], Any]

SAFETY = 100  # rounding may have this many times the effect of a perturbation by one rounding
FLOOR = 1e-5  # relative error of constants that a transform makes in float32 whatever its dtype
DRAWS = 4  # perturbations that measure a sensitivity
SECOND = "log-determinants of a second call of forward"


class Probe:
    """A transform and inputs in their own precision and, if the transform can be converted, in float64.

    Formulas are judged in float64, where a wrong one stands out from rounding however ill-conditioned the transform is.
    Results in the given precision may differ by what rounding explains:

        tolerance = max(100 eps (sensitivity + scale), 1e-5 scale)

    with the largest eps of the dtypes involved. The scale is the largest expected entry; for a log-determinant, a sum
    over entries, it is at least a tenth of the number of entries per sample. The sensitivity is measured: it is how
    much results change, relative to the perturbation, when the arguments of every call and all parameters change at
    random by a small relative amount (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.6). For a
    round trip it is the amplification of the inverse.

    The transform sees the inputs once before anything else, in `look`, so data-dependent initialisation has happened.
    As a context manager, a probe looks, enables gradients, and completes the messages of AssertionErrors inside.

    Args:
        transform: See `Subject`.
        inputs: [B, ...], at least one entry. Integers are discrete, and so are whole numbers if the transform takes no
            others; nothing is differentiated in discrete inputs.
        context: See `Subject`.
        tolerance: `atol` and `rtol`, which replace the derived tolerance; if only one is given, the other is 0.

    Attributes:
        transform: The given transform.
        given: Its copy, in its own precision.
        dtype: The dtype of the given inputs.
        inputs: The inputs of `given`.
        exact: The transform in float64, on the CPU if the device has no float64; or `given` if it cannot be converted.
        exact_inputs: The inputs of `exact`.
        no_inverse: The error that the transform raised instead of an inverse, or None.
        discrete: Whether the inputs are discrete.
        takes_fractions: Whether the transform takes fractions.

    Raises:
        TypeError: If the inputs are not a tensor, or a tolerance has another name; see also `Subject`.
        ValueError: If the inputs have no entries, or entries that are not finite.
    """

    def __init__(self, transform: Any, inputs: Tensor, context: Any, tolerance: dict[str, float | None]) -> None:
        if unknown := sorted(tolerance.keys() - {"atol", "rtol"}):
            raise TypeError(f"tolerance must be atol or rtol, got {', '.join(unknown)}")
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a tensor [B, ...], got {type(inputs).__name__}")
        if inputs.dim() == 0 or not inputs.numel() or not inputs.isfinite().all():
            raise ValueError(f"inputs must be finite and not empty, [B, ...], got {describe(inputs)}")
        self.tolerance = tolerance
        self.transform, self.given, self.inputs = transform, Subject(transform, context), inputs.detach()
        self.no_inverse: AssertionError | None = None
        self.discrete, self.takes_fractions = False, True
        self.dtype = inputs.dtype
        if not self.dtype.is_floating_point:
            parameters = iter(()) if self.given.module is None else self.given.module.parameters()
            dtypes = (p.dtype for p in parameters if p.is_floating_point())
            self.inputs = inputs.to(next(dtypes, torch.get_default_dtype()))

    def look(self) -> None:
        """Calls the transform and determines which checks apply.

        Raises:
            AssertionError: If the transform raises an error in forward.
        """
        self.no_inverse = _first_calls(self.given, self.inputs)
        self.exact, self.exact_inputs = self.given, self.inputs
        if self.inputs.dtype != torch.float64:
            try:
                exact, exact_inputs = self.given.in_float64(), to_float64(self.inputs)
                failed = _first_calls(exact, exact_inputs)
                if failed is None or self.no_inverse:
                    self.exact, self.exact_inputs = exact, exact_inputs
            except AssertionError:
                pass  # its constants have a fixed dtype
        if torch.equal(self.inputs, self.inputs.round()):
            try:
                self._perturbed(0).forward(self.exact_inputs)
            except AssertionError:
                self.takes_fractions = False
        self.discrete = not self.dtype.is_floating_point or not self.takes_fractions

    def __enter__(self) -> Probe:
        """Looks at the transform."""
        self._mode = torch.inference_mode(False)  # also undoes no_grad
        self._mode.__enter__()
        try:
            self.look()
            if self.no_inverse and not isinstance(self.no_inverse, NoInverse):
                raise self.no_inverse
        except AssertionError as error:
            self.__exit__(type(error), error, error.__traceback__)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Adds to a failure what was tested."""
        self._mode.__exit__(kind, error, traceback)
        if isinstance(error, AssertionError):
            self.fail([error])

    def fail(self, failures: Sequence[AssertionError]) -> NoReturn:
        """Raises all failures as one error, with what was tested and how to reproduce it."""
        told = "\n  also: ".join(str(failure) for failure in failures)
        raise AssertionError(
            f"{told}\n  tested: {self.given.describe()}\n  inputs: {show(self.inputs)}"
            "\n  replay: the call fails again with these inputs, because its random seed is fixed"
        ) from failures[0].__cause__

    def need_inverse(self) -> None:
        """Asserts that there is an inverse."""
        if self.no_inverse:
            raise AssertionError(f"an inverse is needed, but {self.no_inverse}")

    def directions(self, t: Subject, x: Tensor) -> list[tuple[str, Tensor]]:
        """Returns the arguments of forward and, if there is one, of inverse: x and forward's outputs."""
        return [("forward", x)] if self.no_inverse else [("forward", x), ("inverse", t.forward(x)[0])]

    def results(self, t: Subject, x: Tensor, call: Call = Subject.call, y: Tensor | None = None) -> Values:
        """Returns outputs and log-determinants of both directions, with the inverse at y or else forward's outputs."""
        results = {"forward": call(t, "forward", x)}
        if not self.no_inverse:
            results["inverse"] = call(t, "inverse", results["forward"][0] if y is None else y)
        named: Values = {}
        for direction, (outputs, log_abs_det) in results.items():
            named |= {f"{direction}'s outputs": outputs, f"{direction}'s log-determinants": log_abs_det}
        return named

    def compare(
        self, claim: str, compute: Compute, expected: Compute, sensitivities: dict[str, float] | None = None
    ) -> None:
        """Asserts that two computations agree, in float64 and in the given precision.

        Args:
            claim: The claim that a failure reports.
            compute: A function from a transform and inputs to values by name.
            expected: A function to the expected values.
            sensitivities: Sensitivities of the values, those of `results` if None.
        """
        sensitivities = sensitivities or self.sensitivity_of_results
        for t, x in {self.exact: self.exact_inputs, self.given: self.inputs}.items():
            wanted = expected(t, x)
            for name, actual in compute(t, x).items():
                self.require(claim, name, actual, wanted[name], sensitivities[name], x.dtype)

    def require(
        self, claim: str, name: str, actual: Tensor, wanted: Tensor, sensitivity: float, dtype: torch.dtype
    ) -> None:
        """Asserts that two tensors agree to the given tolerance, or else to the derived one.

        Args:
            claim: The claim that a failure reports.
            name: The name of the tensors; for log-determinants it ends in "log-determinants".
            actual: The actual values.
            wanted: The expected values.
            sensitivity: See the class.
            dtype: The dtype of their computation, if it is not theirs.
        """
        eps = max(torch.finfo(each).eps for each in (actual.dtype, wanted.dtype, dtype))
        actual, wanted = to_float64(actual.detach()), to_float64(wanted.detach())
        atol, rtol = self.tolerance.get("atol"), self.tolerance.get("rtol")
        if atol is None and rtol is None:
            scale = wanted.abs().nan_to_num(0, 0, 0).max().item()
            if name.endswith("log-determinants"):
                scale = max(scale, self.inputs[0].numel() / 10)
            tolerance = torch.full_like(wanted, max(SAFETY * eps * (sensitivity + scale), FLOOR * scale))
            reason = f"from eps {eps:.3g}, sensitivity {sensitivity:.3g}, scale {scale:.3g}"
        else:
            atol, rtol = atol or 0.0, rtol or 0.0
            tolerance, reason = atol + rtol * wanted.abs(), f"from atol {atol:.3g}, rtol {rtol:.3g}"
        error = (actual - wanted).abs()
        if not (error <= tolerance).all():
            worst = (error - tolerance).nan_to_num(torch.inf, torch.inf).argmax()
            index = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
            raise AssertionError(
                f"{claim}: {name}, worst at {list(index)}: got {actual[index]:.10g}, expected {wanted[index]:.10g}; "
                f"error {error[index]:.3g}, tolerance {tolerance[index]:.3g} {reason}"
            )

    def sensitivity(self, function: Callable[[Values], Tensor]) -> float:
        """Returns how much a linear function of `results`, and of `SECOND`, changes, relative to a perturbation."""
        return max(function(change).abs().nan_to_num(0, 0, 0).max().item() for change in self._changes) / self._size

    @cached_property
    def sensitivity_of_results(self) -> dict[str, float]:
        """Returns the sensitivity of each of the `results`."""
        return {name: self.sensitivity(itemgetter(name)) for name in self._changes[0]}

    @cached_property
    def _changes(self) -> list[Values]:
        """Returns no change of `results`, and their changes with perturbations of all arguments and parameters."""

        def results(t: Subject) -> Values:
            return self.results(t, self.exact_inputs) | {SECOND: t.forward(self.exact_inputs)[1]}

        with torch.no_grad():
            base = results(self.exact)
            changes = [_difference(base, base)]
            for seed in range(DRAWS):
                with suppress(AssertionError):  # the perturbation left the domain
                    changes.append(_difference(results(self._perturbed(seed)), base))
        return changes

    @property
    def _size(self) -> float:
        return torch.finfo(self.exact_inputs.dtype).eps ** 0.5

    def _perturbed(self, seed: int) -> Subject:
        """Returns a copy of the exact transform that changes its parameters and its argument a little at every call."""
        t, generator = self.exact.copy(), torch.Generator().manual_seed(seed)

        def change(tensor: Tensor) -> Tensor:
            # Towards zero, so the tensor stays inside most domains.
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            return tensor * (1 - self._size * noise)

        def prepare(argument: Tensor) -> Tensor:
            t.step(change)
            whole = self.discrete and torch.equal(argument, argument.round())
            return argument if whole else change(argument)

        t.prepare = prepare
        return t


def _first_calls(t: Subject, x: Tensor) -> AssertionError | None:
    """Returns the error that inverse raises, or None."""
    with torch.no_grad():
        outputs, _ = t.forward(x)
        try:
            t.inverse(outputs)
        except AssertionError as error:
            return error
    return None


def _difference(values: Values, others: Values) -> Values:
    for name, value in values.items():
        if value.shape != others[name].shape:
            raise AssertionError(f"{name} must have shape {list(others[name].shape)}, got {list(value.shape)}")
    return {name: value - others[name] for name, value in values.items()}
