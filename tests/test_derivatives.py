"""Derivatives of any order in both directions, by every interface of PyTorch."""

import math
from dataclasses import replace

import oracles
import pytest
import torch
from cases import BL, BR, CORNERS, TL, TR, Case, over_cases
from oracles import assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from nflows_kconv import InvertibleConv2d, functional, ops

# Small enough for whole Jacobians and Hessians.
SMALL = (
    Case((TL, BR), per_group=2, kernel_size=(2, 3), size=(2, 3)),
    Case(CORNERS, per_group=1, kernel_size=(2, 2), batch=1, size=(2, 2)),
    Case((BL, BL), per_group=1, kernel_size=(3, 1), batch=3, size=(3, 1)),
    Case((TR,), per_group=2, kernel_size=(1, 1), size=(1, 2)),
    Case((BR,), per_group=2, kernel_size=(2, 2), size=(2, 2), layout="channels_last"),
    Case(("T", "R"), per_group=1, kernel_size=(2, 3), size=(2, 3)),
    Case(("R", "L"), per_group=1, kernel_size=(3,), size=(4,), dilation=2),
    Case(("FTR",), per_group=2, kernel_size=(2, 1, 2), batch=1, size=(2, 1, 3)),
    Case(("B",), per_group=2, kernel_size=(2, 2), batch=1, size=(3, 2), dilation=(2, 1)),
)
every_small_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: "-".join(case.corners))
every_direction = pytest.mark.parametrize("name", ["conv", "inverse"])


def arguments(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns input, weight and bias as leaves in float64."""
    bias = torch.linspace(-1, 1, case.channels, dtype=torch.float64)
    case = replace(case, dtype=torch.float64)
    return tuple(t.detach().requires_grad_() for t in (case.input(device), case.weight(device), bias.to(device)))


def gradients(output: torch.Tensor, grad: torch.Tensor, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((output * grad.to(output)).sum(), arguments)


def of_oracle(name: str, case: Case):
    """Returns the function of input, weight and bias that `getattr(case, name)` must equal."""

    def function(input, weight, bias=None):
        bias = 0 if bias is None else case.of_channels(bias)
        if name == "conv":
            return oracles.conv(input, weight, case.corners, case.dilation) + bias
        return oracles.solve(input - bias, weight, case.corners, case.dilation)

    return function


# Gradients


@every_direction
@over_cases()
def test_gradients_are_those_of_the_oracle(case: Case, name: str, backend: str, device: str):
    """Compares with autograd of F.conv2d and of the dense triangular solve."""
    if not case.unknowns <= 200 or case.batch == 0:
        return  # the oracle's gradient in the weight goes through the dense matrices
    grad_ = case.input(seed=2)
    leaves = [t.detach().requires_grad_() for t in (case.input(device), case.weight(device), case.bias(device))]
    output = getattr(case, name)(*leaves)
    actual = gradients(output, grad_, *leaves)
    exact = [t.detach().to("cpu", torch.float64).requires_grad_() for t in leaves]
    if 0 in case.input_shape:
        expected = [torch.zeros_like(t) for t in exact]
    else:
        expected = list(gradients(of_oracle(name, case)(*exact), grad_, *exact))
        if name == "inverse" and case.dtype in oracles.HALF_PRECISION:  # computed from the rounded solution
            expected[1] = -oracles.weight_gradient(output, expected[0], exact[1], case.corners, case.dilation)
    for one, other, leaf in zip(actual, expected, leaves, strict=True):
        assert one.dtype == leaf.dtype
        assert_close(one, other, factor=4)


@every_direction
@over_cases()
def test_what_is_not_read_has_no_gradient(case: Case, name: str, device: str):
    """Covers masked entries, and the diagonal of a raw weight that has another one."""
    for diagonal in ("own", "unit", "learned")[: 3 if case.unknowns <= 100 else 1]:
        ignored = oracles.masked(case.weight_shape, case.corners)
        if diagonal != "own":
            oracles.set_diagonal(ignored, case.corners, torch.tensor(True))
        ignored = ignored.to(device)
        weight = case.weight(device).masked_fill(ignored, math.nan).requires_grad_()
        log_diagonal = torch.zeros_like(case.bias(device)).requires_grad_() if diagonal == "learned" else None
        input = case.input(device).requires_grad_()
        conv, solve = case.operators(weight, None, log_diagonal, diagonal == "unit")
        output = (conv if name == "conv" else solve)(input)
        leaves = [leaf for leaf in (input, weight, log_diagonal) if leaf is not None]
        found = gradients(output, case.input(seed=2), *leaves)
        assert torch.all(found[1][ignored] == 0)
        assert all(gradient.isfinite().all() for gradient in found)


@every_direction
@every_small_case
def test_gradcheck(case: Case, name: str, device: str):
    function, leaves = getattr(case, name), arguments(case, device)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_direction
@every_small_case
def test_gradgradcheck(case: Case, name: str, device: str):
    function, leaves = getattr(case, name), arguments(case, device)
    checks = dict(check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=True, **checks)


@every_small_case
def test_gradcheck_of_the_operators(case: Case, device: str):
    """Covers the transposed operators and the weight gradient, with every kind of diagonal."""
    input, weight, bias = arguments(case, device)
    log_diagonal = (bias / 2).detach().requires_grad_()
    for diagonal in ("own", "unit", "learned"):
        leaves = (input, weight, bias, log_diagonal)[: 4 if diagonal == "learned" else 3]
        for index in range(2):
            for transpose in case.transposes if diagonal == "own" else case.transposes[-1:]:

                def function(x, w, b, log_diagonal=None, i=index, t=transpose, unit=diagonal == "unit"):
                    return case.operators(w, b, log_diagonal, unit)[i](x, t)

                assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
                assert gradgradcheck(function, leaves, fast_mode=True)
    images = input, replace(case, dtype=torch.float64).input(device, seed=2).requires_grad_()
    for unit in (False, True) if len(case.transposes) > 1 else ():
        function = lambda x, g, unit=unit: ops.weight_gradient(x, g, case.stencils, case.steps, case.kernel_size, unit)  # noqa: E731
        assert gradcheck(function, images, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, images, fast_mode=True)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("diagonal", ["unit", "learned"])
def test_gradcheck_of_the_layer(diagonal: str, inverse: bool, device: str):
    layer = InvertibleConv2d(4, (2, 3), corners=(TL, "R"), diagonal=diagonal, bias=True).to(device, torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    parameters = [torch.linspace(-0.4, 0.5, p.numel(), dtype=p.dtype, device=device).view_as(p) for p in parameters]

    class Inverse(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input):
            return self.layer.inverse(input) if inverse else self.layer(input)

    def function(input, *parameters):
        named = {f"layer.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return functional_call(Inverse(), named, (input,))

    input = torch.randn(2, 4, 2, 3, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (input, *parameters)]
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@every_direction
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_only_what_is_needed_is_computed_and_alike(name: str, needed: tuple[int, ...], device: str):
    leaves = arguments(SMALL[0], device)  # the bias also serves as log-diagonal

    def loss(input, weight, log_diagonal):
        function = SMALL[0].operators(weight, log_diagonal, log_diagonal)[name == "inverse"]
        return function(input).square().sum()

    all_gradients = torch.autograd.grad(loss(*leaves), leaves)
    fewer = [leaf if i in needed else leaf.detach() for i, leaf in enumerate(leaves)]
    for index, gradient in zip(needed, torch.autograd.grad(loss(*fewer), [leaves[i] for i in needed]), strict=True):
        assert_close(gradient, all_gradients[index])


# torch.func


def _tangents(*tensors):
    return tuple(torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=t.device).view_as(t) for t in tensors)


def _scalar(function):
    return lambda x, w: function(x, w).pow(3).sum()


TRANSFORMS = {
    "grad": lambda f, x, w: grad(_scalar(f), argnums=(0, 1))(x, w),
    "jacrev": lambda f, x, w: jacrev(f, argnums=(0, 1))(x, w),
    "jacfwd": lambda f, x, w: jacfwd(f, argnums=(0, 1))(x, w),
    "hessian": lambda f, x, w: hessian(_scalar(f), argnums=(0, 1))(x, w),
    "jacrev of jacrev": lambda f, x, w: jacrev(jacrev(_scalar(f), argnums=1), argnums=(0, 1))(x, w),
    "jacfwd of jacfwd": lambda f, x, w: jacfwd(jacfwd(_scalar(f), argnums=1), argnums=(0, 1))(x, w),
    "grad of grad of grad": lambda f, x, w: grad(
        lambda w: grad(lambda w: grad(_scalar(f), 1)(x, w).pow(2).sum())(w).sum()
    )(w),
    "jvp": lambda f, x, w: jvp(f, (x, w), _tangents(x, w)),
    "jvp in the input": lambda f, x, w: jvp(lambda x: f(x, w), (x,), _tangents(x)),
    "jvp in the weight": lambda f, x, w: jvp(lambda w: f(x, w), (w,), _tangents(w)),
    "jvp of grad": lambda f, x, w: jvp(lambda w: grad(_scalar(f), 1)(x, w), (w,), _tangents(w)),
    "grad of jvp": lambda f, x, w: grad(lambda x, w: jvp(_scalar(f), (x, w), _tangents(x, w))[1], (0, 1))(x, w),
    "vjp": lambda f, x, w: vjp(f, x, w)[1](x * 2),
    "vmap over inputs": lambda f, x, w: vmap(f, (0, None))(torch.stack([x, 2 * x, -x]), w),
    "vmap over weights": lambda f, x, w: vmap(f, (None, 0))(x, torch.stack([w, 2 * w, -w])),
    "vmap over both": lambda f, x, w: vmap(f)(torch.stack([x, x + 1, -x]), torch.stack([w, 2 * w, -w])),
    "vmap over other dims": lambda f, x, w: vmap(f, (3, 2), 4)(
        torch.stack([x, x + 1, -x], 3), torch.stack([w, 2 * w, -w], 2)
    ),
    "vmap of vmap": lambda f, x, w: vmap(vmap(f, (0, None)), (None, 0))(torch.stack([x, 2 * x]), torch.stack([w, -w])),
    "gradients of each sample": lambda f, x, w: vmap(grad(_scalar(f), argnums=(0, 1)), (0, None))(x[:, None], w),
    "hessians of each sample": lambda f, x, w: vmap(hessian(_scalar(f), argnums=1), (0, None))(x[:, None], w),
    "jacobians of each weight": lambda f, x, w: vmap(jacrev(f), (None, 0))(x, torch.stack([w, 2 * w])),
}


@every_direction
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("case", SMALL[1:8:2], ids=lambda case: "-".join(case.corners))
def test_function_transforms(transform, case: Case, name: str, device: str):
    """Every torch.func transform gives the same results for the function and for the oracle."""
    input, weight, _ = (tensor.detach() for tensor in arguments(case, device))
    actual = transform(getattr(case, name), input, weight)
    expected = transform(of_oracle(name, case), input.cpu(), weight.cpu())
    actual, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert_close(one, other, factor=10)


@pytest.mark.parametrize("dtype", oracles.HALF_PRECISION, ids=str)
@every_direction
def test_tangents_and_maps_of_half_precision_are_rounded_once(name: str, dtype: torch.dtype, device: str):
    case = Case((TL, BR), per_group=3, batch=3, dtype=dtype)
    call, exact = getattr(case, name), of_oracle(name, case)
    arguments = case.input(device), case.weight(device), case.bias(device)
    other = replace(case, seed=1)
    others = other.input(device), other.weight(device), other.bias(device)

    output, tangent = jvp(call, arguments, others)
    point, (d_input, d_weight, d_bias) = (tuple(t.double().cpu() for t in tensors) for tensors in (arguments, others))
    if name == "inverse":  # computed from the rounded solution
        expected = exact(d_input - oracles.conv(output, d_weight, case.corners), point[1], d_bias)
    else:
        expected = jvp(exact, point, (d_input, d_weight, d_bias))[1]
    assert_close(tangent, expected)

    for mapped in ((2,), (1, 2), (0, 1, 2)):
        stacked = [
            torch.stack(pair) if i in mapped else pair[0] for i, pair in enumerate(zip(arguments, others, strict=True))
        ]
        outputs = vmap(call, tuple(0 if i in mapped else None for i in range(3)))(*stacked)
        for index, output in enumerate(outputs):
            each = (t[index] if i in mapped else t for i, t in enumerate(stacked))
            assert_close(output, exact(*(t.double().cpu() for t in each)))


def test_gradients_of_each_sample_through_the_layer(device: str):
    torch.manual_seed(0)
    layer = InvertibleConv2d(4, diagonal="learned", bias=True).to(device, torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs = torch.randn(3, 4, 3, 2, dtype=torch.float64, device=device)

    def loss(parameters, image):
        output, log_det = functional_call(layer, parameters, (image[None],))
        return (output.square().sum() / 2 - log_det).sum()

    each = vmap(grad(loss), (None, 0))(parameters, inputs)
    for index, image in enumerate(inputs):
        for name, expected in grad(loss)(parameters, image).items():
            assert_close(each[name][index], expected)


# The operators under PyTorch's own tests and inside other programs


@pytest.mark.parametrize("case", (SMALL[0], SMALL[7]), ids=lambda case: "-".join(case.corners))
def test_opcheck(case: Case, device: str):
    input, weight, bias = arguments(case, device)
    for transpose in (False, True):
        log_diagonal = bias if transpose else None
        for operator, with_bias in ((ops.conv, log_diagonal), (ops.solve, bias)):
            torch.library.opcheck(
                operator, (input, weight, with_bias, log_diagonal, case.stencils, case.steps, not transpose, transpose)
            )
        other = input.detach().clone().requires_grad_()
        torch.library.opcheck(
            ops.weight_gradient, (input, other, case.stencils, case.steps, list(case.kernel_size), transpose)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_direction
def test_autocast_computes_in_float32(name: str, dtype: torch.dtype, backend: str, device: str):
    case = Case((TL, BR), per_group=3, batch=5)
    function, input, weight = getattr(case, name), case.input(device), case.weight(device)
    bias = torch.ones(case.channels, device=device)
    with torch.autocast(device, dtype):
        for first in (input, input.to(dtype)):
            for second in (weight, weight.to(dtype)):
                output = function(first, second, bias)
                assert output.dtype == torch.float32
                assert_close(output, function(first.float(), second.float(), bias))


def test_training_under_autocast(backend: str, device: str):
    torch.manual_seed(0)
    layer = InvertibleConv2d(4, diagonal="learned", bias=True).to(device)
    input = torch.randn(3, 4, 5, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        output, log_det = layer(torch.nn.functional.conv2d(input, torch.eye(4, device=device)[..., None, None]))
        restored, _ = layer.inverse(output)
        loss = output.square().mean() + restored.mean() - log_det.mean()
    loss.backward()
    assert output.dtype == restored.dtype == log_det.dtype == torch.float32
    assert_close(restored, input.bfloat16().float())
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@every_direction
def test_gradient_checkpointing(name: str, use_reentrant: bool, device: str):
    function, leaves = getattr(SMALL[0], name), arguments(SMALL[0], device)

    def loss(input, weight, bias):
        return function(input, weight, bias).pow(3).sum()

    loss(*leaves).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, gradient)


@every_direction
def test_the_output_may_be_overwritten(name: str, backend: str, device: str):
    """normflows' Shift overwrites it, so the gradient must not need it."""
    function, (input, weight, bias) = getattr(SMALL[0], name), arguments(SMALL[0], device)
    for with_bias in (None, bias):
        output = function(input, weight, with_bias)
        expected = gradients(2 * output + 1, output.detach(), input, weight)
        output = function(input, weight, with_bias)
        cotangent = output.detach().clone()
        output.mul_(2).add_(1)
        for one, other in zip(gradients(output, cotangent, input, weight), expected, strict=True):
            assert_close(one, other)


def test_no_graph_where_none_is_asked_for(device: str):
    input, weight, _ = arguments(SMALL[0], device)
    with torch.no_grad():
        assert not SMALL[0].conv(input, weight).requires_grad
    assert not SMALL[0].conv(input.detach(), weight.detach()).requires_grad
    assert SMALL[0].inverse(input.detach(), weight).requires_grad


def test_log_abs_det_has_the_gradient_of_slogdet(device: str):
    case = SMALL[0]
    _, weight, _ = arguments(case, device)
    log_det = functional.log_abs_det(weight, corners=case.corners, size=case.size)
    expected_weight = weight.detach().cpu().requires_grad_()
    expected = oracles.log_abs_det(expected_weight, case.corners, case.size)
    (actual_gradient,), (expected_gradient,) = (
        torch.autograd.grad(log_det, weight),
        torch.autograd.grad(expected, expected_weight),
    )
    assert_close(actual_gradient, expected_gradient)
    assert gradgradcheck(lambda w: functional.log_abs_det(w, corners=case.corners, size=case.size), (weight,))
