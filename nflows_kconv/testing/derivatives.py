"""Computes Jacobians by autograd, and compares autograd's gradients with finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from nflows_kconv.float64 import to_float64
from nflows_kconv.testing.probe import Probe, Values
from nflows_kconv.testing.subject import Subject, show

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours

DIRECTIONS = 3  # each can reveal a wrong gradient
NEWTON_STEPS = 10  # to another point with the same outputs
MAX_NEWTON = 256  # entries of a sample, above which solving for them takes too long
BATCHED_ROWS = 128  # rows of a Jacobian computed together
MAX_ELEMENTS = 1024  # elements of a tensor, above which a failure does not name the worst


def jacobian(t: Subject, x: Tensor) -> Tensor:
    """Returns dy/dx of every sample, [B, entries of y, entries of x], in float64."""
    x = x.clone().requires_grad_()
    columns = t.forward(x)[0].reshape(len(x), -1).sum(0)
    if not columns.requires_grad:
        return to_float64(x.new_zeros(len(x), len(columns), x[0].numel()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some operators warn that batched gradients are slow
            units = torch.eye(len(columns), dtype=columns.dtype, device=x.device).split(BATCHED_ROWS)
            batched = {"is_grads_batched": True, "retain_graph": True, "materialize_grads": True}
            rows = torch.cat([torch.autograd.grad(columns, x, unit, **batched)[0] for unit in units])
    except RuntimeError:  # some operators do not support batched gradients
        rows = torch.stack([_gradients(column, [x])[0] for column in columns])
    return to_float64(rows.transpose(0, 1).reshape(len(x), len(columns), -1))


def check_orientation(probe: Probe) -> None:
    """Asserts that det dy/dx keeps its sign, as for every injective function with a continuous derivative.

    Checks the inputs and points between them, their neighbours and zero, separately for each context.
    """
    t, x, generator = probe.exact, probe.exact_inputs, torch.Generator().manual_seed(0)
    points, signs = [x], [_orientation(t, x)]
    for target in 2 * [x.roll(1, 0), torch.zeros_like(x)]:
        point = x.lerp(target, torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x))
        try:
            signs.append(_orientation(t, point))
            points.append(point)
        except AssertionError:
            pass  # the point is outside the domain
    by_context = torch.stack(signs) if t.context is not None else torch.stack(signs).view(-1, 1)
    if ((by_context.amax(0) > 0) & (by_context.amin(0) < 0)).any():
        up, down = (show(torch.cat(points)[torch.cat(signs) == sign][0]) for sign in (1, -1))
        raise AssertionError(f"forward is not injective, unless it jumps: det dy/dx > 0 at {up}, but < 0 at {down}")


def check_collisions(probe: Probe) -> None:
    """Asserts that a search finds no other point with the outputs of an input.

    Newton's method starts from the neighbours of the inputs and from their negatives, if samples are small.
    """
    t, x = probe.exact, probe.exact_inputs
    outputs = t.forward(x)[0].reshape(len(x), -1)
    if x[0].numel() > MAX_NEWTON:
        return
    for point in (x.roll(1, 0), -x):
        try:
            smallest = torch.linalg.svdvals(jacobian(t, x))[:, -1]
            for _ in range(NEWTON_STEPS):
                errors = to_float64((t.forward(point)[0].reshape(len(x), -1) - outputs).detach())
                steps = torch.linalg.lstsq(jacobian(t, point), errors.unsqueeze(-1)).solution
                point = point - steps.view_as(x).to(x)
            errors = to_float64((t.forward(point)[0].reshape(len(x), -1) - outputs).detach()).norm(dim=1)
        except (AssertionError, torch.linalg.LinAlgError):
            continue  # the search has left the domain
        distances, scale = to_float64(point - x).flatten(1).norm(dim=1), 1 + to_float64(x).flatten(1).norm(dim=1)
        # If forward is almost flat, different points have almost equal outputs.
        found = (distances > 1e-3 * scale) & (errors < 1e-6 * smallest * distances.clamp(max=scale))
        if found.any():
            one, other = (show(points[found][0]) for points in (x, point))
            raise AssertionError(f"forward is not injective: it takes {one} and {other} to the same outputs")


def _orientation(t: Subject, x: Tensor) -> Tensor:
    """Returns the sign of each sample's det dy/dx, [B]; 0 if rounding might decide it."""
    matrices = jacobian(t, x)
    sure = torch.linalg.cond(matrices, "fro") < 1e-3 / torch.finfo(x.dtype).eps
    return torch.linalg.slogdet(matrices).sign * sure


def check_gradients(probe: Probe, direction: str, argument: Tensor) -> None:
    """Asserts that gradients of a random weighting of results, in argument and parameters, match finite differences.

    Args:
        probe: The probe, whose exact transform is differentiated.
        direction: "forward" or "inverse".
        argument: Where to differentiate.
    """
    t, generator = probe.exact.copy(), torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    weights = [random_like(value) for value in t.call(direction, argument)]

    def loss(t: Subject, argument: Tensor) -> Tensor:
        return _inner(weights, t.call(direction, argument))

    variables = {} if probe.discrete and direction == "forward" else {"argument": argument.clone().requires_grad_()}
    if t.module is not None:
        variables |= {name: value for name, value in t.module.named_parameters() if value.requires_grad}
    if not variables:
        return
    values = {name: variable.detach().clone() for name, variable in variables.items()}
    value = loss(t, variables.get("argument", argument))
    if value.requires_grad:
        gradients = dict(zip(variables, _gradients(value, list(variables.values())), strict=True))
    else:
        gradients = {name: torch.zeros_like(value) for name, value in values.items()}

    # The error of central differences is a third derivative times h^2, plus the rounding of the loss over h.
    eps = torch.finfo(argument.dtype).eps
    h = eps ** (1 / 3)
    names = [f"{direction}'s outputs", f"{direction}'s log-determinants"]
    sensitivity = probe.sensitivity(lambda change: _inner(weights, map(change.__getitem__, names)))
    rounding = (sensitivity + abs(value.item())) / h

    def loss_at(offset: float, along: Values) -> Tensor:
        moved = values | {name: values[name] + offset * step for name, step in along.items()}
        for name, variable in variables.items():
            variable.copy_(moved[name])
        t.step()
        return loss(t, variables.get("argument", argument))

    def difference(along: Values) -> tuple[Tensor, float]:
        coarse, fine = ((loss_at(s, along) - loss_at(-s, along)) / (2 * s) for s in (h, h / 2))
        return fine, rounding + abs(coarse - fine).item() / eps

    claim = f"autograd's gradient through {direction} is not that of finite differences"
    with torch.no_grad():
        for _ in range(DIRECTIONS):
            along = {name: random_like(tensor) for name, tensor in values.items()}
            got = _inner(along.values(), (gradients[name] for name in along))
            try:
                return probe.require(claim, "along a random direction", got, *difference(along), argument.dtype)
            except AssertionError as error:
                failure = error
        # The worst element of the variable with the largest gradient error.
        mismatch = {}
        for name, gradient in gradients.items():
            along = {name: random_like(gradient)}
            mismatch[name] = (_inner([gradient], along.values()) - difference(along)[0]).abs().item()
        worst = max(mismatch, key=mismatch.__getitem__)
        units = torch.eye(values[worst].numel(), dtype=argument.dtype, device=argument.device)[:MAX_ELEMENTS]
        derivatives = [difference({worst: unit.view_as(values[worst])}) for unit in units]
        expected = torch.stack([derivative for derivative, _ in derivatives])
        sensitivity = max(sensitivity for _, sensitivity in derivatives)
        got = gradients[worst].flatten()[: len(units)]
        probe.require(claim, f"in {worst}, flattened", got, expected, sensitivity, argument.dtype)
        raise failure


def _gradients(value: Tensor, variables: list[Tensor]) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(value, variables, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        raise AssertionError(f"autograd raised {error!r}") from error


def _inner(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    return torch.stack([to_float64((a * b).sum()) for a, b in zip(left, right, strict=True)]).sum()
