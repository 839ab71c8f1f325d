"""Chooses the kernels that run a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nflows_kconv import stencil
from nflows_kconv.backends.cuda import wavefront
from nflows_kconv.backends.cuda.convolution import plan_convolution
from nflows_kconv.backends.cuda.plan import Device, Launch, LaunchPlan, ProblemSpec, arguments, kernel
from nflows_kconv.backends.cuda.weight_gradient import plan_weight_gradient

_FAMILIES = frozenset(map(stencil.family, stencil.parse(("TL", "T", "L"))))


def why_not(operation: str, stencils: Sequence[int]) -> str | None:
    """Returns why no kernel runs this operation with these stencils; None if one does."""
    if all(map(stencil.is_corner, stencils)):
        return None
    families = set(map(stencil.family, stencils))
    if not families <= _FAMILIES:
        return "it has no kernel for a stencil"
    if len(families) > 1:
        return "its kernels take stencils of one family in a call: corners, T and B, or L and R"
    return "its kernel of the weight gradient is for corners" if operation == "weight_gradient" else None


def plan(problem: ProblemSpec, device: Device) -> LaunchPlan:
    """Returns the launches that run a problem on this GPU. All but solutions have one kernel each.

    Raises:
        RuntimeError: If no kernel computes a solution.
    """
    if problem.operation == "conv":
        return plan_convolution(problem, device)
    if problem.operation == "weight_gradient":
        return plan_weight_gradient(problem, device)
    if problem.operation == "log_abs_det":
        return plan_log_abs_det(problem)
    solution = plan_solution(problem, device)
    if solution is None:
        raise RuntimeError(f"a solution must have a kernel, got {problem}")
    return solution


def plan_log_abs_det(problem: ProblemSpec) -> LaunchPlan:
    """Plans log_abs_det.cu, a warp an image, with one kernel for all sizes."""
    batch, channels, height, width = problem.shape
    pixels = -height * width if problem.transpose else height * width
    one = kernel(replace(problem, shape=(1, 1, 1, 1), transpose=False), "log_abs_det.cu", "log_abs_det")
    return LaunchPlan((Launch(one, (batch, 1, 1), 32, 0, arguments(problem, (channels,), (pixels,))),))


def plan_solution(problem: ProblemSpec, device: Device) -> LaunchPlan | None:
    """Returns the launches that compute a solution; None if no kernel can.

    - `wavefront.plan_rows`, up to 16 channels a group, as long as a thread can hold the weights of an output channel;
    - `wavefront.plan_channels`, for corners, as long as a thread block can hold all weights of a group in registers,
      about 64 channels at 3 x 3;
    - `wavefront.plan_tiles`, for corners, from 32 to 512 channels where sums are of 32 bits.
    """
    others = (wavefront.plan_channels, wavefront.plan_tiles) if stencil.is_corner(problem.stencils[0]) else ()
    for planner in (wavefront.plan_rows, *others):
        found = planner(problem, device)
        if found and all(launch.shared <= device.shared_memory for launch in found.launches):
            return found
    return None
