"""Random problems, and many kinds of tensors that hold them."""

from __future__ import annotations

import math
from random import Random

import oracles
import torch
from torch import Tensor

from fuzz.oracle import STENCILS, Problem

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_NUMBERS = 3000  # per input


class Subclass(Tensor):
    """A user-defined tensor class."""


def draw_problem(random: Random, dtype: torch.dtype | None = None) -> Problem:
    """Draws a small problem; without a given dtype, in any dtype and with any floating-point values."""
    generator = torch.Generator().manual_seed(random.getrandbits(48))
    corners = tuple(random.choices(STENCILS, k=random.choice((1, 1, 1, 2, 2, 3, 4, 5))))
    per_group = random.choice((1, 1, 2, 2, 3, 4, 7, 13))
    rows, columns = (random.choice((1, 2, 2, 3, 3, 4, 6)) for _ in range(2))
    batch = random.choice((0, 1, 1, 2, 2, 3, 5, 9, 17, 33))
    height, width = (random.choice((0, 1, 1, 2, 3, 4, 5, 6, 9, 17, 35)) for _ in range(2))
    while batch * len(corners) * per_group * height * width > MOST_NUMBERS:
        batch, height, width = batch // 2, -(-height // 2), -(-width // 2)
    channels = len(corners) * per_group

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    input, weight = noise(batch, channels, height, width), noise(channels, per_group, rows, columns)
    weight *= random.choice((0.1, 0.1, 1.0)) / (per_group * rows * columns) ** 0.5
    oracles.set_diagonal(weight, corners, (0.5 + noise(channels).abs()) * torch.where(noise(channels) < 0, -1, 1))
    bias = noise(channels)
    if dtype is not None:
        return Problem(corners, input.to(dtype), weight.to(dtype), bias.to(dtype))
    dtype = random.choice((torch.float32, *DTYPES))
    input, weight, bias = input.to(dtype), weight.to(dtype), bias.to(dtype)
    if random.random() < 0.4:
        spoil(random, input)
    if random.random() < 0.25:
        spoil(random, weight)
    if random.random() < 0.15:
        spoil(random, bias)
    if random.random() < 0.2:  # masked entries count as zero whatever they hold
        weight = weight.masked_fill(oracles.masked(weight.shape, corners), random.choice((math.nan, math.inf, 1e4)))
    if random.random() < 0.2:
        input = overlap(random, input)
    return Problem(corners, input, weight, bias)


def spoil(random: Random, tensor: Tensor) -> None:
    """Writes extreme values into some entries, or scales all of them."""
    info = torch.finfo(tensor.dtype)
    if random.random() < 0.2:
        tensor.mul_(random.choice((info.max / 1e4, info.smallest_normal, 1e3, 1e-3)))
        return
    if tensor.numel() == 0:
        return
    flat = tensor.view(-1)
    denormals = info.smallest_normal * info.eps, -info.smallest_normal / 2
    for _ in range(random.choice((1, 1, 2, 5))):
        values = (math.nan, math.inf, -math.inf, -0.0, 0.0, *denormals, info.max, -info.max / 2)
        flat[random.randrange(flat.numel())] = random.choice(values)
    if tensor.dtype == torch.float32 and random.random() < 0.1:  # a signalling NaN with a sign and a payload
        flat.view(torch.int32)[random.randrange(flat.numel())] = -0x007FFFF0 + random.randrange(15)


def overlap(random: Random, tensor: Tensor) -> Tensor:
    """Returns a tensor of this shape whose elements share memory: expanded, or sliding windows."""
    if tensor.numel() == 0:
        return tensor
    if random.random() < 0.5:
        narrow = tuple(slice(0, random.choice((1, None))) for _ in tensor.shape)
        return tensor[narrow].expand(tensor.shape)
    strides = [random.choice((0, 1, 1, 2, 3)) for _ in tensor.shape]
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return tensor if last >= tensor.numel() else tensor.flatten().as_strided(tensor.shape, strides)


def lay_out(random: Random, tensor: Tensor) -> Tensor:
    """Returns the same values in another kind of tensor or memory layout."""
    ways = (_permuted, _scattered, _restrided, _negated, _conjugated, _misaligned, _of_inference, _parameter, _view)
    way = random.choice((*ways, Tensor.clone, Tensor.contiguous, _subclass))
    return way(tensor, random) if way in ways else way(tensor)


def _permuted(tensor: Tensor, random: Random) -> Tensor:
    order = random.sample(range(tensor.dim()), tensor.dim())
    return tensor.permute(order).contiguous().permute([order.index(i) for i in range(tensor.dim())])


def _scattered(tensor: Tensor, random: Random) -> Tensor:
    """Separates the elements by NaNs."""
    steps = [random.choice((1, 1, 2, 3)) for _ in tensor.shape]
    memory = tensor.new_full([1 + size * step for size, step in zip(tensor.shape, steps, strict=True)], math.nan)
    return memory[tuple(slice(1, None, step) for step in steps)].copy_(tensor)


def _restrided(tensor: Tensor, random: Random) -> Tensor:
    """Changes strides of dimensions of size 1, which are meaningless."""
    tensor = tensor.contiguous()
    strides = [
        random.choice((0, 1, 7, 2**40)) if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(tensor.shape, strides)


def _negated(tensor: Tensor, random: Random) -> Tensor:
    return torch._neg_view(-tensor)


def _conjugated(tensor: Tensor, random: Random) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor.clone()
    return torch.view_as_complex(torch.stack([tensor, -tensor], -1)).conj().imag


def _misaligned(tensor: Tensor, random: Random) -> Tensor:
    if tensor.numel() == 0:
        return tensor.clone()
    size = tensor.element_size()
    buffer = bytearray((tensor.numel() + 1) * size)
    memory = torch.frombuffer(buffer, dtype=tensor.dtype, offset=random.randrange(1, size + 1), count=tensor.numel())
    return memory.view(tensor.shape).copy_(tensor)


def _of_inference(tensor: Tensor, random: Random) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _parameter(tensor: Tensor, random: Random) -> Tensor:
    return torch.nn.Parameter(tensor.clone(), requires_grad=random.random() < 0.5)


def _view(tensor: Tensor, random: Random) -> Tensor:
    return tensor.clone().requires_grad_()[...]


def _subclass(tensor: Tensor) -> Tensor:
    return tensor.clone().as_subclass(Subclass)


def bits(tensor: Tensor) -> Tensor:
    """Returns the bits of a tensor, which distinguish equal values and NaNs."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().as_subclass(Tensor).resolve_neg().contiguous().view(integer)
