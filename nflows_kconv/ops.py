"""The torch operators: schemas, fake tensors, derivatives and vmap; implementations register under them.

    conv(x, W)             y = A x                 or A^T x
    solve(y, W)            x = A^-1 y              or A^-T y
    weight_gradient(x, g)  d<g, A x> / dW          zero at the masked entries

A is the convolution as a matrix. The derivative of each is made of the three, so that derivatives of any order,
forward and reverse, need no further kernel. With g the gradient of the output (Inverse-Flow, Nagar, Varma 2025,
arXiv 2410.14634):

    y = A x       dL/dx = A^T g            dL/dW = weight_gradient(x, g)       dy = A dx + dA x
    x = A^-1 y    dL/dy = A^-T g =: u      dL/dW = -weight_gradient(x, u)      dx = A^-1 (dy - dA x)

The transposed operators exchange the arguments of weight_gradient. Corners are integers here, see `geometry`.
"""

from __future__ import annotations

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

from nflows_kconv import native, reference  # noqa: F401  importing native registers the CPU's kernels
from nflows_kconv.cuda import operators as cuda_operators


def _checked(name: str, implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The implementation behind the checks that the kernels make as well: calls of torch.ops pass no others."""
    is_gradient = name.endswith("weight_gradient")

    def operator(first: Tensor, second: Tensor, corners: Sequence[int], last: Any) -> Tensor:
        for tensor in (first, second):
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
        if second.shape != expected or (second.dtype, second.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} needs a second tensor of shape {tuple(expected)}, {first.dtype} and {first.device}, "
                f"got {tuple(second.shape)}, {second.dtype} and {second.device}"
            )
        return implementation(first, second, corners, last)

    return operator


_library = torch.library.Library("nflows_kconv", "DEF")
_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "conv": reference.conv,
    "solve": reference.solve,
    "weight_gradient": reference.weight_gradient,
}
# `name_reference` is for the native library, where it has no kernel that can run or none that is the faster one.
for _suffix in ("", "_reference"):
    _library.define(f"conv{_suffix}(Tensor input, Tensor weight, int[] corners, bool transpose) -> Tensor")
    _library.define(f"solve{_suffix}(Tensor input, Tensor weight, int[] corners, bool transpose) -> Tensor")
    _library.define(f"weight_gradient{_suffix}(Tensor input, Tensor grad, int[] corners, int[] kernel_size) -> Tensor")
    for _name, _reference in _REFERENCES.items():
        _library.impl(f"{_name}{_suffix}", _checked(_name, _reference), "CompositeExplicitAutograd")
cuda_operators.register(_library, _REFERENCES)

conv = torch.ops.nflows_kconv.conv.default
solve = torch.ops.nflows_kconv.solve.default
weight_gradient = torch.ops.nflows_kconv.weight_gradient.default


def _same_as_input(input: Tensor, weight: Tensor, corners: list[int], transpose: bool) -> Tensor:
    return torch.empty_like(input)


def _weight_like(input: Tensor, grad: Tensor, corners: list[int], kernel_size: list[int]) -> Tensor:
    channels = input.shape[1]
    return input.new_empty(channels, channels // len(corners), *kernel_size)


def _seen_by_outer_levels(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function's jvp of a rule that takes the two saved tensors and their tangents.

    PyTorch runs a jvp with forward mode off, which would hide its calls from the outer levels of nested torch.func
    transforms. With it on, the saved tensors must shed the tangents of this level.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        saved = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, *saved, *tangents[:2])

    return jvp


class _Conv(_SingleLevelFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, corners: list[int], transpose: bool) -> Tensor:
        return _recorded(conv, input, weight, corners, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.corners, ctx.transpose = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        d_input = d_weight = None
        if ctx.needs_input_grad[0]:
            d_input = conv(grad, weight, ctx.corners, not ctx.transpose)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(input, grad, weight, ctx)
        return d_input, d_weight, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, input: Tensor, weight: Tensor, d_input: Tensor | None, d_weight: Tensor | None) -> Tensor:
        return _sum(
            None if d_input is None else conv(d_input, weight, ctx.corners, ctx.transpose),
            None if d_weight is None else conv(input, d_weight, ctx.corners, ctx.transpose),
        )


class _Solve(_SingleLevelFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, corners: list[int], transpose: bool) -> Tensor:
        return _recorded(solve, input, weight, corners, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, ctx.corners, ctx.transpose = inputs
        ctx.save_for_backward(output, weight)
        ctx.save_for_forward(output, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, weight = ctx.saved_tensors
        d_input = solve(grad, weight, ctx.corners, not ctx.transpose)
        d_weight = -_weight_gradient(output, d_input, weight, ctx) if ctx.needs_input_grad[1] else None
        return d_input, d_weight, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, output: Tensor, weight: Tensor, d_input: Tensor | None, d_weight: Tensor | None) -> Tensor:
        rhs = _sum(d_input, None if d_weight is None else -conv(output, d_weight, ctx.corners, ctx.transpose))
        return solve(rhs, weight, ctx.corners, ctx.transpose)


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
        d_input = conv(grad, weight, ctx.corners, True) if ctx.needs_input_grad[0] else None
        d_grad = conv(input, weight, ctx.corners, False) if ctx.needs_input_grad[1] else None
        return d_input, d_grad, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, input: Tensor, grad: Tensor, d_input: Tensor | None, d_grad: Tensor | None) -> Tensor:
        return _sum(
            None if d_input is None else weight_gradient(d_input, grad, ctx.corners, ctx.kernel_size),
            None if d_grad is None else weight_gradient(input, d_grad, ctx.corners, ctx.kernel_size),
        )


def _weight_gradient(input: Tensor, grad: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    if ctx.transpose:
        input, grad = grad, input
    return weight_gradient(input, grad, ctx.corners, weight.shape[-2:])


def _sum(*terms: Tensor | None) -> Tensor:
    present = [term for term in terms if term is not None]
    return present[0] if len(present) == 1 else present[0] + present[1]


def call(operator: Callable[..., Tensor], input: Tensor, weight: Tensor, corners: list[int]) -> Tensor:
    """`conv` or `solve`, on a shorter way where nothing is to be recorded.

    The operator's Autograd kernel is Python, which costs more than all the rest of a small call. Under autocast the
    layer stays in float32, since its inverse must undo it to rounding; `torch.library.register_autocast` does not reach
    the fake tensors of the compiler of torch 2.10 and 2.11.
    """
    if input.dtype != torch.float64 and autocast_is_on(input):
        input, weight = input.float(), weight.float()
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None or _is_recorded(input, weight):
        return operator(input, weight, corners, False)
    return _below_autograd(operator, input, weight, corners, False)


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of the tensor."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)  # which raises for meta tensors


def _is_recorded(first: Tensor, second: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    return recorded or forward_ad._current_level >= 0


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
        if not _is_recorded(args[0], args[1]):
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
    """vmap of conv and solve: over inputs into the batch; over weights into channel groups."""

    def rule(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor, corners: list[int], transpose: bool
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        inputs = _mapped_first(input, in_dims[0], size)
        if in_dims[1] is None:
            output = operator(inputs.flatten(0, 1), weight, corners, transpose)
            return output.unflatten(0, (size, -1)), 0
        weights = _mapped_first(weight, in_dims[1], size).flatten(0, 1)
        output = operator(_into_channels(inputs), weights, list(corners) * size, transpose)
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


for _operator, _fake, _function, _vmap in (
    (conv, _same_as_input, _Conv, _batched_operator(conv)),
    (solve, _same_as_input, _Solve, _batched_operator(solve)),
    (weight_gradient, _weight_like, _WeightGradient, _batched_weight_gradient),
):
    _name = _operator.name()
    _library.impl(_name, _differentiable(_operator, _function), "Autograd")
    torch.library.register_fake(_name, _checked(_name, _fake), lib=_library)
    torch.library.register_vmap(_name, _vmap, lib=_library)
