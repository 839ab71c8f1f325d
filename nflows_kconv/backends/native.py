"""Loads the native library, or records why there is none."""

from __future__ import annotations

import ctypes
import json
import threading
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nflows_kconv.torch_internals import below_autograd

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

called_back = threading.local()  # .error: raised by Python when the library called it back in this thread, or None


class Outcome(IntEnum):
    """The outcome of a CPU kernel call, as in csrc/cpu/problem.h; only DONE wrote an output."""

    DONE = 0
    OUT_OF_MEMORY = 1
    DECLINED = 2  # no reciprocal of the diagonal, tensors it cannot read or that do not fit, or torch is faster


class Options(ctypes.Structure):
    """Options of the CPU kernel, as in csrc/cpu_caller.cpp."""

    _fields_ = (
        ("stencils", ctypes.POINTER(ctypes.c_int64)),
        ("groups", ctypes.c_int64),
        ("dimensions", ctypes.c_int64),
        ("dilation", ctypes.c_int64 * 3),
        ("unit_diagonal", ctypes.c_bool),
        ("transpose", ctypes.c_bool),
        ("solve", ctypes.c_bool),
    )

    def __init__(self, *members: Any) -> None:
        super().__init__(*members)
        self.address = ctypes.addressof(self)


def _load(directory: Path) -> tuple[ctypes.CDLL | None, str]:
    """Returns the library in `directory`, or None and the reason."""
    record = directory / "_native_build.json"
    if not record.exists():
        return None, f"it was never built: Python runs the sources in {directory}, not an installed package"
    build = json.loads(record.read_text())
    if not build["built"]:
        return None, f"it was not built: {build['reason']}"
    path = directory / "_native.abi3.so"
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
        library.nflows_kconv_instruction_set.restype = ctypes.c_char_p
        library.nflows_kconv_select_instruction_set.argtypes = [ctypes.c_char_p]
        library.nflows_kconv_run.argtypes = [ctypes.c_char_p]
        library.nflows_kconv_out_of_memory.restype = ctypes.c_bool
    except Exception as error:  # The package must import without the library, whatever is wrong with it.
        cause = error.__cause__ or error  # torch's own message names only the file
        return None, f"built with {build['compiler']} and torch {build['torch']}, it failed to load: {cause}"
    return library, ""


_library, reason = _load(Path(__file__).parent.parent)
available = _library is not None
# The CPU kernel, which takes `Arguments` of csrc/cpu_caller.cpp; for tensors' addresses see `torch_internals.address`.
run_kernel: Any = None if _library is None else _library.nflows_kconv_run


def loaded() -> ctypes.CDLL:
    """Returns the native library.

    Raises:
        RuntimeError: If it is not available.
    """
    if _library is None:
        raise RuntimeError(f"the native library is not available: {reason}")
    return _library


def call(name: str, *args: Any) -> Tensor:
    """Calls an operator of the native library, below autograd, which `ops` handles."""
    called_back.error = None  # an interrupted call may have left one
    try:
        with below_autograd():
            return _operator(name)(*args)
    except Exception as error:  # torch passes on only the text
        raised, called_back.error = called_back.error, None
        if raised is None and loaded().nflows_kconv_out_of_memory():
            raised = torch.OutOfMemoryError(str(error))
        if raised is None:
            raise
        raise raised from None


@cache
def _operator(name: str) -> Any:
    return getattr(torch.ops.nflows_kconv_native, name).default


def instruction_set() -> str:
    """Returns the instruction set in use, one of `INSTRUCTION_SETS`.

    Raises:
        RuntimeError: If the native library is not available.
    """
    return loaded().nflows_kconv_instruction_set().decode()


def instruction_sets() -> tuple[str, ...]:
    """Returns the instruction sets of this machine, the best one last; none without the native library."""
    if not available:
        return ()
    in_use = instruction_set()
    present = tuple(name for name in INSTRUCTION_SETS if _select(name))
    _select(in_use)
    return present


def select_instruction_set(name: str) -> None:
    """Makes the native kernels of this process use an instruction set.

    The best one is the default; tests and benchmarks select others.

    Raises:
        RuntimeError: If the native library is not available.
        ValueError: If this machine does not have the instruction set.
    """
    if not _select(name):
        raise ValueError(f"instruction set must be one of {instruction_sets()} on this machine, got {name!r}")


def _select(name: str) -> bool:
    return loaded().nflows_kconv_select_instruction_set(name.encode()) == 0
