"""The torch operators: schemas, fake tensors, derivatives and vmap; backends run them.

    conv(x, W, b, l)          y = A x + b             or A^T x + b
    solve(y, W, b, l)         x = A^-1 (y - b)        or A^-T (y - b)
    weight_gradient(x, g)     d<g, A x> / dW          zero where the weight is masked

A is the convolution as a matrix; its weight is W where the stencils leave it free. The pivot's diagonal is that of W,
or exp(l) if l is given, [C], or 1 if `unit_diagonal`. b, [C], may be None. The derivatives of each operator use only
these three, so no order of differentiation, forward or reverse, needs another kernel. With g the gradient of the output
(Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634):

    y = A x + b         dL/dx = A^T g           dL/dW = weight_gradient(x, g)     dL/db = sum of g over pixels
                        dy = A dx + dA x + db
    x = A^-1 (y - b)    dL/dy = A^-T g =: u     dL/dW = -weight_gradient(x, u)    dL/db = -sum of u
                        dx = A^-1 (dy - dA x - db)

and dL/dl is exp(l) times the diagonal of dL/dW. The transposed operators exchange the arguments of weight_gradient.
Half precision is computed in float32 and rounded once, after the bias. Images have two or three dimensions. Stencils
are integers here, one per group, see `stencil`; `repeats` cycles the groups through them that many times. Images with
separate weights become such groups of a single image: unlike the length of a list, `repeats` can stay symbolic in a
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nflows_kconv import stencil
from nflows_kconv.backends import registry
from nflows_kconv.backends.registry import OperatorCall
from nflows_kconv.torch_internals import (
    SingleLevelFunction,
    apply_at_this_level,
    below_autograd,
    forward_mode,
    is_any_autocast_on,
    is_differentiating_forward,
    is_legacy_batchedtensor,
    is_unobserved,
    is_zero_tensor,
    primal,
)

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {2: F.conv2d, 3: F.conv3d}

Operation = Literal["conv", "solve"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_library = torch.library.Library("nflows_kconv", "DEF")
for _name in ("conv", "solve", "exported_conv"):
    _library.define(
        f"{_name}(Tensor input, Tensor weight, Tensor? bias, Tensor? log_diagonal, int[] stencils, int[] dilation, "
        "bool unit_diagonal, bool transpose, SymInt repeats=1) -> Tensor"
    )
_library.define(
    "weight_gradient(Tensor input, Tensor grad, int[] stencils, int[] dilation, int[] kernel_size, bool unit_diagonal, "
    "SymInt repeats=1) -> Tensor"
)

conv = torch.ops.nflows_kconv.conv.default
solve = torch.ops.nflows_kconv.solve.default
exported_conv = torch.ops.nflows_kconv.exported_conv.default
weight_gradient = torch.ops.nflows_kconv.weight_gradient.default


_NUM_TENSORS = {"conv": 4, "solve": 4, "weight_gradient": 2}  # before five other arguments


def _complete(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments with `repeats`, the last one, which the dispatcher omits if it is 1."""
    return (*args, 1)[: _NUM_TENSORS[name] + 5]


def _operator_call(name: str, args: tuple[Any, ...]) -> tuple[OperatorCall, int]:
    """Returns the call with its stencils once, and the number of repeats."""
    *arguments, repeats = _complete(name, args)
    if name == "weight_gradient":
        input, grad, stencils, dilation, kernel_size, unit_diagonal = arguments
        call = OperatorCall(name, input, grad, stencils, None, None, unit_diagonal, False, kernel_size, dilation)
        return call, repeats
    input, weight, bias, log_diagonal, stencils, dilation, unit_diagonal, transpose = arguments
    options = unit_diagonal, transpose, weight.shape[2:], dilation
    return OperatorCall(name, input, weight, stencils, bias, log_diagonal, *options), repeats


def _run(call: OperatorCall, repeats: int) -> Tensor:
    return registry.run(call._replace(stencils=tuple(call.stencils) * repeats))


def _check(call: OperatorCall, repeats: int) -> None:
    """Checks the arguments, because backends trust them. Direct torch.ops calls are checked only here.

    Raises:
        ValueError: If the arguments do not fit.
    """
    name, first = call.operation, call.input
    others = {"second tensor": call.other, "bias": call.bias, "log-diagonal": call.log_diagonal}
    operands = {role: tensor for role, tensor in others.items() if tensor is not None}
    for tensor in (first, *operands.values()):
        if tensor.layout != torch.strided or tensor.is_nested or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} needs dense tensors of one of the dtypes {DTYPES}, got {tensor.layout} and {tensor.dtype}"
            )
    shape, stencils, kernel_size, dimensions = first.shape, call.stencils, call.kernel_size, call.dimensions
    known = {*stencil.STENCILS[dimensions].values()} if dimensions in (2, 3) else set()
    if stencil.PERIODIC in stencils and _may_wrap(call):
        known.add(stencil.PERIODIC)
    groups = len(stencils) * repeats
    fits = known and groups > 0 and shape[1] % groups == 0 and set(stencils) <= known
    sizes = tuple(kernel_size), tuple(call.dilation)
    if not (fits and all(len(each) == dimensions and min(each) > 0 for each in sizes)):
        raise ValueError(
            f"{name} needs images [B, C, H, W] or [B, C, D, H, W], one of their stencils for each group of channels, "
            f"and a kernel of positive size and dilation, "
            f"got {tuple(shape)}, {repeats} times {list(stencils)}, {sizes[0]} and {sizes[1]}"
        )
    weights = (shape[1], shape[1] // groups, *kernel_size)
    expected = {"second tensor": shape if name == "weight_gradient" else weights}
    for role, operand in operands.items():
        if operand.shape != expected.get(role, shape[1:2]) or (operand.dtype, operand.device) != (
            first.dtype,
            first.device,
        ):
            raise ValueError(
                f"{name} needs a {role} of shape {tuple(expected.get(role, shape[1:2]))}, {first.dtype} and "
                f"{first.device}, got {tuple(operand.shape)}, {operand.dtype} and {operand.device}"
            )


def _may_wrap(call: OperatorCall) -> bool:
    """Returns whether borders may be circular: no solution, no dilation, and a free weight that fits the image."""
    is_free = not call.unit_diagonal and call.log_diagonal is None
    fits = all(size >= length for size, length in zip(call.input.shape[2:], call.kernel_size, strict=False))
    return call.operation != "solve" and not call.dilated and is_free and fits


def _checked(name: str, implementation: Callable[[OperatorCall, int], Tensor]) -> Callable[..., Tensor]:
    def operator(*args: Any) -> Tensor:
        call, repeats = _operator_call(name, args)
        _check(call, repeats)
        return implementation(call, repeats)

    return operator


def _fake(call: OperatorCall, repeats: int) -> Tensor:
    if call.operation != "weight_gradient":
        return torch.empty_like(call.input)
    channels = call.input.shape[1]
    return call.input.new_empty(channels, channels // (len(call.stencils) * repeats), *call.kernel_size)


def _operator_flops(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod((input[0], *input[2:], *weight))


def _weight_gradient_flops(
    input: Sequence[int],
    grad: Sequence[int],
    stencils: list[int],
    dilation: list[int],
    kernel_size: list[int],
    unit_diagonal: bool,
    repeats: int = 1,
    **__: Any,
) -> int:
    return 2 * math.prod((*input, input[1] // (len(stencils) * repeats), *kernel_size))


def _exported_conv(*args: Any) -> Tensor:
    """Computes `conv` in programs of torch.export.

    Its composite kernel puts it into torch's default decompositions, so decomposing an exported program leaves plain
    ATen. Elsewhere, including torch.compile, it is `conv` with its kernels.
    """
    return _plain_conv(*_operator_call("conv", args)) if torch.compiler.is_exporting() else conv(*args)


def _plain_conv(call: OperatorCall, repeats: int) -> Tensor:
    """Computes A x + b by torch's convolutions, one per stencil; one trace serves all sizes from 1."""
    count, dimensions, dtype = len(call.stencils), call.dimensions, call.input.dtype
    input, weight, bias, log_diagonal = _widened(call.input, call.other, call.bias, call.log_diagonal)
    weight = stencil.effective(weight, call.stencils, log_diagonal, call.unit_diagonal)
    shape, outputs = (repeats, count, -1), []
    images, kernels = input.unflatten(1, shape).unbind(2), weight.unflatten(0, shape).unbind(1)
    for image, kernel, code in zip(images, kernels, call.stencils, strict=True):
        if call.transpose:
            kernel, code = kernel.transpose(1, 2).flip([*range(3, 3 + dimensions)]), stencil.opposite(code, dimensions)
        image = stencil.pad(image.flatten(1, 2), code, call.kernel_size, call.dilation)
        options = dict(dilation=list(call.dilation), groups=repeats)
        output = _CONVOLUTIONS[dimensions](image, kernel.flatten(0, 1), **options)
        outputs.append(output.unflatten(1, (repeats, -1)))
    output = torch.stack(outputs, 2).flatten(1, 3)
    return (output if bias is None else output + _on_pixels(bias, output)).to(dtype)


def _seen_by_outer_levels(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes the jvp of a function from a rule that takes the saved tensors and the tangents of all tensors.

    PyTorch runs a jvp with forward mode off, which hides its calls from the outer levels of nested torch.func
    transforms. With forward mode on, the saved tensors must drop the tangents of this level.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        saved = map(primal, ctx.saved_tensors)
        with forward_mode(True):
            return rule(ctx, *saved, *tangents[: ctx.num_tensors])

    return jvp


class _Operator(SingleLevelFunction):
    """Base of `conv` and `solve`: derivatives with respect to the weight, bias and log-diagonal."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, log_diagonal, ctx.stencils, ctx.dilation, ctx.unit_diagonal, ctx.transpose, ctx.repeats = (
            inputs
        )
        ctx.num_tensors, ctx.kernel_size = 4, weight.shape[2:]
        # x, in either direction.
        saved = (output if ctx.operator is solve else input), weight, log_diagonal
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def options(ctx: Any, unit_diagonal: bool, transpose: bool) -> tuple[Any, ...]:
        """Returns the options of an operator on the same images."""
        return ctx.stencils, ctx.dilation, unit_diagonal, transpose, ctx.repeats

    @staticmethod
    def gradients(
        ctx: Any, x: Tensor, grad: Tensor, log_diagonal: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of weight, bias and log-diagonal, given the gradient of A x + b."""
        _, needs_weight, needs_bias, needs_log_diagonal = ctx.needs_input_grad[:4]
        d_weight = d_bias = d_log_diagonal = None
        if needs_weight:
            first, second = (grad, x) if ctx.transpose else (x, grad)
            is_fixed = ctx.unit_diagonal or log_diagonal is not None
            options = ctx.stencils, ctx.dilation, ctx.kernel_size, is_fixed, ctx.repeats
            d_weight = _applied("weight_gradient", weight_gradient, first, second, *options)
        if needs_bias:
            d_bias = _sum_of_pixels(grad)
        if log_diagonal is not None and needs_log_diagonal:
            x, grad, log_diagonal = _widened(x, grad, log_diagonal)
            d_log_diagonal = _sum_of_pixels(x * grad) * log_diagonal.exp()
        return d_weight, d_bias, d_log_diagonal

    @staticmethod
    def tangents(
        ctx: Any,
        x: Tensor,
        log_diagonal: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_log_diagonal: Tensor | None,
    ) -> Iterator[Tensor]:
        """Returns the terms of dA x + db."""
        if d_weight is not None:
            if ctx.unit_diagonal or log_diagonal is not None:
                d_weight = _without_diagonal(d_weight, ctx.stencils)
            yield conv(x, d_weight, None, None, *_Operator.options(ctx, False, ctx.transpose))
        if d_bias is not None:
            yield _on_pixels(d_bias, x)
        if d_log_diagonal is not None and log_diagonal is not None:
            yield _on_pixels(log_diagonal.exp() * d_log_diagonal, x) * x


class _Conv(_Operator):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _evaluated("conv", conv, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator = conv
        _Operator.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, log_diagonal = ctx.saved_tensors
        d_input = None
        if ctx.needs_input_grad[0]:
            options = _Operator.options(ctx, ctx.unit_diagonal, not ctx.transpose)
            d_input = _applied("conv", conv, grad, weight, None, log_diagonal, *options)
        gradients = _Operator.gradients(ctx, input, grad, log_diagonal)
        return d_input, *(None if d is None else d.to(grad.dtype) for d in gradients), None, None, None, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, input: Tensor, weight: Tensor, log_diagonal: Tensor | None, *tangents: Tensor | None) -> Tensor:
        dtype, shape = input.dtype, input.shape
        input, weight, log_diagonal, d_input, *others = _widened(input, weight, log_diagonal, *tangents)
        terms = list(_Operator.tangents(ctx, input, log_diagonal, *others))
        if d_input is not None:
            options = _Operator.options(ctx, ctx.unit_diagonal, ctx.transpose)
            terms.append(conv(d_input, weight, None, log_diagonal, *options))
        return _sum(shape, *terms).to(dtype)


class _Solve(_Operator):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _evaluated("solve", solve, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator = solve
        _Operator.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, weight, log_diagonal, rhs = _widened(*ctx.saved_tensors, grad)
        options = _Operator.options(ctx, ctx.unit_diagonal, not ctx.transpose)
        solved = _applied("solve", solve, rhs, weight, None, log_diagonal, *options)
        gradients = (None if d is None else -d for d in _Operator.gradients(ctx, output, solved, log_diagonal))
        return *(None if d is None else d.to(grad.dtype) for d in (solved, *gradients)), None, None, None, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, output: Tensor, weight: Tensor, log_diagonal: Tensor | None, *tangents: Tensor | None) -> Tensor:
        dtype, shape = output.dtype, output.shape
        output, weight, log_diagonal, d_input, *others = _widened(output, weight, log_diagonal, *tangents)
        rhs = _sum(shape, d_input, *(-term for term in _Operator.tangents(ctx, output, log_diagonal, *others)))
        options = _Operator.options(ctx, ctx.unit_diagonal, ctx.transpose)
        return solve(rhs, weight, None, log_diagonal, *options).to(dtype)


class _WeightGradient(SingleLevelFunction):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _evaluated("weight_gradient", weight_gradient, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, grad, *ctx.options = inputs
        ctx.num_tensors, ctx.shape = 2, output.shape
        ctx.save_for_backward(input, grad)
        ctx.save_for_forward(input, grad)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        (input, grad), (stencils, dilation, _, unit_diagonal, repeats) = ctx.saved_tensors, ctx.options
        if unit_diagonal:
            weight = _without_diagonal(weight, stencils)
        d_input, d_grad = (
            conv(other, weight, None, None, stencils, dilation, False, transpose, repeats) if needed else None
            for other, transpose, needed in zip((grad, input), (True, False), ctx.needs_input_grad[:2], strict=True)
        )
        return d_input, d_grad, None, None, None, None, None

    @staticmethod
    @_seen_by_outer_levels
    def jvp(ctx: Any, input: Tensor, grad: Tensor, d_input: Tensor | None, d_grad: Tensor | None) -> Tensor:
        dtype = input.dtype
        input, grad, d_input, d_grad = _widened(input, grad, d_input, d_grad)
        return _sum(
            ctx.shape,
            None if d_input is None else weight_gradient(d_input, grad, *ctx.options),
            None if d_grad is None else weight_gradient(input, d_grad, *ctx.options),
        ).to(dtype)


def _without_diagonal(weight: Tensor, stencils: Sequence[int]) -> Tensor:
    return weight.masked_fill(stencil.diagonal_entries(weight.shape, stencils, weight.device), 0)


def _sum_of_pixels(images: Tensor) -> Tensor:
    return images.sum([dim for dim in range(images.dim()) if dim != 1])  # sums half precision in float32


def _on_pixels(channels: Tensor, images: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (images.dim() - 2))


def _widened(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Converts half-precision tensors to float32, so a derivative of several terms or steps is rounded once."""
    tensors = first, *others
    if first.dtype in (torch.float32, torch.float64):
        return tensors
    return tuple(None if tensor is None else tensor.float() for tensor in tensors)


def _sum(shape: Sequence[int], *terms: Tensor | None) -> Tensor:
    first, *others = (term for term in terms if term is not None)
    return sum(others, first).expand(shape)


def call(
    name: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_diagonal: Tensor | None,
    stencils: Sequence[int],
    dilation: Sequence[int],
    unit_diagonal: bool,
    repeats: int,
) -> Tensor:
    """Calls `conv` or `solve` with checked arguments. Skips the dispatcher where only autograd would see the call.

    The dispatcher's kernel is Python and takes longer than the rest of a small call. Under autocast the layer stays in
    float32, because its inverse must undo it to rounding. `torch.library.register_autocast` cannot do this: it misses
    the compiler's fake tensors in torch 2.10 and 2.11.
    """
    if is_any_autocast_on() and input.dtype != torch.float64 and autocast_is_on(input):
        input, weight = input.float(), weight.float()
        bias, log_diagonal = (None if t is None else t.float() for t in (bias, log_diagonal))
    args = input, weight, bias, log_diagonal, stencils, dilation, unit_diagonal, False, repeats
    if _is_direct(input, weight, bias, log_diagonal):
        return _run(*_operator_call(name, args))
    if _is_direct(input, weight, bias, log_diagonal, recorded=True):
        return _recorded(_Conv if name == "conv" else _Solve, args)
    if name == "conv" and torch.compiler.is_exporting():  # always true in Dynamo of torch 2.10
        return exported_conv(*args)
    return (conv if name == "conv" else solve)(*args)


def log_abs_det(input: Tensor, log_diagonal: Tensor, sign: int) -> Tensor | None:
    """Computes the log-determinants [B] of a log-diagonal, [C] or [B, C], as a backend does; None if torch must see it.

    Of torch's operators it takes two, which are two launches on a GPU.
    """
    if not _is_direct(log_diagonal) or input.numel() == 0:
        return None
    images = log_diagonal[..., None, None].expand(input.shape[0], -1, math.prod(input.shape[2:]), 1)
    return registry.run(OperatorCall("log_abs_det", images, images, (0,), None, None, False, sign < 0, (1, 1)))


def autocast_is_on(tensor: Tensor) -> bool:
    """Returns whether autocast is on for the device of the tensor."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)  # raises for meta tensors


def _is_direct(*tensors: Tensor | None, recorded: bool = False) -> bool:
    """Returns whether a call may skip the dispatcher, so that backends read the tensors' memory directly."""
    return is_unobserved(*tensors, recorded=recorded) and not any(
        # `torch.autograd.grad(..., is_grads_batched=True)` makes the third; autograd does not record the last.
        t is not None
        and (t.is_meta or is_zero_tensor(t) or is_legacy_batchedtensor(t) or (recorded and t.is_inference()))
        for t in tensors
    )


def _run_directly(name: str, args: tuple[Any, ...]) -> Tensor:
    """Runs an operator past the dispatcher, which takes longer than a small call. Checks nothing."""
    attempt = registry.attempt
    if attempt is not None and name != "weight_gradient":
        *tensors, stencils, dilation, unit_diagonal, transpose, repeats = _complete(name, args)
        output = attempt(name, *tensors, tuple(stencils) * repeats, tuple(dilation), unit_diagonal, transpose)
        if output is not None:
            return output
    return _run(*_operator_call(name, args))


def _applied(name: str, operator: Callable[..., Tensor], *args: Any) -> Tensor:
    is_direct = _is_direct(*args[: _NUM_TENSORS[name]])
    return _run_directly(name, args) if is_direct else operator(*args)


def _evaluated(name: str, operator: Callable[..., Tensor], *args: Any) -> Tensor:
    if _is_direct(*args[: _NUM_TENSORS[name]]):
        return _run_directly(name, args)
    # A function's forward runs with both modes of differentiation off, which hides this call from the outer levels of
    # nested torch.func transforms.
    with torch.enable_grad(), forward_mode(True), below_autograd():
        return operator(*args)


def _differentiable(name: str, operator: Callable[..., Tensor], function: Any) -> Callable[..., Tensor]:
    """Returns an operator's kernel for the Autograd key.

    `torch.library.register_autograd` silently drops forward-mode tangents and does not support torch.func.
    """

    def kernel(*args: Any) -> Tensor:
        tensors = (each for each in args[: _NUM_TENSORS[name]] if each is not None)
        is_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if not is_recorded and not is_differentiating_forward():
            with below_autograd():
                return operator(*args)
        if _is_direct(*args[: _NUM_TENSORS[name]], recorded=True):
            _check(*_operator_call(name, args))  # as the operator does elsewhere
        return _recorded(function, _complete(name, args))

    return kernel


def _recorded(function: Any, args: tuple[Any, ...]) -> Tensor:
    output = apply_at_this_level(function, *args)
    # `_Solve` saves its output. Returns a copy, which the next layer may overwrite, as normflows' Shift does.
    return output.clone() if function is _Solve else output


def _batched_operator(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Batches conv and solve for vmap: inputs into the batch; weights, biases, diagonals into channel groups."""

    def rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_diagonal: Tensor | None,
        stencils: list[int],
        dilation: list[int],
        unit_diagonal: bool,
        transpose: bool,
        repeats: int = 1,
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        inputs = _mapped_first(input, in_dims[0], size)
        if in_dims[1] is None and in_dims[2] is None and in_dims[3] is None:
            options = stencils, dilation, unit_diagonal, transpose, repeats
            output = operator(inputs.flatten(0, 1), weight, bias, log_diagonal, *options)
            return output.unflatten(0, (size, -1)), 0
        weights, biases, log_diagonals = (
            None if tensor is None else _mapped_first(tensor, dim, size).flatten(0, 1)
            for tensor, dim in zip((weight, bias, log_diagonal), in_dims[1:4], strict=True)
        )
        options = stencils, dilation, unit_diagonal, transpose, repeats * size
        output = operator(_into_channels(inputs), weights, biases, log_diagonals, *options)
        return output.unflatten(1, (size, -1)), 1

    return rule


def _batched_weight_gradient(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    grad: Tensor,
    stencils: list[int],
    dilation: list[int],
    kernel_size: list[int],
    unit_diagonal: bool,
    repeats: int = 1,
) -> tuple[Tensor, int]:
    size = info.batch_size
    inputs, grads = (_into_channels(_mapped_first(t, d, size)) for t, d in zip((input, grad), in_dims, strict=False))
    output = weight_gradient(inputs, grads, stencils, dilation, kernel_size, unit_diagonal, repeats * size)
    return output.unflatten(0, (size, -1)), 0


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_channels(images: Tensor) -> Tensor:
    return images.transpose(0, 1).flatten(1, 2)


for _name, _operator, _function, _vmap, _flops in (
    ("conv", conv, _Conv, _batched_operator(conv), _operator_flops),
    ("solve", solve, _Solve, _batched_operator(solve), _operator_flops),
    ("weight_gradient", weight_gradient, _WeightGradient, _batched_weight_gradient, _weight_gradient_flops),
):
    _library.impl(_name, _checked(_name, _run), "CompositeExplicitAutograd")
    _library.impl(_name, _differentiable(_name, _operator, _function), "Autograd")
    torch.library.register_fake(_operator.name(), _checked(_name, _fake), lib=_library)
    torch.library.register_vmap(_operator.name(), _vmap, lib=_library)
    # Two operations per multiply-add, including those on the padding, as for F.conv2d.
    register_flop_formula(_operator.overloadpacket)(_flops)

_library.impl("exported_conv", _exported_conv, "CompositeImplicitAutograd")
