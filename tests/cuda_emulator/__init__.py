"""Runs plans of CUDA kernels on the CPU: compiles their sources as C++, with a fiber for every CUDA thread.

It is designed to reveal mistakes, see emulator.cpp. In addition, guard pages surround the memory that a kernel may
touch, and unwritten memory reads as NaN.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_emulator import library
from cuda_emulator.memory import Memory, once, span
from nflows_kconv.backends import registry
from nflows_kconv.backends.cuda import planning
from nflows_kconv.backends.cuda.plan import POINTER_BYTES, Device, Launch, LaunchPlan, ProblemSpec

H100 = Device((9, 0), 132, 232448)

# Orders of threads: increasing, decreasing, and random for any seed from 0.
INCREASING, DECREASING = -1, -2
ORDERS = (INCREASING, DECREASING, 0, 1)

# Limits of every GPU, except that shared memory is that of the largest.
MAX_SHARED = 232448
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)

needs_compiler = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(library.COMPILER) is None,
    reason="the emulator of CUDA needs Linux and g++",
)


class EmulatorError(RuntimeError):
    """A kernel broke a rule of CUDA."""


def call(problem: registry.OperatorCall, *, device: Device = H100, seed: int = INCREASING) -> Tensor:
    """Plans and runs an operator call as the CUDA backend does.

    Args:
        problem: The call, not empty, with contiguous vectors.
        device: The GPU to plan for.
        seed: The order of threads.

    Returns:
        The output.
    """
    output = _output(problem)
    plan = planning.plan(planned(problem), device)
    assert all(launch.shared <= device.shared_memory for launch in plan.launches), plan
    tensors = {"bias": problem.bias, "log_diagonal": problem.log_diagonal}
    run(plan, problem.input, problem.other, output, **tensors, seed=seed)
    return output


def planned(problem: registry.OperatorCall) -> ProblemSpec:
    """Returns the problem of a call; tensors may be on the device "meta"."""
    return ProblemSpec.of(problem, _output(problem))


def _output(problem: registry.OperatorCall) -> Tensor:
    input = problem.input
    if problem.operation == "log_abs_det":
        return input.new_empty(len(input), dtype=torch.promote_types(input.dtype, torch.float32))
    if problem.operation != "weight_gradient":
        return torch.empty_like(input)
    channels = input.shape[1]
    return input.new_empty(channels, channels // len(problem.stencils), *problem.kernel_size)


def run(
    plan: LaunchPlan,
    first: Tensor,
    second: Tensor,
    output: Tensor,
    *,
    bias: Tensor | None = None,
    log_diagonal: Tensor | None = None,
    seed: int = INCREASING,
) -> None:
    """Runs every launch of a plan on CPU tensors anywhere in memory.

    Args:
        plan: What to run.
        first: The input.
        second: The weight, or the gradient.
        output: Overwritten.
        bias: Contiguous, or None.
        log_diagonal: The same.
        seed: The order of threads: `INCREASING`, `DECREASING`, or a seed from 0 on for a random order.

    Raises:
        EmulatorError: If a kernel reads or writes where it may not, waits forever, or breaks a rule of CUDA.
    """
    at_end = seed != INCREASING
    result, scratch = Memory(span(output), output.element_size(), at_end), Memory(plan.scratch, 256, at_end)
    scratch.data[: plan.zeroed] = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiles in parallel
        list(pool.map(library.library, {replace(launch.kernel, name="") for launch in plan.launches}))
    read = [None if tensor is None else _copied(tensor, at_end) for tensor in (first, second, bias, log_diagonal)]
    memories = (*read[:2], result, scratch, *read[2:])
    addresses = struct.pack("=6q", *(0 if memory is None else memory.address for memory in memories))
    for launch in plan.launches:
        launch = replace(launch, arguments=addresses + launch.arguments[POINTER_BYTES:])
        run_launch(launch, output=result, scratch=scratch, seed=seed)
    output.copy_(result.like(output))
    for name, byte in (("output", result.beyond(output)), ("scratch", scratch.beyond())):
        if byte is not None:
            raise EmulatorError(f"wrote byte {byte} of the {name}, which is not its own")


def _copied(tensor: Tensor, at_end: bool) -> Memory:
    memory = Memory(span(tensor), tensor.element_size(), at_end)
    once(memory.like(tensor)).copy_(once(tensor))
    memory.read_only()
    return memory


def run_launch(
    launch: Launch, *, output: Memory | None = None, scratch: Memory | None = None, seed: int = INCREASING
) -> None:
    """Runs a launch whose arguments start with the addresses of a call.

    Args:
        launch: What to run.
        output: Memory in which the order of accesses is checked, as in shared memory.
        scratch: The same.
        seed: The order of threads.

    Raises:
        EmulatorError: As for `run`.
    """
    compiled = library.library(launch.kernel)
    kernel = compiled[f"run_{launch.kernel.name}"]
    kernel.restype = ctypes.c_bool
    bound = ctypes.c_int.in_dll(compiled, f"launch_bound_{launch.kernel.name}").value
    assert 1 <= launch.block <= bound <= MAX_THREADS, f"{launch.block} threads of {bound} and of {MAX_THREADS}"
    assert 0 <= launch.shared <= MAX_SHARED, f"{launch.shared} bytes of shared memory, of {MAX_SHARED}"
    for blocks, most in zip(launch.grid, MAX_GRID, strict=True):
        assert 1 <= blocks <= most, f"{blocks} blocks of {most} in the grid {launch.grid}"
    size = ctypes.c_int.in_dll(compiled, "arguments_size").value
    assert len(launch.arguments) == size, f"{len(launch.arguments)} bytes for the {size} of struct Arguments"
    error = ctypes.create_string_buffer(1000)
    request = library.Launch(
        grid=launch.grid,
        block=launch.block,
        shared=launch.shared,
        output_element=1,
        arguments=launch.arguments,
        seed=seed,
        error=ctypes.addressof(error),
        error_size=len(error),
    )
    if output is not None:
        request.output, request.output_size, request.output_element = output.address, len(output.data), output.alignment
    if scratch is not None:
        request.scratch, request.scratch_size = scratch.address, len(scratch.data)
    if not kernel(ctypes.byref(request)):
        message = library.with_lines(error.value.decode(), compiled)
        raise EmulatorError(f"{launch.kernel.name} in {launch.kernel.source}: {message}")
