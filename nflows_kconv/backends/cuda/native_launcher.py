"""Launches from C++, csrc/cuda_launcher.cpp: calls it, and makes plans whenever it calls back for one."""

from __future__ import annotations

import ctypes
import threading
import traceback
from typing import Any, ClassVar

import torch
from torch import Tensor

from nflows_kconv.backends import native, registry
from nflows_kconv.backends.cuda import driver
from nflows_kconv.backends.cuda.plan import Problem
from nflows_kconv.backends.cuda.runtime import Runtime

_OPERATIONS = ("conv", "solve", "weight_gradient")
_DTYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}  # by torch's ScalarType


class _Problem(ctypes.Structure):
    """`struct Problem` of csrc/cuda_launcher.h."""

    _fields_ = (
        ("operation", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("device", ctypes.c_int64),
        ("unit_diagonal", ctypes.c_int64),
        ("transpose", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 4),
        ("kernel_size", ctypes.c_int64 * 2),
        ("first_strides", ctypes.c_int64 * 4),
        ("second_strides", ctypes.c_int64 * 4),
        ("output_strides", ctypes.c_int64 * 4),
        ("groups", ctypes.c_int64),
        ("stencils", ctypes.POINTER(ctypes.c_int64)),
    )


_Planner = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Problem), ctypes.c_void_p)


def run(problem: registry.Problem) -> Tensor:
    """The result of a problem."""
    operation, input, other, stencils, bias, log_diagonal, unit_diagonal, transpose, kernel_size, _ = problem
    if operation == "weight_gradient":
        return native.call("weight_gradient_cuda", input, other, stencils, kernel_size, unit_diagonal)
    return native.call(f"{operation}_cuda", input, other, bias, log_diagonal, stencils, unit_diagonal, transpose)


class NativeLauncher:
    """A planner for the native library, which has one at a time.

    Args:
        library: The native library.
        runtime: Where plans come from.
        driver: The module `driver`, or what stands for it in tests.

    Attributes:
        connected: The one that the native library calls.
    """

    connected: ClassVar[NativeLauncher | None] = None

    def __init__(self, library: ctypes.CDLL, runtime: Runtime, driver: Any = driver) -> None:
        self._library = library
        self._runtime = runtime
        self._driver = driver
        self._lock = threading.Lock()
        self._callback = _Planner(self._plan)
        handle, size = ctypes.c_void_p, ctypes.c_int64
        library.nflows_kconv_set_planner.argtypes = [_Planner]
        library.nflows_kconv_add_launch.argtypes = [
            handle,
            handle,
            ctypes.c_uint * 3,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_char_p,
            ctypes.c_uint64,
        ]
        library.nflows_kconv_finish_plan.argtypes = [handle, handle, size, size]
        library.nflows_kconv_plan_error.argtypes = [handle, ctypes.c_char_p]

    def connect(self) -> None:
        """Makes the native library call this planner, and forget what others have planned."""
        self._driver_known = False
        self._library.nflows_kconv_set_planner(self._callback)
        NativeLauncher.connected = self

    def _plan(self, problem: Any, plan: int) -> None:
        try:
            self._hand_over(problem.contents, plan)
        except BaseException as error:  # None may leave through the C++ code that called.
            text = str(error) if isinstance(error, RuntimeError) else ""
            text = text or "".join(traceback.format_exception_only(error)).strip()
            self._library.nflows_kconv_plan_error(plan, text.encode())

    def _hand_over(self, problem: _Problem, plan: int) -> None:
        with self._lock:
            if not self._driver_known:
                addresses = self._driver.function_addresses()
                self._library.nflows_kconv_set_driver((ctypes.c_void_p * len(addresses))(*addresses))
                self._driver_known = True
        loaded = self._runtime.load(_read(problem), problem.device)
        for launch, function in zip(loaded.plan.launches, loaded.functions, strict=True):
            self._library.nflows_kconv_add_launch(
                plan,
                function,
                (ctypes.c_uint * 3)(*launch.grid),
                launch.block,
                launch.shared,
                launch.arguments,
                len(launch.arguments),
            )
        context = self._driver.context(problem.device)
        self._library.nflows_kconv_finish_plan(plan, context, loaded.plan.scratch, loaded.plan.zeroed)


def _read(problem: _Problem) -> Problem:
    return Problem(
        operation=_OPERATIONS[problem.operation],
        dtype=_DTYPES[problem.dtype],
        shape=tuple(problem.shape),
        kernel_size=tuple(problem.kernel_size),
        stencils=tuple(problem.stencils[: problem.groups]),
        unit_diagonal=bool(problem.unit_diagonal),
        transpose=bool(problem.transpose),
        first_strides=tuple(problem.first_strides),
        second_strides=tuple(problem.second_strides),
        output_strides=tuple(problem.output_strides),
        bias=bool(problem.bias),
    )
