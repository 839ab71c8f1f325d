"""Runs plans of CUDA kernels on the CPU: compiles their sources as C++, with a fiber for every CUDA thread.

It is made to show mistakes, see emulator.cpp. Beyond what that finds inside a kernel, memory that a kernel may not
touch lies behind guard pages, and memory that nobody wrote reads as NaN.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_emulator import library
from cuda_emulator.memory import Memory, once, span
from nflows_kconv.backends.cuda import planning
from nflows_kconv.backends.cuda.plan import POINTER_BYTES, Device, Launch, Plan, Problem

H100 = Device((9, 0), 132, 232448)

# Orders of threads: increasing, decreasing, and random ones, which any seed from 0 on gives.
INCREASING, DECREASING = -1, -2
ORDERS = (INCREASING, DECREASING, 0, 1)

# What every GPU allows, but for the shared memory, which is that of the largest one.
MAX_SHARED = 232448
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)

needs_compiler = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(library.COMPILER) is None,
    reason="the emulator of CUDA needs Linux and g++",
)


class EmulatorError(RuntimeError):
    """A kernel did what no CUDA kernel may do."""


def call(
    operation: str,
    first: Tensor,
    second: Tensor,
    corners: Sequence[int],
    *,
    bias: Tensor | None = None,
    transpose: bool = False,
    kernel_size: Sequence[int] | None = None,
    device: Device = H100,
    seed: int = INCREASING,
) -> Tensor:
    """Plans and runs one call of the primitive as the CUDA backend does.

    Args:
        operation: "conv", "solve" or "weight_gradient".
        first: The input, [B, C, H, W], not empty.
        second: The weight, or the gradient.
        corners: One a channel group.
        bias: Of conv and solve.
        transpose: Of conv and solve.
        kernel_size: Of weight_gradient.
        device: Which GPU to plan for.
        seed: The order of threads.

    Returns:
        The output.
    """
    output = _output(operation, first, corners, kernel_size)
    asked = problem(operation, first, second, corners, transpose, kernel_size, bias is not None)
    plan = planning.plan(asked, device)
    assert all(launch.shared <= device.shared_memory for launch in plan.launches), plan
    run(plan, first, second, output, bias=bias, seed=seed)
    return output


def problem(
    operation: str,
    first: Tensor,
    second: Tensor,
    corners: Sequence[int],
    transpose: bool = False,
    kernel_size: Sequence[int] | None = None,
    biased: bool = False,
) -> Problem:
    """The problem of a call; tensors on the device "meta" will do."""
    size = tuple(kernel_size or second.shape[2:])
    strides = (first.stride(), second.stride(), _output(operation, first, corners, kernel_size).stride())
    return Problem(operation, first.dtype, tuple(first.shape), size, tuple(corners), transpose, *strides, biased)


def _output(operation: str, first: Tensor, corners: Sequence[int], kernel_size: Sequence[int] | None) -> Tensor:
    if operation != "weight_gradient":
        return torch.empty_like(first)
    assert kernel_size is not None
    channels = first.shape[1]
    return first.new_empty(channels, channels // len(corners), *kernel_size)


def run(
    plan: Plan, first: Tensor, second: Tensor, output: Tensor, *, bias: Tensor | None = None, seed: int = INCREASING
) -> None:
    """Runs every launch of a plan on CPU tensors; they may lie anywhere.

    Args:
        plan: What to run.
        first: The input.
        second: The weight, or the gradient.
        output: Overwritten.
        bias: Contiguous, or None.
        seed: The order of threads: `INCREASING`, `DECREASING`, or a seed from 0 on for a random order.

    Raises:
        EmulatorError: If a kernel reads or writes where it may not, waits for ever, or breaks a rule of CUDA.
    """
    at_end = seed != INCREASING
    memories = [Memory(span(tensor), tensor.element_size(), at_end) for tensor in (first, second, output)]
    memories.append(Memory(plan.scratch, 256, at_end))
    read = list(zip((first, second), memories, strict=False))
    if bias is not None:
        memories.append(Memory(span(bias), bias.element_size(), at_end))
        read.append((bias, memories[-1]))
    for tensor, memory in read:
        once(memory.like(tensor)).copy_(once(tensor))
        memory.read_only()
    result, scratch = memories[2:4]
    scratch.data[: plan.zeroed] = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # what is compiled, all at once
        list(pool.map(library.library, {replace(launch.kernel, name="") for launch in plan.launches}))
    addresses = b"".join(struct.pack("=q", memory.address) for memory in memories).ljust(POINTER_BYTES, b"\0")
    for launch in plan.launches:
        launch = replace(launch, arguments=addresses + launch.arguments[POINTER_BYTES:])
        run_launch(launch, output=result, scratch=scratch, seed=seed)
    output.copy_(result.like(output))
    for name, byte in (("output", result.beyond(output)), ("scratch", scratch.beyond())):
        if byte is not None:
            raise EmulatorError(f"wrote byte {byte} of the {name}, which is not its own")


def run_launch(
    launch: Launch, *, output: Memory | None = None, scratch: Memory | None = None, seed: int = INCREASING
) -> None:
    """Runs a launch whose arguments begin with the addresses of a call.

    Args:
        launch: What to run.
        output: Where the order of accesses is checked, as it is for shared memory.
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
