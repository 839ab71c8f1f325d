"""Measures errors of float32 against float64, on the CPU and on another device.

The baseline is float64 on the CPU, whose own error is 2^-29 of the measured one. An error is the largest one of all
entries, relative to the largest entry. The layer's initial taps are multiplied by five, so they add about a quarter of
the signal's standard deviation: closer to the identity, the last rounding would dominate. The inverse does not amplify
errors there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads import Case
from nflows_kconv import InvertibleConv2d, functional

TAPS_SCALE = 5
ROUNDING = torch.finfo(torch.float32).eps / 2


def errors(case: Case, device: str) -> dict[str, dict[str, float]]:
    """Returns the errors of the forward, the inverse and their gradients, by quantity and by "cpu" or "device"."""
    layer = InvertibleConv2d(case.shape[0], corners=case.corners)
    with torch.no_grad():
        layer.raw_weight.mul_(TAPS_SCALE)
    tensors = torch.randn(case.batch, *case.shape), layer.weight.detach(), torch.randn(case.batch, *case.shape)
    exact = _results(case, *(tensor.double() for tensor in tensors))
    on_cpu = _results(case, *tensors)
    on_device = _results(case, *(tensor.to(device) for tensor in tensors))
    return {
        name: {"cpu": _error(on_cpu[name], expected), "device": _error(on_device[name], expected)}
        for name, expected in exact.items()
    }


def ratio(error: dict[str, float]) -> float:
    """Returns the device's error over the CPU's, which counts as at least one rounding."""
    return error["device"] / max(error["cpu"], ROUNDING)


def _results(case: Case, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    results = {}
    for name, function in (("forward", functional.conv2d), ("inverse", functional.conv2d_inverse)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = function(*leaves, corners=case.corners)
        results[name] = output.detach()
        gradients = torch.autograd.grad(output, leaves, grad)
        results[f"{name}_input_gradient"], results[f"{name}_weight_gradient"] = gradients
    return results


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()
