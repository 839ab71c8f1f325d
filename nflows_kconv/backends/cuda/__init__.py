"""The CUDA backend: kernels compiled when they are first needed, for the problem at hand.

plan                  what a problem, a kernel, a launch and a plan are
planning              from a problem to its plan: which kernels run it; the other planning modules are its parts
compiler, cache       from a kernel to code for a GPU, once for all processes
driver, runtime       from a plan to functions loaded on a device, once in a process
native_launcher, python_launcher   from a call of an operator to launches
"""

from __future__ import annotations

from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native, planes, polyphase, reference
from nflows_kconv.backends.cuda import compiler, driver, native_launcher, planning, runtime
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.registry import Problem, Status

if native.available:
    native_launcher.NativeLauncher(native.loaded(), runtime.runtime).connect()
_LEFT, _TOP = stencil.STENCILS[2]["L"], stencil.STENCILS[2]["T"]
_python_launcher = PythonLauncher(runtime.runtime)


def status() -> Status:
    """Whether kernels can run here, and on what."""
    reason = runtime.why_not()
    reasons = {} if reason else {name: runtime.why_not(index) for index, name in enumerate(driver.device_names())}
    served = [name for name, why in reasons.items() if why is None]
    refused = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if not served:
        return Status(False, reason or "; ".join(refused))
    launcher = "C++" if native.available else f"Python, slower, since the native library is missing: {native.reason}"
    nvrtc = "compiled at run time by NVRTC {}.{}".format(*compiler.version())
    return Status(True, "; not on ".join([f"{', '.join(served)}, {nvrtc}, launched from {launcher}", *refused]))


def why_not(problem: Problem) -> str | None:
    """None where kernels can run here, and there is one for the stencils."""
    stencils, input = problem.stencils, problem.input
    return runtime.told_why_not(input.get_device()) or planning.why_not(
        problem.operation, stencils, input.shape[1] // len(stencils), problem.kernel_size, input.dtype
    )


def run(problem: Problem) -> Tensor:
    """Runs a problem; in three dimensions what torch's own convolutions do, they do."""
    if problem.dilated:
        return polyphase.run(problem, run)
    if problem.dimensions == 3:
        return planes.solve(problem, run) if problem.operation == "solve" else reference.run(problem)
    if stencil.family(problem.stencils[0]) == _LEFT:  # kernels exchange no axes, views do
        upright = problem._replace(
            input=problem.input.mT,
            other=problem.other.mT,
            stencils=[code ^ _LEFT ^ _TOP for code in problem.stencils],
            kernel_size=problem.kernel_size[::-1],
        )
        return run(upright).mT
    return native_launcher.run(problem) if native.available else _python_launcher.run(problem)
