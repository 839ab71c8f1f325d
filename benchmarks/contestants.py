"""The compared functions: the layer, and its forward as written without this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain_backend
from benchmarks.workloads import Case, InverseCase
from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d, functional, use_backend

Contestants = dict[str, Callable[[], object]]

# (left, right, top, bottom), for a 3 x 3 kernel
PADDING = {"TL": (2, 0, 2, 0), "TR": (0, 2, 2, 0), "BL": (2, 0, 0, 2), "BR": (0, 2, 0, 2)}


def pad_conv_cat(x: Tensor, weight: Tensor, corners: Sequence[str]) -> Tensor:
    """Returns the layer's forward without this package: F.pad and F.conv2d for each group, then torch.cat."""
    if len(corners) == 1:
        return F.conv2d(F.pad(x, PADDING[corners[0]]), weight)
    groups = zip(x.chunk(len(corners), 1), weight.chunk(len(corners)), corners, strict=True)
    return torch.cat([F.conv2d(F.pad(group, PADDING[corner]), w) for group, w, corner in groups], 1)


def for_curve(case: Case, device: str) -> tuple[Contestants, Tensor, Tensor]:
    """Returns F.conv2d and the inverse, with images [B, C, H, W] and a weight [C, C/G, 3, 3]."""
    weight = InvertibleConv2d(case.shape[0], corners=case.corners).to(device).weight.detach()
    x = torch.randn(case.batch, *case.shape, device=device)
    contestants: Contestants = {
        "conv2d": lambda: pad_conv_cat(x, weight, case.corners),
        "inverse": lambda: functional.conv2d_inverse(x, weight, corners=case.corners),
    }
    return contestants, x, weight


def for_table(case: Case, device: str) -> Contestants:
    """Returns all contestants of a table's row: F.conv2d, the inverse, the forward, and each with its backward.

    "With its backward" means the function and its gradients in input and weight.
    """
    contestants, x, weight = for_curve(case, device)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def with_backward(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves, corners=case.corners), leaves, x)

    return contestants | {
        "forward": lambda: functional.conv2d(x, weight, corners=case.corners),
        "conv2d_backward": with_backward(pad_conv_cat),
        "inverse_backward": with_backward(functional.conv2d_inverse),
        "forward_backward": with_backward(functional.conv2d),
    }


def for_race(case: Case, device: str) -> Contestants:
    """Returns `for_table` and the layer's contestants on the plain backend, as an alternative to the kernels."""
    contestants = for_table(case, device)
    plain_backend.register_last()

    def plainly(run: Callable[[], object]) -> object:
        with use_backend(plain_backend.NAME):
            return run()

    ours = {name: run for name, run in contestants.items() if not name.startswith("conv2d")}
    return contestants | {f"plain_{name}": partial(plainly, run) for name, run in ours.items()}


def for_inverse(case: InverseCase) -> Contestants:
    """Returns the inverse, for any stencil, dimension and dilation, and torch's convolution for the same layer."""
    dimensions, count = len(case.kernel_size), len(case.corners)
    kinds = {1: InvertibleConv1d, 2: InvertibleConv2d, 3: InvertibleConv3d}
    layer = kinds[dimensions](case.shape[0], case.kernel_size, corners=case.corners, dilation=case.dilation)
    weight = layer.weight.detach()
    x = torch.randn(case.batch, *case.shape)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    inverse = {1: functional.conv1d_inverse, 2: functional.conv2d_inverse, 3: functional.conv3d_inverse}[dimensions]
    # For one corner, because the position of the border does not affect the time.
    padding = [case.dilation * amount for size in reversed(case.kernel_size) for amount in (size - 1, 0)]

    def conv() -> Tensor:
        groups = zip(x.chunk(count, 1), weight.chunk(count), strict=True)
        outputs = [convolution(F.pad(group, padding), w, dilation=case.dilation) for group, w in groups]
        return torch.cat(outputs, 1) if count > 1 else outputs[0]

    return {"conv": conv, "inverse": lambda: inverse(x, weight, corners=case.corners, dilation=case.dilation)}


def multiply_adds(case: InverseCase) -> int:
    """Counts the multiply-adds of the inverse, with the border and without masked taps; equal for all corners."""
    taps = math.prod(case.kernel_size)
    if case.corners[0] in ("T", "B", "L", "R") and len(case.kernel_size) == 2:  # the pivot is in the middle of a row
        width = case.kernel_size[case.corners[0] in ("T", "B")]
        taps -= width - 1 - (width - 1) // 2
    channels, *sizes = case.shape
    return case.batch * math.prod(sizes) * channels * (channels // len(case.corners)) * taps


def for_host(case: Case, device: str) -> Contestants:
    """Returns torch.add into an output, and calls of the layer as a function and as a module."""
    layer = InvertibleConv2d(case.shape[0], corners=case.corners).to(device)
    weight = layer.weight.detach()
    x = torch.randn(case.batch, *case.shape, device=device)
    output = torch.empty_like(x)
    return {
        "torch.add": lambda: torch.add(x, x, out=output),
        "forward": lambda: functional.conv2d(x, weight, corners=case.corners),
        "inverse": lambda: functional.conv2d_inverse(x, weight, corners=case.corners),
        "module_forward": lambda: layer(x),
        "module_inverse": lambda: layer.inverse(x),
    }
