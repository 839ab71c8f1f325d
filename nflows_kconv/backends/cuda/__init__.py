"""The CUDA backend: kernels compiled for each problem when it first needs them.

plan                  types: problem, kernel, launch and plan
planning              from a problem to its plan; wavefront, convolution, weight_gradient and tiling are its parts
compiler, cache       from a kernel to machine code, once for all processes
driver, runtime       from a plan to functions loaded on a device, once per process
native_launcher, python_launcher   from an operator call to launches
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native, planes, polyphase, reference
from nflows_kconv.backends.cuda import compiler, driver, native_launcher, plan, planning, runtime
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.registry import OperatorCall, Status

if native.available:
    native_launcher.NativeLauncher(native.loaded(), runtime.runtime).connect()
_LEFT, _TOP = stencil.STENCILS[2]["L"], stencil.STENCILS[2]["T"]
_python_launcher = PythonLauncher(runtime.runtime)


def status() -> Status:
    """Returns whether kernels can run here, and on which devices."""
    reason = runtime.why_not()
    reasons = {} if reason else {name: runtime.why_not(index) for index, name in enumerate(driver.device_names())}
    served = [name for name, why in reasons.items() if why is None]
    refused = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if not served:
        return Status(False, reason or "; ".join(refused))
    launcher = "C++" if native.available else f"Python, slower, since the native library is missing: {native.reason}"
    nvrtc = "compiled at run time by NVRTC {}.{}".format(*compiler.version())
    return Status(True, "; not on ".join([f"{', '.join(served)}, {nvrtc}, launched from {launcher}", *refused]))


def why_not(call: OperatorCall) -> str | None:
    """Returns why no kernel can run a call; None if one can."""
    return runtime.told_why_not(call.input.get_device()) or planning.why_not(call.operation, call.stencils)


def run(call: OperatorCall) -> Tensor:
    """Runs a call, on torch's own kernels for solutions without a plan and for convolutions in three dimensions."""
    if call.dilated:
        return polyphase.run(call, run)
    if call.dimensions == 3:
        return planes.solve(call, run) if call.operation == "solve" else reference.run(call)
    if stencil.family(call.stencils[0]) == _LEFT:  # kernels cannot exchange axes, but views can
        upright = call._replace(
            input=call.input.mT,
            other=call.other.mT,
            stencils=[code ^ _LEFT ^ _TOP for code in call.stencils],
            kernel_size=call.kernel_size[::-1],
        )
        return run(upright).mT
    if call.operation == "solve" and not _has_solver(
        call.input.shape, call.other.shape, call.stencils[0], call.input.dtype, call.input.get_device()
    ):
        return reference.run(call)
    return native_launcher.run(call) if native.available else _python_launcher.run(call)


@lru_cache(4096)
def _has_solver(shape: torch.Size, weight_shape: torch.Size, code: int, dtype: torch.dtype, device: int) -> bool:
    """Returns whether a kernel solves this problem, with all stencils in the family of `code`."""
    if 0 in shape:
        return True
    groups = weight_shape[0] // weight_shape[1]
    none = (0, 0, 0, 0)  # strides do not affect whether there is a plan
    problem = plan.ProblemSpec(
        "solve", dtype, (*shape,), (*weight_shape[2:],), (code,) * groups, False, False, none, none, none
    )
    return planning.plan_solution(problem, driver.describe(device)) is not None
