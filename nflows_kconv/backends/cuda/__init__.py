"""The CUDA backend: kernels compiled when they are first needed, for the problem at hand.

plan                  what a problem, a kernel, a launch and a plan are
planning              from a problem to its plan: which kernels run it; the other planning modules are its parts
compiler, cache       from a kernel to code for a GPU, once for all processes
driver, runtime       from a plan to functions loaded on a device, once in a process
native_launcher, python_launcher   from a call of an operator to launches
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native, planes, reference
from nflows_kconv.backends.cuda import compiler, driver, runtime
from nflows_kconv.backends.cuda.native_launcher import NativeLauncher
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.registry import Problem, Status

if native.available:
    NativeLauncher(native.loaded(), runtime.runtime).connect()
_python_launcher = PythonLauncher(runtime.runtime)


def status() -> Status:
    """Whether kernels can run here, and on what."""
    reason = runtime.why_not()
    if reason is not None:
        return Status(False, reason)
    names = ", ".join(dict.fromkeys(driver.device_names()))
    launcher = "C++" if native.available else f"Python, slower, since the native library is missing: {native.reason}"
    runs_with = "{}, compiled at run time by NVRTC {}.{}, launched from {}".format(names, *compiler.version(), launcher)
    return Status(True, runs_with)


def why_not(problem: Problem) -> str | None:
    """None where kernels can run here, for corners."""
    if runtime.by_reference():
        return runtime.why_not()
    if not all(stencil.is_corner(code) for code in problem.stencils):
        return "its kernels know corners alone"
    return None


def run(problem: Problem) -> Tensor:
    """Runs a problem; in three dimensions what torch's own convolutions do, they do."""
    if problem.dimensions == 3:
        return planes.solve(problem, run) if problem.operation == "solve" else reference.run(problem)
    operation, input, other, stencils, bias, log_diagonal, unit_diagonal, transpose, kernel_size = problem
    arguments: tuple[Any, ...]
    if operation == "weight_gradient":
        arguments = input, other, stencils, kernel_size
    else:
        if unit_diagonal or log_diagonal is not None:
            other = stencil.effective(other, stencils, log_diagonal, unit_diagonal)
        arguments = (input, other, bias, stencils, transpose)
    if native.available:
        return native.call(f"{operation}_cuda", *arguments)
    return getattr(_python_launcher, operation)(*arguments)
