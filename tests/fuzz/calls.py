"""Valid calls, which must give the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from random import Random
from typing import Any

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.oracle import STENCILS, Problem, Wrong
from fuzz.tensors import Subclass, bits, draw_problem, lay_out
from nflows_kconv import InvertibleConv2d, functional, use_backend

CALLS = 24  # per problem


class Verified:
    """Checked results; a bitwise equal result needs no further check."""

    def __init__(self) -> None:
        self._results: dict[Any, list[Tensor]] = {}

    def check(self, key: Any, got: Tensor, check: Callable[..., None], *args: Any) -> None:
        """Calls `check(got, *args)` unless an equal result with this key has passed."""
        pattern = bits(got)
        seen = self._results.setdefault(key, [])
        if not any(torch.equal(pattern, other) for other in seen):
            check(got.as_subclass(Tensor), *args)
            seen.append(pattern)


def functions(random: Random) -> int:
    """Calls `conv2d` and `conv2d_inverse` on all kinds of tensors."""
    problem, verified = draw_problem(random), Verified()
    inputs = [problem.input, *(lay_out(random, problem.input) for _ in range(3))]
    weights = [problem.weight, *(lay_out(random, problem.weight) for _ in range(3))]
    biases = [problem.bias, lay_out(random, problem.bias)]
    before = [bits(tensor).clone() for tensor in (*inputs, *weights, *biases)]
    corners: Any = random.choice((problem.corners, list(problem.corners), problem.corners[0]))
    if isinstance(corners, str) and len(problem.corners) > 1:
        corners = problem.corners
    for _ in range(CALLS):
        input, weight, bias = random.choice(inputs), random.choice(weights), random.choice((None, *biases))
        mode = random.choice((torch.no_grad, torch.inference_mode, torch.enable_grad))
        if any(tensor is not None and tensor.is_inference() for tensor in (input, weight, bias)):
            mode = torch.inference_mode  # otherwise torch refuses to save them for a derivative
        solve = random.random() < 0.5
        function = partial(functional.conv2d_inverse if solve else functional.conv2d, bias=bias, corners=corners)
        wrap = random.choice(WRAPPERS) if mode is torch.no_grad and len(input) else WRAPPERS[0]
        with mode():
            if solve and not problem.invertible:
                expect_singular(problem, wrap(function), input, weight)
                continue
            got = wrap(function)(input, weight).detach()
            check = problem.check_solution if solve else problem.check_product
            expected = None if bias is None else problem.bias
            verified.check((solve, bias is None), got, check, problem.input, False, expected)
        if wrap is not WRAPPERS[0]:
            continue
        plain = input.detach().as_subclass(Tensor)
        if got.dtype != problem.weight.dtype or got.stride() != torch.empty_like(plain).stride():
            raise Wrong(
                f"got {got.dtype} of strides {got.stride()} for an input of strides {input.stride()}: {problem}"
            )
    for tensor, copy in zip((*inputs, *weights, *biases), before, strict=True):
        if not torch.equal(bits(tensor), copy):
            raise Wrong(f"an argument was changed: {problem}")
    return CALLS


WRAPPERS: tuple[Callable[[Callable[..., Tensor]], Callable[..., Tensor]], ...] = (
    lambda function: function,
    lambda function: lambda input, weight: torch.func.vmap(lambda image: function(image[None], weight)[0])(input),
    lambda function: lambda input, weight: torch.func.functionalize(function)(input, weight),
    lambda function: lambda input, weight: torch.func.vjp(lambda image: function(image, weight), input)[0],
)


def operators(random: Random) -> int:
    """Calls torch.ops directly: every operator, transposed or not, on any backend."""
    problem, verified, grad_seed = draw_problem(random), Verified(), random.getrandbits(32)
    inputs, weights, biases = (
        [tensor, lay_out(random, tensor)] for tensor in (problem.input, problem.weight, problem.bias)
    )
    grad = torch.randn(problem.input.shape, generator=torch.Generator().manual_seed(grad_seed)).to(problem.weight.dtype)
    namespace, kernel_size = torch.ops.nflows_kconv, list(problem.weight.shape[2:])
    with torch.no_grad():
        for _ in range(CALLS):
            input, weight, bias = random.choice(inputs), random.choice(weights), random.choice((None, *biases))
            expected = None if bias is None else problem.bias
            transpose, name = random.random() < 0.5, random.choice(("conv", "solve", "weight_gradient"))
            operator, key = getattr(namespace, name), (name, transpose, bias is None)
            options = None, problem.numbers, [1, 1], False, transpose
            with random.choice((nullcontext(), use_backend("reference"))):
                if name == "weight_gradient":
                    got = operator(input, grad, problem.numbers, [1, 1], kernel_size, False)
                    verified.check(name, got, problem.check_weight_gradient, problem.input, grad)
                elif name == "conv":
                    got = operator(input, weight, bias, *options)
                    verified.check(key, got, problem.check_product, problem.input, transpose, expected)
                elif problem.invertible:
                    got = operator(input, weight, bias, *options)
                    verified.check(key, got, problem.check_solution, problem.input, transpose, expected)
                else:
                    expect_singular(problem, operator, input, weight, bias, *options)
    return CALLS


def expect_singular(problem: Problem, function: Callable[..., Tensor], *args: Any) -> None:
    """Checks that a nonexistent inverse is refused, unless the input is empty."""
    try:
        function(*args)
    except ValueError as error:
        if "the pivot's diagonal and its reciprocal must be" not in str(error):
            raise
    else:
        if problem.input.numel():
            raise Wrong(f"a singular diagonal was accepted: {problem}")


def layers(random: Random) -> int:
    """Calls layers of any configuration on images of any kind."""
    per_group, corners = random.choice((1, 2, 3, 6)), tuple(random.choices(STENCILS, k=random.choice((1, 2, 4))))
    dtype = random.choice((torch.float32, torch.float64))
    layer = InvertibleConv2d(
        per_group * len(corners),
        (random.choice((1, 2, 3, 5)), random.choice((1, 2, 3))),
        corners=corners,
        diagonal=random.choice(("unit", "learned")),
        bias=random.random() < 0.5,
    ).to(dtype)
    generator = torch.Generator().manual_seed(random.getrandbits(48))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        layer.raw_weight.div_(layer.raw_weight[0].numel() ** 0.5)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    log_diagonal = oracles.diagonal(weight, corners).double().abs().log().sum()
    calls = CALLS // 4
    for _ in range(calls):
        batch, height, width = (random.choice((0, 1, 2, 3, 7)) for _ in range(3))
        image = torch.randn(batch, layer.num_channels, height, width, generator=generator, dtype=dtype)
        problem = Problem(corners, image, weight)
        with torch.no_grad():
            output, log_det = layer(lay_out(random, image))
            restored, inverse_log_det = layer.inverse(lay_out(random, image))
        problem.check_product(output.as_subclass(Tensor), image, bias=bias)
        problem.check_solution(restored.as_subclass(Tensor), image, bias=bias)
        expected = (height * width * log_diagonal).expand(batch)
        torch.testing.assert_close(log_det.double(), expected, rtol=1e-5, atol=1e-4)
        if not torch.equal(log_det, -inverse_log_det):
            raise Wrong(f"the log-determinants of {layer} do not cancel")
        exact = functional.log_abs_det(weight, corners=corners, size=(height, width))
        torch.testing.assert_close(exact.double(), height * width * log_diagonal, rtol=1e-5, atol=1e-4)
    for parameter, copy in zip(layer.parameters(), before, strict=True):
        if not torch.equal(parameter, copy):
            raise Wrong(f"a call changed the parameters of {layer}")
    return 3 * calls


def gradients(random: Random) -> int:
    """Differentiates in tensors of all kinds, some modified before the backward pass."""
    problem = draw_problem(random, torch.float64)
    while problem.weight.shape[1] * problem.input.shape[2] * problem.input.shape[3] > 60:  # unknowns of the oracle
        problem = draw_problem(random, torch.float64)
    calls = CALLS // 6  # a dense oracle is slow
    for _ in range(calls):
        inverse = random.random() < 0.5
        leaves = [tensor.clone().requires_grad_() for tensor in (problem.input, problem.weight, problem.bias)]
        views = [random.choice(VIEWS)(leaf.view(*leaf.shape, *[1] * (4 - leaf.dim()))) for leaf in leaves]
        views[2] = views[2][:, 0, 0, 0]
        function = functional.conv2d_inverse if inverse else functional.conv2d
        output = function(*views, corners=problem.corners)
        generator = torch.Generator().manual_seed(random.getrandbits(32))
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        changed = random.choice((None, *views, output))
        if changed is not None:
            changed.detach().add_(1)
        try:
            got = torch.autograd.grad(output, leaves, grad)
        except RuntimeError as error:
            if changed is None or "modified by an inplace operation" not in str(error):
                raise
            continue
        exact = [tensor.clone().requires_grad_() for tensor in (problem.input, problem.weight, problem.bias)]
        input, weight, bias = exact[0], exact[1], exact[2].view(-1, 1, 1)
        if inverse:
            result = oracles.solve(input - bias, weight, problem.corners)
        else:
            result = oracles.conv(input, weight, problem.corners) + bias
        product = (result * grad).sum()
        expected = torch.autograd.grad(product + sum(0 * tensor.sum() for tensor in exact), exact)
        for ours, theirs in zip(got, expected, strict=True):
            # An ill-conditioned inverse amplifies rounding: eight digits of its gradient are enough.
            scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * scale)
    return calls


VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t * 1,
    lambda t: (t * 1)[...],
    lambda t: t.mT.contiguous().mT,
    lambda t: F.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    lambda t: (t * 1).expand(2, *t.shape)[1],
    lambda t: torch._neg_view(-t),
    lambda t: (t * 1).as_subclass(Subclass),
)
