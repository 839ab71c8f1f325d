"""The layers as functions of tensors: convolutions with a triangular Jacobian, their inverses and log-determinants.

Only this module checks users' arguments. See `stencil` for corners, sides and pivots, and `ops` for the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from nflows_kconv import checks, ops, stencil
from nflows_kconv.backends import registry
from nflows_kconv.torch_internals import is_exporting_to_onnx, is_under_vmap, is_unobserved

_KERNEL_AXES = {1: ("k",), 2: ("kh", "kw"), 3: ("kd", "kh", "kw")}


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves each channel group with its kernel, padded to read its corner or side.

    For each group g: y_g = F.conv2d(F.pad(x_g, padding of the stencil), weight_g, bias_g, dilation=dilation), where
    masked entries count as zero: those of the pivot with c_in > c_out, and for sides the taps after the pivot in its
    own row (see `InvertibleConv2d`). FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), section 3.
    Differentiable any number of times in input, weight and bias.

    Args:
        input: x, [B, C, H, W], with any strides; float32, float64, float16 or bfloat16. B, H and W may be 0.
        weight: [C, C/G, kh, kw] as `torch.nn.functional.conv2d` takes it with G groups, in the dtype of the input.
        bias: [C], added to each channel.
        corners: What each of the G groups reads, or a single name: "TL", "TR", "BL", "BR", "T", "B", "L" or "R".
        dilation: Pixels from one tap to the next, one number or one for each axis.

    Returns:
        y, [B, C, H, W], in the dtype and memory format of the input. Half precision accumulates in float32 and rounds
        once, after the bias. Under autocast float32 is computed and returned.

    Raises:
        TypeError: If a tensor is not dense and floating-point, dtypes differ, or corners or dilation have a wrong type.
        ValueError: If shapes, devices, names or dilation do not fit.
    """
    return _from_tensors("conv", 2, input, weight, bias, corners, dilation)


def conv2d_inverse(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Computes the exact inverse of `conv2d`: the x with conv2d(x, weight, bias, ...) = input.

    Substitutes back pixel by pixel, in O(H W C^2/G kh kw) operations per image. Differentiable any number of times in
    input, weight and bias (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634): with g = dL/dx and u = A^-T g, dL/dinput
    = u, and dL/dweight is minus the weight gradient of the convolution at (x, u).

    Args:
        input: y, [B, C, H, W], as in `conv2d`.
        weight: [C, C/G, kh, kw], as in `conv2d`.
        bias: [C], subtracted from the input before solving.
        corners: As in `conv2d`.
        dilation: As in `conv2d`.

    Returns:
        x, [B, C, H, W], in the dtype and memory format of the input.

    Raises:
        TypeError: As in `conv2d`.
        ValueError: As in `conv2d`; and, on the CPU, if an entry of the pivot's diagonal or its reciprocal is zero or
            not finite. On other devices the check would have to synchronize, so the result has infinities or NaNs
            instead.
    """
    return _from_tensors("solve", 2, input, weight, bias, corners, dilation)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves [B, C, L] with weights [C, C/G, k] as `conv2d` does; corners are "L" (reads to the left) and "R"."""
    return _from_tensors("conv", 1, input, weight, bias, corners, dilation)


def conv1d_inverse(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Computes the exact inverse of `conv1d`; see `conv2d_inverse`."""
    return _from_tensors("solve", 1, input, weight, bias, corners, dilation)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves volumes [B, C, D, H, W] with weights [C, C/G, kd, kh, kw] as `conv2d` does; corners are "NTL" to "FBR".

    The first letter is for the first axis: N (near) reads planes of smaller index, F (far) planes of larger index.
    """
    return _from_tensors("conv", 3, input, weight, bias, corners, dilation)


def conv3d_inverse(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    corners: str | Sequence[str],
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Computes the exact inverse of `conv3d`; see `conv2d_inverse`."""
    return _from_tensors("solve", 3, input, weight, bias, corners, dilation)


def log_abs_det(weight: Tensor, *, corners: str | Sequence[str], size: Sequence[int]) -> Tensor:
    """Computes log |det| of a convolution's Jacobian for one image: (number of pixels) sum_o log |W[o, o, pivot]|.

    Args:
        weight: [C, C/G, k], [C, C/G, kh, kw] or [C, C/G, kd, kh, kw], as in `conv1d`, `conv2d` or `conv3d`.
        corners: As there.
        size: Of the image: (L,), (H, W) or (D, H, W).

    Returns:
        A scalar in the weight's dtype, float32 at least.

    Raises:
        TypeError: If the weight is not a dense floating-point tensor, or a size is not an integer.
        ValueError: If the weight's shape, the names or the size do not fit, or (checked only on the CPU) an entry of
            the pivot's diagonal or its reciprocal is zero or not finite.
    """
    check_tensor("weight", weight)
    dimensions = weight.dim() - 2
    if dimensions not in stencil.AXES:
        raise ValueError(f"weight must have 3, 4 or 5 dimensions, [C, C/G, ...], got shape {tuple(weight.shape)}")
    stencils = stencil.parse(corners, dimensions)
    _check_weight(weight, len(stencils), dimensions)
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != dimensions:
        axes = ", ".join(stencil.AXES[dimensions])
        raise ValueError(f"size must have the {dimensions} numbers {axes} for this weight, got {size!r}")
    sizes = [_integer("size", side) for side in size]
    if any(side < 0 for side in sizes):
        raise ValueError(f"size must not be negative, got {tuple(sizes)}")
    pixels = math.prod(sizes)
    if pixels >= 2**63:
        raise ValueError(f"an image must have fewer than 2**63 pixels, got {tuple(sizes)}")
    diagonal = stencil.pivot_diagonal(weight, stencils)
    if checks.can_inspect_values(diagonal):
        stencil.check_diagonal(diagonal)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return pixels * diagonal.to(dtype).abs().log().sum()


def run(
    operation: ops.Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_diagonal: Tensor | None,
    stencils: tuple[int, ...],
    unit_diagonal: bool,
    dilation: tuple[int, ...],
    repeats: int = 1,
) -> Tensor:
    """Runs an operator on images of one to three dimensions, with the checks of `conv2d`.

    Args:
        operation: The operator of `ops`.
        input: [B, C, ...].
        weight: [C, C/G, ...].
        bias: [C], or None.
        log_diagonal: The log of the pivot's diagonal, [C], or None.
        stencils: One a group, from `stencil.parse`.
        unit_diagonal: Whether the pivot's diagonal is 1.
        dilation: One number for each axis.
        repeats: How many times the groups cycle through these stencils.
    """
    attempt = registry.attempt
    are_tensors = input is not None and weight is not None  # the backends check everything else, such as the device
    if attempt is not None and are_tensors and is_unobserved(input, weight, bias, log_diagonal):
        output = attempt(
            operation, input, weight, bias, log_diagonal, stencils * repeats, dilation, unit_diagonal, False
        )
        if output is not None:
            return output
    dimensions = len(dilation)
    check_arguments(input, weight, bias, log_diagonal, len(stencils) * repeats, dimensions)
    if dimensions == 1:  # a row of an image
        input, weight, dilation = input[:, :, None], weight[:, :, None], (1, *dilation)
    output = ops.call(operation, input, weight, bias, log_diagonal, stencils, dilation, unit_diagonal, repeats)
    return output[:, :, 0] if dimensions == 1 else output


def run_each(
    operation: ops.Operation,
    input: Tensor,
    weights: Tensor,
    log_diagonals: Tensor | None,
    stencils: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Does `run` with one weight per image, [B, C, C/G, ...], and one log-diagonal, [B, C], or a unit diagonal.

    The images are [B, C, ...], or [S, B, C, ...] for S images per weight.
    """
    batch = weights.shape[0]
    if batch == 0:
        return input + weights.sum().to(input.dtype)  # zero, and its gradients are zeros
    # Dynamo, which the exporter tries after this error, reports symbolic sizes as integers.
    is_open = isinstance(batch, torch.SymInt) or torch.compiler.is_dynamo_compiling()
    if is_open and is_exporting_to_onnx():
        raise NotImplementedError(
            "conditional layers must have a fixed batch size for export to ONNX, where a convolution has a fixed "
            "number of groups, got a dynamic batch size"
        )
    # One call computes all images, as groups of channels of one image.
    images = (input if input.dim() == len(dilation) + 3 else input[None]).flatten(1, 2)
    log_diagonal = None if log_diagonals is None else log_diagonals.flatten()
    options = stencils, log_diagonal is None, dilation, batch
    try:
        output = run(operation, images, weights.flatten(0, 1), None, log_diagonal, *options).reshape(input.shape)
    except ValueError:
        if log_diagonals is not None and checks.can_inspect_values(log_diagonals):
            dtype = torch.promote_types(log_diagonals.dtype, torch.float32)
            stencil.check_diagonal(log_diagonals.to(dtype).exp())  # names the image
        raise
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(dilation))
    if layout is not None and not is_under_vmap() and input.is_contiguous(memory_format=layout):  # vmap has none
        return output.contiguous(memory_format=layout)
    return output


def parse_dilation(dilation: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Returns one number for each axis.

    Raises:
        TypeError: If it is neither an integer nor a sequence of integers.
        ValueError: If one of them is below 1, or there is not one for each axis.
    """
    if type(dilation) is int and dilation == 1:
        return (1,) * dimensions
    return checks.per_axis("dilation", dilation, dimensions)


def _from_tensors(
    operation: ops.Operation,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    corners: str | Sequence[str],
    dilation: int | Sequence[int],
) -> Tensor:
    stencils, steps = stencil.parse(corners, dimensions), parse_dilation(dilation, dimensions)
    return run(operation, input, weight, bias, None, stencils, False, steps)


def check_context(context: Tensor, like: Tensor, count: int | None, features: int) -> None:
    """Raises a TypeError or a ValueError unless the context is [count, features], with dtype and device of `like`."""
    check_rows("context", context, count, features, like=like)


def check_rows(name: str, tensor: Tensor, count: int | None, length: int, like: Tensor) -> None:
    """Raises a TypeError or a ValueError unless it is a tensor like `like` with `count` rows (None: any number)."""
    check_tensor(name, tensor)
    shape = tensor.shape
    if len(shape) != 2 or shape[1] != length or not checks.has_rows(tensor, count):
        rows = "B" if count is None else count
        raise ValueError(f"{name} must have shape [{rows}, {length}], one row per image, got {tuple(shape)}")
    _check_match(name, tensor, like)


# The checks run at every call. Reading a tensor's shape costs as much as the rest of a check, so they read it once.
def check_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, log_diagonal: Tensor | None, groups: int, dimensions: int
) -> None:
    """Raises the errors of `conv2d` for tensors that do not fit."""
    check_tensor("input", input)
    check_tensor("weight", weight)
    _check_weight(weight, groups, dimensions)
    shape, channels = input.shape, weight.size(0)
    if len(shape) != dimensions + 2:
        axes = ", ".join(("B", "C", *stencil.AXES[dimensions]))
        raise ValueError(f"input must have the {dimensions + 2} dimensions [{axes}], got shape {tuple(shape)}")
    if shape[1] != channels:
        raise ValueError(f"input must have the weight's {channels} channels, got {shape[1]} in shape {tuple(shape)}")
    _check_match("weight", weight, input)
    for name, vector in (("bias", bias), ("log_diagonal", log_diagonal)):
        if vector is not None:
            check_tensor(name, vector)
            if vector.shape != (channels,):
                raise ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}")
            _check_match(name, vector, input)


def _check_weight(weight: Tensor, groups: int, dimensions: int) -> None:
    shape = weight.shape
    if len(shape) != dimensions + 2 or 0 in shape or shape[0] != shape[1] * groups:
        axes = ", ".join(("C", "C/G", *_KERNEL_AXES[dimensions]))
        raise ValueError(f"weight must have shape [{axes}], no size 0, for G = {groups} corners, got {tuple(shape)}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises a TypeError unless it is a dense tensor of one of the four dtypes."""
    if isinstance(tensor, Tensor) and tensor.dtype not in ops.DTYPES:
        names = ", ".join(str(dtype) for dtype in ops.DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {tensor.dtype}")
    checks.dense(name, tensor)


def _integer(name: str, value: int) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)  # a NumPy integer would overflow silently


def _check_match(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"input and {name} must be on the same device, got {input.device} and {tensor.device}")
    if tensor.dtype != input.dtype and not _autocast_unites(tensor, input):
        raise TypeError(f"input and {name} must have the same dtype, got {input.dtype} and {tensor.dtype}")


def _autocast_unites(*tensors: Tensor) -> bool:
    return ops.autocast_is_on(tensors[0]) and all(tensor.dtype != torch.float64 for tensor in tensors)
