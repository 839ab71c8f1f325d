"""The layer as functions of tensors: a convolution with a triangular Jacobian, its inverse and its log-determinant.

The one place where arguments are checked. See `geometry` for corners and pivots, and `reference` for the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from nflows_kconv import checks, geometry, ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def conv2d(input: Tensor, weight: Tensor, corners: str | Sequence[str], bias: Tensor | None = None) -> Tensor:
    """Convolves each channel group with its kernel, padded towards the group's corner.

    For each group g: y_g = F.conv2d(F.pad(x_g, padding of the corner), weight_g) + bias_g, where the pivot's entries
    with c_in > c_out count as zero. FInC Flow (Kallappa, Nagar, Varma 2023, arXiv 2301.09266), section 3.
    Differentiable any number of times in input, weight and bias.

    Args:
        input: x, [B, C, H, W], any strides; float32, float64, float16 or bfloat16. B, H and W may be 0.
        weight: [C, C/G, kh, kw] as `torch.nn.functional.conv2d` takes it with G groups, in the dtype of the input.
        corners: One of "TL", "TR", "BL", "BR" for each of the G groups, or a single one.
        bias: [C], added to each channel.

    Returns:
        y, [B, C, H, W], in the dtype and memory format of the input. Half precision accumulates in float32 and rounds
        once, bias included. Under autocast the layer computes in, and returns, float32.

    Raises:
        TypeError: If an argument is no dense floating-point tensor, or the dtypes differ.
        ValueError: If shapes, devices or corners do not fit.
    """
    groups = _check_arguments(input, weight, corners, bias)
    return ops.call(ops.conv, input, weight, bias, groups)


def conv2d_inverse(input: Tensor, weight: Tensor, corners: str | Sequence[str], bias: Tensor | None = None) -> Tensor:
    """The exact inverse of `conv2d`: the x with conv2d(x, weight, corners, bias) = input.

    Back-substitution pixel by pixel, in O(H W C^2/G kh kw) operations an image. Differentiable any number of times in
    input, weight and bias (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634): with g = dL/dx and u = A^-T g,
    dL/dinput = u and dL/dweight is minus the weight gradient of the convolution at (x, u).

    Args:
        input: y, [B, C, H, W], as in `conv2d`.
        weight: [C, C/G, kh, kw], as in `conv2d`.
        corners: As in `conv2d`.
        bias: [C], subtracted before the solution.

    Returns:
        x, [B, C, H, W], in the dtype and memory format of the input.

    Raises:
        TypeError: As in `conv2d`.
        ValueError: As in `conv2d`; and, on the CPU, if an entry of the pivot's diagonal or its reciprocal is zero or
            not finite. Elsewhere that look would wait for the device: infinities and NaNs come out.
    """
    groups = _check_arguments(input, weight, corners, bias)
    return ops.call(ops.solve, input, weight, bias, groups)


def log_abs_det(weight: Tensor, corners: str | Sequence[str], height: int, width: int) -> Tensor:
    """The log-determinant of `conv2d`'s Jacobian for one image: H W sum_o log |W[o, o, pivot]|.

    Args:
        weight: [C, C/G, kh, kw], as in `conv2d`.
        corners: As in `conv2d`.
        height: H, rows of the image.
        width: W, columns of the image.

    Returns:
        A scalar in the weight's dtype, float32 at least.

    Raises:
        TypeError: If the weight is no dense floating-point tensor, or the height or the width no integer.
        ValueError: If the weight's shape, the corners, the height or the width do not fit, or (checked on the CPU
            alone) an entry of the pivot's diagonal or its reciprocal is zero or not finite.
    """
    groups = _check_weight(weight, corners)
    height, width = _integer("height", height), _integer("width", width)
    if height < 0 or width < 0:
        raise ValueError(f"height and width must not be negative, got {height} and {width}")
    if height * width >= 2**63:
        raise ValueError(f"an image must have fewer than 2**63 pixels, got {height} x {width}")
    diagonal = geometry.pivot_diagonal(weight, groups)
    check_diagonal(diagonal)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return height * width * diagonal.to(dtype).abs().log().sum()


def check_diagonal(diagonal: Tensor) -> None:
    """Raises a ValueError unless the diagonal has an inverse, see `geometry`, where its values are at hand."""
    if checks.values_are_at_hand(diagonal):
        geometry.check_diagonal(diagonal)


# These run at every call, so that a tensor's shape, which costs as much as the rest of a check, is asked for once.
def _check_arguments(input: Tensor, weight: Tensor, corners: str | Sequence[str], bias: Tensor | None) -> list[int]:
    _check_tensor("input", input)
    groups = _check_weight(weight, corners)
    shape, channels = input.shape, weight.size(0)
    if len(shape) != 4:
        raise ValueError(f"input must have the 4 dimensions [B, C, H, W], got shape {tuple(shape)}")
    if shape[1] != channels:
        raise ValueError(f"input must have the weight's {channels} channels, got {shape[1]} in shape {tuple(shape)}")
    _check_match("weight", weight, input)
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.shape != (channels,):
            raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
        _check_match("bias", bias, input)
    return groups


def _check_weight(weight: Tensor, corners: str | Sequence[str]) -> list[int]:
    _check_tensor("weight", weight)
    groups = geometry.parse_corners(corners)
    shape = weight.shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(
            f"weight must have the 4 dimensions [C, C/G, kh, kw], none of them 0, got shape {tuple(shape)}"
        )
    if shape[0] != shape[1] * len(groups):
        raise ValueError(f"weight must have shape [C, C/G, kh, kw] with G = {len(groups)} corners, got {tuple(shape)}")
    return groups


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _integer(name: str, value: int) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)  # NumPy's would overflow in silence


def _check_match(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"input and {name} must be on one device, got {input.device} and {tensor.device}")
    if tensor.dtype != input.dtype and not _autocast_unites(tensor, input):
        raise TypeError(f"input and {name} must have one dtype, got {input.dtype} and {tensor.dtype}")


def _autocast_unites(*tensors: Tensor) -> bool:
    return ops.autocast_is_on(tensors[0]) and all(tensor.dtype != torch.float64 for tensor in tensors)
