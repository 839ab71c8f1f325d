"""Calls the C++ launcher, csrc/cuda_launcher.cpp, and makes the plans it calls back for."""

from __future__ import annotations

import ctypes
import threading
from typing import Any, ClassVar

import torch
from torch import Tensor

from nflows_kconv.backends import native, registry
from nflows_kconv.backends.cuda import driver
from nflows_kconv.backends.cuda.plan import ProblemSpec
from nflows_kconv.backends.cuda.runtime import Runtime

_WORDS = ctypes.POINTER(ctypes.c_int64)
_Planner = ctypes.CFUNCTYPE(None, _WORDS, ctypes.c_int64, _WORDS, ctypes.c_void_p)


def run(call: registry.OperatorCall) -> Tensor:
    """Returns the result of a call."""
    operation, input, other, stencils, bias, log_diagonal, unit_diagonal, transpose, kernel_size, _ = call
    if operation == "weight_gradient":
        return native.call("weight_gradient_cuda", input, other, stencils, kernel_size, unit_diagonal)
    return native.call(f"{operation}_cuda", input, other, bias, log_diagonal, stencils, unit_diagonal, transpose)


class NativeLauncher:
    """A planner for the native library, which uses one at a time.

    Args:
        library: The native library.
        runtime: Provides plans.
        driver: The module `driver`, or a substitute in tests.

    Attributes:
        connected: The planner that the native library calls.
    """

    connected: ClassVar[NativeLauncher | None] = None

    def __init__(self, library: ctypes.CDLL, runtime: Runtime, driver: Any = driver) -> None:
        self._library = library
        self._runtime = runtime
        self._driver = driver
        self._lock = threading.Lock()
        self._callback = _Planner(self._plan)
        handle, size, three = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint * 3
        number, text = ctypes.c_uint, ctypes.c_char_p
        library.nflows_kconv_set_planner.argtypes = [_Planner]
        library.nflows_kconv_add_launch.argtypes = [handle, handle, three, number, number, text, ctypes.c_uint64]
        library.nflows_kconv_finish_plan.argtypes = [handle, handle, size, size]
        library.nflows_kconv_plan_error.argtypes = [handle, text]
        names = "float16", "float32", "float64", "bfloat16"
        # By torch's own numbers. Its C interface, which the library links, tells them.
        self._dtypes = {getattr(library, f"aoti_torch_dtype_{name}")(): getattr(torch, name) for name in names}

    def connect(self) -> None:
        """Makes the native library call this planner and forget all plans of others."""
        self._driver_known = False
        self._library.nflows_kconv_set_planner(self._callback)
        NativeLauncher.connected = self

    def _plan(self, words: Any, count: int, output_strides: Any, plan: int) -> None:
        try:
            self._hand_over(words[:count], output_strides[:4], plan)
        except BaseException as error:  # It must not propagate through C++: `native.call` raises it.
            native.called_back.error = error
            self._library.nflows_kconv_plan_error(plan, str(error).encode())

    def _hand_over(self, words: Any, output_strides: Any, plan: int) -> None:
        with self._lock:
            if not self._driver_known:
                addresses = self._driver.function_addresses()
                self._library.nflows_kconv_set_driver((ctypes.c_void_p * len(addresses))(*addresses))
                self._driver_known = True
        problem, device = self._read(words, output_strides)
        loaded = self._runtime.load(problem, device)
        for launch, function in zip(loaded.plan.launches, loaded.functions, strict=True):
            grid, arguments = (ctypes.c_uint * 3)(*launch.grid), launch.arguments
            self._library.nflows_kconv_add_launch(
                plan, function, grid, launch.block, launch.shared, arguments, len(arguments)
            )
        self._library.nflows_kconv_finish_plan(
            plan, self._driver.context(device), loaded.plan.scratch, loaded.plan.zeroed
        )

    def _read(self, words: Any, output_strides: Any) -> tuple[ProblemSpec, int]:
        """Returns the problem and its device from the arguments of `Planner` in csrc/cuda_launcher.h."""
        operation, dtype, device, unit_diagonal, transpose, bias, *sizes = words
        problem = ProblemSpec(
            operation=ctypes.string_at(operation).decode(),
            dtype=self._dtypes[dtype],
            shape=tuple(sizes[2:6]),
            kernel_size=tuple(sizes[:2]),
            stencils=tuple(sizes[14:]),
            unit_diagonal=bool(unit_diagonal),
            transpose=bool(transpose),
            first_strides=tuple(sizes[6:10]),
            second_strides=tuple(sizes[10:14]),
            output_strides=tuple(output_strides),
            bias=bool(bias),
        )
        return problem, device
