"""The torch operators: schemas, fake tensors, derivatives and vmap; implementations register under them.

    conv(x, W, b)          y = A x + b             or A^T x + b
    solve(y, W, b)         x = A^-1 (y - b)        or A^-T (y - b)
    weight_gradient(x, g)  d<g, A x> / dW          zero at the masked entries

A is the convolution as a matrix; b, a number for each channel, may be None. The derivative of each is made of the
three, so that derivatives of any order, forward and reverse, need no further kernel. With g the gradient of the output
(Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634):

    y = A x + b         dL/dx = A^T g           dL/dW = weight_gradient(x, g)     dL/db = sum of g over pixels
                        dy = A dx + dA x + db
    x = A^-1 (y - b)    dL/dy = A^-T g =: u     dL/dW = -weight_gradient(x, u)    dL/db = -sum of u
                        dx = A^-1 (dy - dA x - db)

The transposed operators exchange the arguments of weight_gradient. Half precision is computed in float32 and rounded
once, bias included. Corners are integers here, see `geometry`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_single_level_autograd_function_allowed,
    peek_interpreter_stack,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from nflows_kconv import native, reference  # noqa: F401  importing native registers the CPU's kernels
from nflows_kconv.cuda import operators as cuda_operators


def _checked(name: str, implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The implementation behind the checks that the kernels make as well: calls of torch.ops pass no others."""
    is_gradient = name.endswith("weight_gradient")

    def operator(first: Tensor, second: Tensor, *others: Any) -> Tensor:
        *biases, corners, last = others  # conv and solve have one, which may be None
        biases = [bias for bias in biases if bias is not None]
        for tensor in (first, second, *biases):
            if tensor.layout != torch.strided or tensor.is_nested or not tensor.is_floating_point():
                raise ValueError(f"{name} needs dense floating-point tensors, got {tensor.layout} and {tensor.dtype}")
        shape, groups = first.shape, len(corners)
        kernel_size = last if is_gradient else second.shape[2:]
        fits = len(shape) == 4 and groups > 0 and shape[1] % groups == 0 and set(corners) <= {0, 1, 2, 3}
        if not (fits and len(kernel_size) == 2 and kernel_size[0] > 0 and kernel_size[1] > 0):
            raise ValueError(
                f"{name} needs an image [B, C, H, W], one of the corners 0 to 3 for each group of its channels and a "
                f"kernel of positive size, got {tuple(shape)}, {list(corners)} and {tuple(kernel_size)}"
            )
        expected = shape if is_gradient else (shape[1], shape[1] // groups, *kernel_size)
        _check_operand(name, "second tensor", second, expected, first)
        for bias in biases:
            _check_operand(name, "bias", bias, shape[1:2], first)
        return implementation(first, second, *others)

    return operator


def _check_operand(name: str, role: str, operand: Tensor, shape: Sequence[int], first: Tensor) -> None:
    if operand.shape != shape or (operand.dtype, operand.device) != (first.dtype, first.device):
        raise ValueError(
            f"{name} needs a {role} of shape {tuple(shape)}, {first.dtype} and {first.device}, "
            f"got {tuple(operand.shape)}, {operand.dtype} and {operand.device}"
        )


_library = torch.library.Library("nflows_kconv", "DEF")
_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "conv": reference.conv,
    "solve": reference.solve,
    "weight_gradient": reference.weight_gradient,
}
# `name_reference` is for the native library, where it has no kernel that can run or none that is the faster one.
for _suffix in ("", "_reference"):
    for _name in ("conv", "solve"):
        _library.define(
            f"{_name}{_suffix}(Tensor input, Tensor weight, Tensor? bias, int[] corners, bool transpose) -> Tensor"
        )
    _library.define(f"weight_gradient{_suffix}(Tensor input, Tensor grad, int[] corners, int[] kernel_size) -> Tensor")
    for _name, _reference in _REFERENCES.items():
        _library.impl(f"{_name}{_suffix}", _checked(_name, _reference), "CompositeExplicitAutograd")
cuda_operators.register(_library, _REFERENCES)

conv = torch.ops.nflows_kconv.conv.default
solve = torch.ops.nflows_kconv.solve.default
weight_gradient = torch.ops.nflows_kconv.weight_gradient.default


def _same_as_input(input: Tensor, weight: Tensor, bias: Tensor | None, corners: list[int], transpose: bool) -> Tensor:
    return torch.empty_like(input)


def _weight_like(input: Tensor, grad: Tensor, corners: list[int], kernel_size: list[int]) -> Tensor:
    channels = input.shape[1]
    return input.new_empty(channels, channels // len(corners), *kernel_size)


def _operator_flops(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod((input[0], *input[2:], *weight))


def _weight_gradient_flops(
    input: Sequence[int], grad: Sequence[int], corners: list[int], kernel_size: list[int], **_: Any
) -> int:
    return 2 * math.prod((*input, input[1] // len(corners), *kernel_size))


def _seen_by_outer_levels(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function's jvp of a rule that takes the two saved tensors and the tangents of all tensors.

    PyTorch runs a jvp with forward mode off, which would hide its calls from the outer levels of nested torch.func
    transforms. With it on, the saved tensors must shed the tangents of this level, which has no other number than 0.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        saved = [forward_ad.unpack_dual(tensor, level=0).primal for tensor in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, *saved, *tangents[:-2])

    return jvp


class _Conv(_SingleLevelFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, corners: list[int], transpose: bool) -> Tensor:
        return _recorded(conv, input, weight, bias, corners, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.corners, ctx.transpose = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        d_input = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_input = conv(grad, weight, None, ctx.corners, not ctx.transpose)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(input, grad, weight, ctx)
        if ctx.needs_input_grad[2]:
            d_bias = _sum_of_pixels(grad)
        return d_input, d_weight, d_bias, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(
        ctx: Any, input: Tensor, weight: Tensor, d_input: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None
    ) -> Tensor:
        dtype, shape = input.dtype, input.shape
        input, weight, d_input, d_weight, d_bias = _widened(input, weight, d_input, d_weight, d_bias)
        return _sum(
            shape,
            None if d_input is None else conv(d_input, weight, None, ctx.corners, ctx.transpose),
            None if d_weight is None else conv(input, d_weight, None, ctx.corners, ctx.transpose),
            None if d_bias is None else d_bias.view(-1, 1, 1),
        ).to(dtype)


class _Solve(_SingleLevelFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, corners: list[int], transpose: bool) -> Tensor:
        return _recorded(solve, input, weight, bias, corners, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, ctx.corners, ctx.transpose = inputs
        ctx.save_for_backward(output, weight)
        ctx.save_for_forward(output, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, weight, rhs = _widened(*ctx.saved_tensors, grad)
        solved = solve(rhs, weight, None, ctx.corners, not ctx.transpose)
        d_weight = -_weight_gradient(output, solved, weight, ctx) if ctx.needs_input_grad[1] else None
        d_bias = -_sum_of_pixels(solved) if ctx.needs_input_grad[2] else None
        gradients = (None if d is None else d.to(grad.dtype) for d in (solved, d_weight, d_bias))
        return *gradients, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(
        ctx: Any, output: Tensor, weight: Tensor, d_input: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None
    ) -> Tensor:
        dtype, shape = output.dtype, output.shape
        output, weight, d_input, d_weight, d_bias = _widened(output, weight, d_input, d_weight, d_bias)
        rhs = _sum(
            shape,
            d_input,
            None if d_weight is None else -conv(output, d_weight, None, ctx.corners, ctx.transpose),
            None if d_bias is None else -d_bias.view(-1, 1, 1),
        )
        return solve(rhs, weight, None, ctx.corners, ctx.transpose).to(dtype)


class _WeightGradient(_SingleLevelFunction):
    @staticmethod
    def forward(input: Tensor, grad: Tensor, corners: list[int], kernel_size: list[int]) -> Tensor:
        return _recorded(weight_gradient, input, grad, corners, kernel_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, grad, ctx.corners, ctx.kernel_size = inputs
        ctx.save_for_backward(input, grad)
        ctx.save_for_forward(input, grad)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        input, grad = ctx.saved_tensors
        d_input = conv(grad, weight, None, ctx.corners, True) if ctx.needs_input_grad[0] else None
        d_grad = conv(input, weight, None, ctx.corners, False) if ctx.needs_input_grad[1] else None
        return d_input, d_grad, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, input: Tensor, grad: Tensor, d_input: Tensor | None, d_grad: Tensor | None) -> Tensor:
        dtype, shape = input.dtype, (input.shape[1], input.shape[1] // len(ctx.corners), *ctx.kernel_size)
        input, grad, d_input, d_grad = _widened(input, grad, d_input, d_grad)
        return _sum(
            shape,
            None if d_input is None else weight_gradient(d_input, grad, ctx.corners, ctx.kernel_size),
            None if d_grad is None else weight_gradient(input, d_grad, ctx.corners, ctx.kernel_size),
        ).to(dtype)


def _weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    if ctx.transpose:
        input, grad = grad, input
    return weight_gradient(input, grad, ctx.corners, weight.shape[-2:])


def _sum_of_pixels(images: Tensor) -> Tensor:
    return images.sum((0, 2, 3))  # half precision is added up in float32


def _widened(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors of one dtype in float32 at least: a derivative of several terms or steps is rounded once, at its end."""
    tensors = first, *others
    if first.dtype in (torch.float32, torch.float64):
        return tensors
    return tuple(None if tensor is None else tensor.float() for tensor in tensors)


def _sum(shape: Sequence[int], *terms: Tensor | None) -> Tensor:
    first, *others = (term for term in terms if term is not None)
    return sum(others, first).expand(shape)


def call(
    operator: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, corners: list[int]
) -> Tensor:
    """`conv` or `solve`, on a shorter way where nothing is to be recorded.

    The operator's Autograd kernel is Python, which costs more than all the rest of a small call. Under autocast the
    layer stays in float32, since its inverse must undo it to rounding; `torch.library.register_autocast` does not reach
    the fake tensors of the compiler of torch 2.10 and 2.11.
    """
    if input.dtype != torch.float64 and autocast_is_on(input):
        input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
    if torch.compiler.is_compiling() or _is_recorded(input, weight, bias):
        return operator(input, weight, bias, corners, False)
    return _below_autograd(operator, input, weight, bias, corners, False)


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of the tensor."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)  # which raises for meta tensors


def _is_recorded(first: Tensor, second: Tensor, third: Tensor | None = None) -> bool:
    if torch.is_grad_enabled():
        if first.requires_grad or second.requires_grad or (third is not None and third.requires_grad):
            return True
    # Graphs of torch.compile enter a level of torch.func without telling forward_ad.
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _below_autograd(operator: Callable[..., Tensor], *args: Any) -> Tensor:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    except RuntimeError as error:
        raise _with_type(error) from None


def _with_type(error: RuntimeError) -> BaseException:
    """The exception that it was.

    torch passes on the text alone: of the launcher of CUDA kernels always, of the CPU's kernels since torch 2.15.
    """
    text = str(error)
    if text.startswith("out of memory: "):
        return torch.OutOfMemoryError(text)
    if text.startswith("the pivot's diagonal must be finite"):
        return ValueError(text)
    return KeyboardInterrupt() if text == "KeyboardInterrupt" else error


def _recorded(operator: Callable[..., Tensor], *args: Any) -> Tensor:
    # A function's forward runs with both modes of differentiation off, which would hide this call from the outer levels
    # of nested torch.func transforms.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(operator, *args)


def _differentiable(operator: Callable[..., Tensor], function: Any) -> Callable[..., Tensor]:
    """The kernel of the Autograd key.

    `torch.library.register_autograd` would do but for forward mode, whose tangents it drops without a word, and for
    torch.func.
    """

    def kernel(*args: Any) -> Tensor:
        if not _is_recorded(*args[:-2]):
            return _below_autograd(operator, *args)
        # torch's own context manager for this hides a KeyboardInterrupt that comes as it is entered.
        allowed = get_single_level_autograd_function_allowed()
        try:
            set_single_level_autograd_function_allowed(True)
            output = function.apply(*args)
        finally:
            set_single_level_autograd_function_allowed(allowed)
        # `_Solve` saves its output; the copy is what a next layer may overwrite, as normflows' Shift does.
        return output.clone() if function is _Solve else output

    return kernel


def _batched_operator(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """vmap of conv and solve: over inputs into the batch; over weights and biases into channel groups."""

    def rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        corners: list[int],
        transpose: bool,
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        inputs = _mapped_first(input, in_dims[0], size)
        if in_dims[1] is None and in_dims[2] is None:
            output = operator(inputs.flatten(0, 1), weight, bias, corners, transpose)
            return output.unflatten(0, (size, -1)), 0
        weights = _mapped_first(weight, in_dims[1], size).flatten(0, 1)
        biases = None if bias is None else _mapped_first(bias, in_dims[2], size).flatten()
        output = operator(_into_channels(inputs), weights, biases, list(corners) * size, transpose)
        return output.unflatten(1, (size, -1)), 1

    return rule


def _batched_weight_gradient(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, grad: Tensor, corners: list[int], kernel_size: list[int]
) -> tuple[Tensor, int]:
    size = info.batch_size
    inputs, grads = (_into_channels(_mapped_first(t, d, size)) for t, d in zip((input, grad), in_dims, strict=False))
    output = weight_gradient(inputs, grads, list(corners) * size, kernel_size)
    return output.unflatten(0, (size, -1)), 0


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_channels(images: Tensor) -> Tensor:
    return images.transpose(0, 1).flatten(1, 2)


for _operator, _fake, _function, _vmap, _flops in (
    (conv, _same_as_input, _Conv, _batched_operator(conv), _operator_flops),
    (solve, _same_as_input, _Solve, _batched_operator(solve), _operator_flops),
    (weight_gradient, _weight_like, _WeightGradient, _batched_weight_gradient, _weight_gradient_flops),
):
    _name = _operator.name()
    _library.impl(_name, _differentiable(_operator, _function), "Autograd")
    torch.library.register_fake(_name, _checked(_name, _fake), lib=_library)
    torch.library.register_vmap(_name, _vmap, lib=_library)
    # Two operations a multiply-add, those with the border included: as F.conv2d counts them.
    register_flop_formula(_operator.overloadpacket)(_flops)
