"""Launches the kernels of a plan from Python, without the native library."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nflows_kconv.backends.cuda import driver, plan
from nflows_kconv.backends.cuda.runtime import Runtime
from nflows_kconv.backends.registry import OperatorCall

_MAX_PLANS = 4096


class PythonLauncher:
    """Runs operator calls on CUDA tensors.

    Args:
        runtime: Provides plans.
        driver: The module `driver`, or a substitute in tests.
    """

    def __init__(self, runtime: Runtime, driver: Any = driver) -> None:
        self._load = lru_cache(_MAX_PLANS)(runtime.load)
        self._driver = driver

    def run(self, call: OperatorCall) -> Tensor:
        """Returns the result of a call."""
        first, second, kernel_size = call.input, call.other, call.kernel_size
        if call.operation == "weight_gradient":
            channels = first.shape[1]
            output = first.new_zeros(channels, channels // len(call.stencils), *kernel_size)
        elif call.operation == "log_abs_det":
            output = first.new_empty(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
        else:
            output = torch.empty_like(first)
        if first.numel() == 0:
            return output
        bias, log_diagonal = (None if t is None else t.contiguous() for t in (call.bias, call.log_diagonal))
        device = first.get_device()
        loaded = self._load(plan.ProblemSpec.of(call, output), device)
        stream = self._driver.current_stream(device)
        scratch = first.new_empty(loaded.plan.scratch, dtype=torch.uint8)
        if loaded.plan.zeroed:
            self._driver.zero(device, scratch.data_ptr(), loaded.plan.zeroed, stream)
        tensors = (first, second, output, scratch, bias, log_diagonal)
        pointers = struct.pack("=6Q", *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
        for launch, function in zip(loaded.plan.launches, loaded.functions, strict=True):
            arguments = pointers + launch.arguments[len(pointers) :]
            self._driver.launch(device, function, launch.grid, launch.block, launch.shared, arguments, stream)
        return output
