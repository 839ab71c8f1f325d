"""The primitive in plain PyTorch: the executable specification, and the implementation for devices without a kernel.

For one group in corner TL, with the image zero outside its borders (FInC Flow, Kallappa, Nagar, Varma 2023,
arXiv 2301.09266, section 3):

    y[o, h, w] = sum_{i, a, b} W[o, i, a, b] x[i, h - (kh-1-a), w - (kw-1-b)]

`conv` computes y from x, `solve` x from y. The pixels of an anti-diagonal h + w = d depend on earlier anti-diagonals
alone, so that `solve` takes H + W - 1 steps. The transposed operator is the same one with c_in and c_out exchanged, the
kernel turned by 180 degrees and the opposite corner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from nflows_kconv import geometry


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, corners: Sequence[int], transpose: bool) -> Tensor:
    """y = A x + b, or y = A^T x + b; the arguments are those of `solve`."""
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    weight, corners, _ = _operator(weight, corners, transpose)
    count, dtype = len(corners), weight.dtype
    biases = [None] * count if bias is None else bias.to(dtype).chunk(count)
    groups = zip(input.to(dtype).chunk(count, 1), weight.chunk(count), biases, corners, strict=True)
    with _in_own_precision(input.device):
        outputs = [F.conv2d(F.pad(x, geometry.padding(corner, w.shape[-2:])), w, b) for x, w, b, corner in groups]
    return output.copy_(torch.cat(outputs, 1))


def solve(input: Tensor, weight: Tensor, bias: Tensor | None, corners: Sequence[int], transpose: bool) -> Tensor:
    """x = A^-1 (y - b), or x = A^-T (y - b), one anti-diagonal a step.

    Args:
        input: y, [B, C, H, W].
        weight: [C, C/G, kh, kw]; the pivot's entries with c_in > c_out count as zero.
        bias: b, [C], or None.
        corners: One corner a group.
        transpose: Whether A^T stands for A.

    Returns:
        x, with the shape, dtype and memory format of y. Half precision is computed in float32 and rounded once, bias
        included.

    Raises:
        ValueError: If the pivot's diagonal has an entry that is zero or not finite.
    """
    batch, _, height, width = input.shape
    if input.device.type == "cpu":  # elsewhere the look at the values would wait for the device
        geometry.check_diagonal(geometry.pivot_diagonal(weight, corners))
    weight, corners, upper = _operator(weight, corners, transpose)
    groups, (rows, columns) = len(corners), weight.shape[-2:]
    rhs = input.to(weight.dtype)
    if bias is not None:
        rhs = rhs - bias.to(weight.dtype).view(-1, 1, 1)

    # Every group mirrored to corner TL, whose pivot is the last tap; groups and their channels are dimensions 1 and 2.
    y = torch.stack([_flip(g, c) for g, c in zip(rhs.chunk(groups, 1), corners, strict=True)], 1)
    taps = torch.stack([_flip(w, c) for w, c in zip(weight.chunk(groups), corners, strict=True)]).flatten(-2)
    pivot, others = taps[..., -1], taps[..., :-1]
    tap_row = torch.arange(rows, device=input.device).repeat_interleave(columns)[:-1, None]
    tap_column = torch.arange(columns, device=input.device).repeat(rows)[:-1, None]

    x = F.pad(torch.zeros_like(y), (columns - 1, 0, rows - 1, 0))
    solved = x[..., rows - 1 :, columns - 1 :]
    with _in_own_precision(input.device):
        for diagonal in range(height + width - 1 if y.numel() else 0):
            h = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=input.device)
            w = diagonal - h
            neighbours = x[..., h + tap_row, w + tap_column]  # [B, G, C/G, taps, pixels]
            known = torch.einsum("goit,bgitp->bgop", others, neighbours)
            left = (y[..., h, w] - known).permute(1, 2, 0, 3).flatten(2)  # [G, C/G, B * pixels]
            pixels = torch.linalg.solve_triangular(pivot, left, upper=upper)
            solved[..., h, w] = pixels.unflatten(2, (batch, len(h))).permute(2, 0, 1, 3)

    mirrored = [_flip(solved[:, group], corner) for group, corner in enumerate(corners)]
    return torch.empty_like(input).copy_(torch.cat(mirrored, 1))


def weight_gradient(input: Tensor, grad: Tensor, corners: Sequence[int], kernel_size: Sequence[int]) -> Tensor:
    """The gradient of <grad, A input> in the weight, zero where the weight counts as zero.

    Args:
        input: x, [B, C, H, W].
        grad: The gradient of the output, [B, C, H, W].
        corners: One corner a group.
        kernel_size: (kh, kw).

    Returns:
        [C, C/G, kh, kw], in the dtype of the input.
    """
    channels, count = input.shape[1], len(corners)
    per_group = channels // count
    shape = (channels, per_group, *kernel_size)
    if input.numel() == 0:
        return input.new_zeros(shape)
    dtype = torch.promote_types(input.dtype, torch.float32)
    groups = zip(input.to(dtype).chunk(count, 1), grad.to(dtype).chunk(count, 1), corners, strict=True)
    with _in_own_precision(input.device):
        gradients = [
            conv2d_weight(F.pad(x, geometry.padding(corner, kernel_size)), (per_group, *shape[1:]), g)
            for x, g, corner in groups
        ]
    masked = geometry.masked_entries(shape, corners, input.device)
    gradient = torch.cat(gradients).masked_fill_(masked, 0)
    return gradient.to(input.dtype, memory_format=torch.contiguous_format)


def _operator(weight: Tensor, corners: Sequence[int], transpose: bool) -> tuple[Tensor, Sequence[int], bool]:
    """The weight of A or A^T in at least float32 without its masked entries, its corners, is the pivot upper?"""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.masked_fill(geometry.masked_entries(weight.shape, corners, weight.device), 0)
    if not transpose:
        return weight, corners, False
    grouped = weight.unflatten(0, (len(corners), -1))
    transposed = grouped.transpose(1, 2).flip(-2, -1).flatten(0, 1)
    return transposed, [geometry.opposite(corner) for corner in corners], True


def _flip(tensor: Tensor, corner: int) -> Tensor:
    return tensor.flip(geometry.flipped_dims(corner))


@contextmanager
def _in_own_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 reaches what is computed inside."""
    settings: tuple[Any, ...] = ()
    if device.type == "cuda":
        # Not allow_tf32, which raises an error where somebody else has set this newer name of it.
        settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        has_autocast = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
