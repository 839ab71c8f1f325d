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


def _conv(call: OperatorCall) -> Tensor:
    input, dimensions, count = call.input, call.dimensions, len(call.stencils)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    weight, stencils = _effective(call), list(call.stencils)
    if call.log_diagonal is not None:
        _check_diagonal(weight, stencils)
    if call.transpose:
        axes = list(range(-dimensions, 0))
        weight = weight.unflatten(0, (count, -1)).transpose(1, 2).flip(axes).flatten(0, 1)
        stencils = [stencil.opposite(code, dimensions) for code in stencils]
    shape = count, input.shape[1] // count
    images, kernels, results = input.to(weight.dtype), weight.unflatten(0, shape), output.unflatten(1, shape)
    biases = None if call.bias is None else call.bias.to(weight.dtype).unflatten(0, shape)
    with in_own_precision(input.device):
        for code, groups in _by_stencil(stencils).items():
            x, w = stencil.pad(_of_groups(images, groups, count), code, weight.shape[2:]), kernels[groups]
            b = None if biases is None else biases[groups].flatten()
            y = _CONVOLUTIONS[dimensions](x, w.flatten(0, 1), b, groups=len(w))
            results[:, groups] = y.unflatten(1, (-1, shape[1])).to(output.dtype)
    return output


def _solve(call: OperatorCall) -> Tensor:
    input, dimensions, stencils = call.input, call.dimensions, call.stencils
    if input.numel() == 0:
        return torch.empty_like(input)
    weight = _effective(call)
    _check_diagonal(weight, stencils)
    rhs = input.to(weight.dtype)
    if call.bias is not None:
        rhs = rhs - call.bias.to(weight.dtype).view(-1, *[1] * dimensions)
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
    input, grad, stencils, kernel_size = call.input, call.other, call.stencils, list(call.kernel_size)
    channels, count = input.shape[1], len(stencils)
    per_group = channels // count
    if input.numel() == 0:
        return input.new_zeros(channels, per_group, *kernel_size)
    dtype = torch.promote_types(input.dtype, torch.float32)
    images, grads = input.to(dtype), grad.to(dtype)
    gradient = input.new_empty(channels, per_group, *kernel_size, dtype=dtype)
    results = gradient.unflatten(0, (count, per_group))
    with in_own_precision(input.device):
        for code, groups in _by_stencil(stencils).items():
            x, g = stencil.pad(_of_groups(images, groups, count), code, kernel_size), _of_groups(grads, groups, count)
            number, shape_only = g.shape[1] // per_group, gradient.narrow(0, 0, g.shape[1])
            # Takes two thirds of the time of `torch.nn.grad.conv2d_weight` for a small image.
            options = [1], [0], [1], False, [0], number, [False, True, False]
            w = torch.ops.aten.convolution_backward(g, x, shape_only, None, *options)[1]
            results[groups] = w.view(number, *results.shape[1:])
    masked = _mask(gradient.shape, tuple(stencils), input.device, call.unit_diagonal)
    return gradient.masked_fill_(masked, 0).to(input.dtype, memory_format=torch.contiguous_format)


def _log_abs_det(call: OperatorCall) -> Tensor:
    pixels = call.input[0, 0].numel() * (-1 if call.transpose else 1)
    dtype = torch.promote_types(call.input.dtype, torch.float32)
    return call.input[:, :, 0, 0].sum(1, dtype=dtype) * pixels


def _by_stencil(stencils: Sequence[int]) -> dict[int, slice | list[int]]:
    """Returns the groups of each stencil, for one grouped convolution each; a slice if possible, which gives views."""
    found: dict[int, slice | list[int]] = {}
    for code in set(stencils):
        groups = [group for group, own in enumerate(stencils) if own == code]
        spaced = range(groups[0], groups[-1] + 1, groups[1] - groups[0] if len(groups) > 1 else 1)
        found[code] = slice(spaced.start, spaced.stop, spaced.step) if list(spaced) == groups else groups
    return found


def _of_groups(images: Tensor, groups: slice | list[int], count: int) -> Tensor:
    """Returns the channels of some of `count` groups; adjacent ones as a view, which is also the fastest."""
    if isinstance(groups, slice) and groups.step == 1:
        per_group = images.shape[1] // count
        return images.narrow(1, groups.start * per_group, (groups.stop - groups.start) * per_group)
    return images.unflatten(1, (count, -1))[:, groups].flatten(1, 2)


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
