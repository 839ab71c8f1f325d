"""The plain way as a backend: how a GPU runs the layer without kernels of its own, to race with them.

It mirrors all groups to the corner TL, for one grouped convolution of torch or its weight gradient, and solves by the
matrix products of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from nflows_kconv import stencil
from nflows_kconv.backends import reference
from nflows_kconv.backends.registry import Implementation, OperatorCall, Status, register

NAME = "plain"


def register_last() -> None:
    """Makes it a backend that `use_backend` can choose; the others come before it and leave it no other call."""
    register(Implementation(NAME, "any", lambda: Status(True, "for benchmarks"), _why_not, _run))


def _why_not(call: OperatorCall) -> str | None:
    plain = call.dimensions == 2 and not call.dilated and all(map(stencil.is_corner, call.stencils))
    return None if plain else "it is for corners of images, without dilation"


def _run(call: OperatorCall) -> Tensor:
    if call.operation not in ("conv", "weight_gradient"):
        return reference.run(call)
    dtype, stencils, groups = torch.promote_types(call.input.dtype, torch.float32), call.stencils, len(call.stencils)
    frames = [stencil.opposite(code, 2) if call.transpose else code for code in stencils]
    x = stencil.pad(_mirrored(call.input.to(dtype), frames, 1), stencil.STENCILS[2]["TL"], call.kernel_size)
    shape, other = (x.shape[1], x.shape[1] // groups, *call.kernel_size), call.other.to(dtype)
    if call.operation == "conv":
        bias, log_diagonal = (None if t is None else t.to(dtype) for t in (call.bias, call.log_diagonal))
        if call.unit_diagonal or log_diagonal is not None:
            other = stencil.effective(other, stencils, log_diagonal, call.unit_diagonal)
        weight = _mirrored(other.masked_fill(_masked_entries(shape, tuple(stencils), x.device), 0), stencils, 0)
        if call.transpose:
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        with reference.in_own_precision(x.device):
            output = _mirrored(F.conv2d(x, weight, groups=groups), frames, 1)
        return (output if bias is None else output + bias[:, None, None]).to(call.input.dtype)
    with reference.in_own_precision(x.device):
        gradient = conv2d_weight(x, shape, _mirrored(other, frames, 1), groups=groups)
    masked = _masked_entries(shape, tuple(stencils), x.device, diagonal=call.unit_diagonal)
    return _mirrored(gradient, stencils, 0).masked_fill(masked, 0).to(call.input.dtype)


_masked_entries = lru_cache(stencil.masked_entries)  # kept, because making a mask takes many small kernels


def _mirrored(tensor: Tensor, stencils: Sequence[int], dim: int) -> Tensor:
    """Mirrors the groups along `dim` to the corner TL, or back."""
    groups = zip(tensor.chunk(len(stencils), dim), stencils, strict=True)
    return torch.cat([stencil.canonical(group, code, 2) for group, code in groups], dim)
