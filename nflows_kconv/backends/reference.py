"""The operators in plain PyTorch: the executable specification, and a backend for every stencil, dimension and device.

For one group in the canonical frame of its stencil, with the image zero outside its borders (FInC Flow, Kallappa,
Nagar, Varma 2023, arXiv 2301.09266, section 3):

    y[o, p] = sum_{i, l} W[o, i, l] x[i, p - l]        l: the lags of the taps, see `stencil`

`conv` computes y from x, `solve` x from y. A pixel depends only on pixels with smaller tau . p, so `solve` takes one
step per value of tau . p: H + W - 1 for a corner (see `products`). The transposed operator has the same lags in the
opposite stencil, with c_in and c_out exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import polyphase, products
from nflows_kconv.backends.registry import OperatorCall
from nflows_kconv.torch_internals import has_autocast, is_any_autocast_on

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def why_not(call: OperatorCall) -> None:
    """Returns None, because it runs every call."""


def run(call: OperatorCall) -> Tensor:
    """Returns the result of a call.

    Returns:
        For "conv" and "solve", a tensor with shape, dtype and memory format of the input; for "weight_gradient", a
        contiguous weight. Half precision is computed in float32 and rounded once, after the bias.

    Raises:
        ValueError: On the CPU, if an entry of the pivot's diagonal is zero or not finite, for a solution or with a
            log_diagonal.
    """
    if call.dilated:
        return polyphase.run(call, run)
    operations = {"conv": _conv, "solve": _solve, "weight_gradient": _weight_gradient, "log_abs_det": _log_abs_det}
    return operations[call.operation](call)


def convolve(call: OperatorCall, repeats: int) -> Tensor:
    """Computes A x + b by torch's convolutions, one per stencil; the groups cycle through the stencils `repeats` times.

    One trace of it serves all sizes from 1 and any number of repeats.
    """
    weight, count, dimensions = _effective(call), len(call.stencils), call.dimensions
    outputs: list[Tensor] = []
    images, kernels = _split(call.input.to(weight.dtype), 1, count, repeats), _split(weight, 0, count, repeats)
    for x, w, code in zip(images, kernels, call.stencils, strict=True):
        if call.transpose:
            w = w.unflatten(0, (repeats, -1)).transpose(1, 2).flip([*range(3, 3 + dimensions)]).flatten(0, 1)
            code = stencil.opposite(code, dimensions)
        x = stencil.pad(x, code, call.kernel_size, call.dilation)
        outputs.append(_CONVOLUTIONS[dimensions](x, w, dilation=list(call.dilation) or 1, groups=repeats))
    output = _join(outputs, 1, repeats)
    if call.bias is not None:
        output = output + _on_pixels(call.bias.to(weight.dtype), dimensions)
    return output.to(call.input.dtype)


def _conv(call: OperatorCall) -> Tensor:
    output = torch.empty_like(call.input)
    if output.numel() == 0:
        return output
    if call.log_diagonal is not None:
        _check_diagonal(_effective(call), call.stencils)
    stencils, repeats = stencil.cycle(tuple(call.stencils))
    with in_own_precision(output.device):
        return output.copy_(convolve(call._replace(stencils=stencils), repeats))


def _solve(call: OperatorCall) -> Tensor:
    input, dimensions, stencils = call.input, call.dimensions, call.stencils
    if input.numel() == 0:
        return torch.empty_like(input)
    weight = _effective(call)
    _check_diagonal(weight, stencils)
    rhs = input.to(weight.dtype)
    if call.bias is not None:
        rhs = rhs - _on_pixels(call.bias.to(weight.dtype), dimensions)
    output = torch.empty_like(input)
    images, outputs, kernels = rhs.chunk(len(stencils), 1), output.chunk(len(stencils), 1), weight.chunk(len(stencils))
    substitute = products.substitute if dimensions == 2 else _substitute
    frames = [stencil.opposite(code, dimensions) if call.transpose else code for code in stencils]
    for family in {stencil.family(code) for code in stencils}:
        members = [group for group, code in enumerate(stencils) if stencil.family(code) == family]
        y = torch.stack([stencil.canonical(images[g], frames[g], dimensions) for g in members], 1)
        taps = torch.stack([stencil.canonical(kernels[g], stencils[g], dimensions) for g in members])
        lags = stencil.lags(family, weight.shape[2:])
        with in_own_precision(input.device):
            x = substitute(y, taps.flatten(3)[..., : len(lags)], lags, call.transpose)
        for index, g in enumerate(members):
            outputs[g].copy_(stencil.from_canonical(x[:, index], frames[g], dimensions))
    return output


def _substitute(y: Tensor, taps: Tensor, lags: Sequence[Sequence[int]], transpose: bool) -> Tensor:
    """Does `products.substitute` in any dimension: y [B, G, C/G, ...], taps [G, C/G, C/G, lags], the pivot last."""
    if transpose:
        taps = taps.transpose(1, 2)
    pivot, others = taps[..., -1], taps[..., :-1]
    sizes, offsets = y.shape[3:], torch.tensor(lags[:-1], dtype=torch.long, device=y.device).view(-1, len(lags[0]))
    before = [max(0, *axis) for axis in zip(*lags, (0,) * len(sizes), strict=True)]
    after = [max(0, *(-lag for lag in axis)) for axis in zip(*lags, (0,) * len(sizes), strict=True)]
    x = F.pad(torch.zeros_like(y), [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])

    pixels = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
    times = pixels @ torch.tensor(stencil.schedule(lags) or (0,) * len(sizes))
    counts = torch.unique(times, return_counts=True)[1].tolist()
    for step in pixels[times.argsort(stable=True)].to(y.device).split(counts):
        place = (..., *step.unbind(1))
        there = [h + b for h, b in zip(step.unbind(1), before, strict=True)]
        read = (..., *(t - offset[:, None] for t, offset in zip(there, offsets.unbind(1), strict=True)))
        known = torch.einsum("goit,bgitp->bgop", others, x[read])
        left = (y[place] - known).permute(1, 2, 0, 3).flatten(2)  # [G, C/G, B * pixels]
        solved = torch.linalg.solve_triangular(pivot, left, upper=transpose)
        padded = (..., *there)
        x[padded] = solved.unflatten(2, (len(y), -1)).permute(2, 0, 1, 3)
    for axis, (start, size) in enumerate(zip(before, sizes, strict=True), 3):
        x = x.narrow(axis, start, size)
    return x


def _weight_gradient(call: OperatorCall) -> Tensor:
    input, kernel_size, channels = call.input, call.kernel_size, call.input.shape[1]
    per_group = channels // len(call.stencils)
    if input.numel() == 0:
        return input.new_zeros(channels, per_group, *kernel_size)
    dtype = torch.promote_types(input.dtype, torch.float32)
    stencils, repeats = stencil.cycle(tuple(call.stencils))
    images, grads = (_split(each.to(dtype), 1, len(stencils), repeats) for each in (input, call.other))
    weight = input.new_empty(1, dtype=dtype).expand(
        repeats * per_group, per_group, *kernel_size
    )  # only its shape matters
    gradients = []
    with in_own_precision(input.device):
        for x, g, code in zip(images, grads, stencils, strict=True):
            # Takes two thirds of the time of `torch.nn.grad.conv2d_weight` for a small image.
            options = [1], [0], [1], False, [0], repeats, [False, True, False]
            x = stencil.pad(x, code, kernel_size)
            gradients.append(torch.ops.aten.convolution_backward(g, x, weight, None, *options)[1])
    gradient = _join(gradients, 0, repeats)
    masked = _mask(gradient.shape, tuple(call.stencils), input.device, call.unit_diagonal)
    return gradient.masked_fill_(masked, 0).to(input.dtype, memory_format=torch.contiguous_format)


def _log_abs_det(call: OperatorCall) -> Tensor:
    pixels = call.input[0, 0].numel() * (-1 if call.transpose else 1)
    dtype = torch.promote_types(call.input.dtype, torch.float32)
    return call.input[:, :, 0, 0].sum(1, dtype=dtype) * pixels


def _split(tensor: Tensor, dim: int, count: int, repeats: int) -> tuple[Tensor, ...]:
    """Splits groups of channels that cycle through `count` stencils into the groups of each stencil."""
    if count == 1:
        return (tensor,)
    return tensor.unflatten(dim, (repeats, count, -1)).transpose(dim, dim + 1).flatten(dim + 1, dim + 2).unbind(dim)


def _join(tensors: list[Tensor], dim: int, repeats: int) -> Tensor:
    """Undoes `_split`."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack(tensors, dim).unflatten(dim + 1, (repeats, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def _on_pixels(channels: Tensor, dimensions: int) -> Tensor:
    return channels.view(-1, *[1] * dimensions)


def _mask(shape: torch.Size, stencils: tuple[int, ...], device: torch.device, diagonal: bool) -> Tensor:
    # A mask from inside the capture of a CUDA graph has no values before a replay, so only the CPU's are cached.
    return (_mask_on_cpu if device.type == "cpu" else _new_mask)(shape, stencils, device, diagonal)


def _new_mask(shape: torch.Size, stencils: tuple[int, ...], device: torch.device, diagonal: bool) -> Tensor:
    with torch.inference_mode(False):
        return stencil.masked_entries(shape, stencils, device, diagonal=diagonal)


_mask_on_cpu = lru_cache(maxsize=32)(_new_mask)  # making one takes as long as the rest of a small gradient


def _check_diagonal(weight: Tensor, stencils: Sequence[int]) -> None:
    if weight.device.type == "cpu":  # on other devices reading the values would synchronize
        stencil.check_diagonal(stencil.pivot_diagonal(weight, stencils))


def _effective(call: OperatorCall) -> Tensor:
    """Returns the effective weight, in float32 at least."""
    dtype = torch.promote_types(call.other.dtype, torch.float32)
    log_diagonal = None if call.log_diagonal is None else call.log_diagonal.to(dtype)
    return stencil.effective(call.other.to(dtype), call.stencils, log_diagonal, call.unit_diagonal)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast inside this context, on devices that have it."""
    is_off = not torch.compiler.is_compiling() and not is_any_autocast_on()  # a graph may run where it is on
    return nullcontext() if is_off or not has_autocast(device.type) else torch.autocast(device.type, enabled=False)


@contextmanager
def in_own_precision(device: torch.device) -> Iterator[None]:
    """Disables autocast and TF32 inside this context; for a graph, which runs later, only autocast."""
    settings: tuple[Any, ...] = ()
    if device.type == "cuda" and not torch.compiler.is_compiling():
        # Not allow_tf32, which raises an error if the user has set this newer name of it.
        settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with without_autocast(device):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
