"""From a problem to its plan: which kernels run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nflows_kconv import stencil
from nflows_kconv.backends.cuda import products, wavefront
from nflows_kconv.backends.cuda.convolution import plan_convolution
from nflows_kconv.backends.cuda.plan import Device, Plan, Problem
from nflows_kconv.backends.cuda.weight_gradient import plan_weight_gradient

_FAMILIES = frozenset(map(stencil.family, stencil.parse(("TL", "T", "L"))))
# Channels of a group from which on the convolution is a matrix product.
_MANY_CHANNELS = 64


def why_not(
    operation: str, stencils: Sequence[int], channels: int, kernel_size: Sequence[int], dtype: torch.dtype
) -> str | None:
    """Why no kernel computes this with these stencils, for so many channels a group; None where one does."""
    if all(map(stencil.is_corner, stencils)):
        return None
    families = set(map(stencil.family, stencils))
    if not families <= _FAMILIES:
        return "it has no kernel for a stencil"
    if len(families) > 1:
        return "its kernels take stencils of one family in a call: corners, T and B, or L and R"
    if operation == "weight_gradient":
        return "its kernel of the weight gradient is for corners"
    if operation == "solve":
        return wavefront.why_not_rows(channels, kernel_size, dtype)
    many = f"with sides its convolution is for {_MANY_CHANNELS} channels a group at most"
    return many if channels > _MANY_CHANNELS else None


def plan(problem: Problem, device: Device) -> Plan:
    """The launches that solve a problem on this GPU.

    The convolution and the weight gradient have one kernel for few channels and one for many. The solution has three:

    - `wavefront.plan_rows`, up to 16 channels a group, as long as a thread can hold the weights of an output channel;
    - `wavefront.plan_channels`, as long as a thread block can hold all weights of a group in registers, about 64
      channels at 3 x 3;
    - `products.plan_solve`, everything else.
    """
    if problem.operation == "solve":
        return (
            wavefront.plan_rows(problem, device)
            or wavefront.plan_channels(problem, device)
            or products.plan_solve(problem, device)
        )
    if problem.operation == "conv":
        if problem.channels > _MANY_CHANNELS:
            return products.plan_convolution(problem, device)
        return plan_convolution(problem, device)
    return plan_weight_gradient(problem, device)
