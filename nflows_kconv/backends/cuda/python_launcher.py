"""Launches the kernels of a plan from Python: the CUDA implementation where there is no native library."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nflows_kconv.backends.cuda import driver
from nflows_kconv.backends.cuda.plan import Problem
from nflows_kconv.backends.cuda.runtime import Runtime

_MAX_PLANS = 4096


class PythonLauncher:
    """The three operators, see `nflows_kconv.ops`, on tensors of CUDA devices.

    Args:
        runtime: Where plans come from.
        driver: The module `driver`, or what stands for it in tests.
    """

    def __init__(self, runtime: Runtime, driver: Any = driver) -> None:
        self._load = lru_cache(_MAX_PLANS)(runtime.load)
        self._driver = driver

    def conv(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, corners: Sequence[int], transpose: bool
    ) -> Tensor:
        """y = A x + b, or y = A^T x + b."""
        return self._run("conv", input, weight, bias, torch.empty_like(input), corners, transpose, weight.shape[2:])

    def solve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, corners: Sequence[int], transpose: bool
    ) -> Tensor:
        """x = A^-1 (y - b), or x = A^-T (y - b)."""
        return self._run("solve", input, weight, bias, torch.empty_like(input), corners, transpose, weight.shape[2:])

    def weight_gradient(
        self, input: Tensor, grad: Tensor, corners: Sequence[int], kernel_size: Sequence[int]
    ) -> Tensor:
        """The gradient of <grad, A input> in the weight."""
        channels = input.shape[1]
        output = input.new_zeros(channels, channels // len(corners), *kernel_size)
        return self._run("weight_gradient", input, grad, None, output, corners, False, kernel_size)

    def _run(
        self,
        operation: str,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None,
        output: Tensor,
        corners: Sequence[int],
        transpose: bool,
        kernel_size: Sequence[int],
    ) -> Tensor:
        weights = (first.shape[1], first.shape[1] // len(corners), *kernel_size)
        expected = first.shape if operation == "weight_gradient" else weights
        if second.shape != expected or (second.dtype, second.device) != (first.dtype, first.device):
            raise ValueError(
                f"{operation} needs a second tensor of shape {tuple(expected)}, {first.dtype} and {first.device}, "
                f"got {tuple(second.shape)}, {second.dtype} and {second.device}"
            )
        if bias is not None:
            if (bias.shape, bias.dtype, bias.device) != (first.shape[1:2], first.dtype, first.device):
                raise ValueError(
                    f"{operation} needs a bias of shape {tuple(first.shape[1:2])}, {first.dtype} and {first.device}, "
                    f"got {tuple(bias.shape)}, {bias.dtype} and {bias.device}"
                )
            bias = bias.contiguous()
        if first.numel() == 0:
            return output
        device = first.get_device()
        problem = Problem(
            operation=operation,
            dtype=first.dtype,
            shape=_four(first.shape),
            kernel_size=(kernel_size[0], kernel_size[1]),
            corners=tuple(corners),
            transpose=transpose,
            first_strides=_four(first.stride()),
            second_strides=_four(second.stride()),
            output_strides=_four(output.stride()),
            bias=bias is not None,
        )
        loaded = self._load(problem, device)
        stream = self._driver.current_stream(device)
        scratch = first.new_empty(loaded.plan.scratch, dtype=torch.uint8)
        if loaded.plan.zeroed:
            self._driver.zero(device, scratch.data_ptr(), loaded.plan.zeroed, stream)
        pointers = struct.pack(
            "=5Q", *(0 if tensor is None else tensor.data_ptr() for tensor in (first, second, output, scratch, bias))
        )
        for launch, function in zip(loaded.plan.launches, loaded.functions, strict=True):
            arguments = pointers + launch.arguments[len(pointers) :]
            self._driver.launch(device, function, launch.grid, launch.block, launch.shared, arguments, stream)
        return output


def _four(values: Sequence[int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = values
    return first, second, third, fourth
