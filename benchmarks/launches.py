"""Returns plans, code and arguments of kernels without a GPU, for tools that analyse the machine code."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch

from nflows_kconv.backends.cuda import compiler, plan, planning


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a plan.

    Attributes:
        name: Name of the kernel.
        grid: Thread blocks.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory.
        waits: Whether its blocks wait for each other.
        kernel: The argument of `compile_kernel`; equal kernels have equal code.
        arguments: The kernel's only parameter as bytes, with zero pointers.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    waits: bool
    kernel: plan.Kernel
    arguments: bytes


@dataclass(frozen=True)
class Plan:
    """The launches of a problem, the bytes of scratch they share, and how many of these must be zero before."""

    launches: tuple[Launch, ...]
    scratch: int
    zeroed: int


def make_plan(
    operation: str,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    corners: tuple[int, ...],
    transpose: bool,
    capability: tuple[int, int],
    multiprocessors: int,
    shared_memory: int,
) -> Plan:
    """Returns the plan for contiguous float32 tensors, without a bias and with the weight's own diagonal.

    Args:
        operation: "conv", "solve" or "weight_gradient".
        shape: (B, C, H, W).
        kernel_size: (kh, kw).
        corners: One per channel group: 0 TL, 1 TR, 2 BL, 3 BR.
        transpose: Whether the transposed operator is applied.
        capability: Compute capability of the GPU.
        multiprocessors: Number of multiprocessors of the GPU.
        shared_memory: Most bytes of shared memory per thread block.
    """
    images = torch.empty(shape, device="meta").stride()
    weight = torch.empty(shape[1], shape[1] // len(corners), *kernel_size, device="meta").stride()
    second, output = (images, weight) if operation == "weight_gradient" else (weight, images)
    problem = plan.ProblemSpec(
        operation, torch.float32, shape, kernel_size, corners, False, transpose, images, second, output
    )
    chosen = planning.plan(problem, plan.Device(capability, multiprocessors, shared_memory))
    launches = tuple(
        Launch(
            launch.kernel.name,
            launch.grid,
            launch.block,
            launch.shared,
            launch.kernel.name == "solve_tiles" or bool(dict(launch.kernel.constants).get("BANDED")),
            launch.kernel,
            launch.arguments,
        )
        for launch in chosen.launches
    )
    return Plan(launches, chosen.scratch, chosen.zeroed)


def packed_arguments(launch: Launch, first: int, second: int, output: int, scratch: int) -> bytes:
    """Returns the kernel's parameter with these addresses."""
    pointers = struct.pack("=4Q", first, second, output, scratch)
    return pointers + launch.arguments[len(pointers) :]


def compile_kernel(kernel: plan.Kernel, capability: tuple[int, int], lines: bool = False) -> bytes:
    """Returns a kernel's cubin as at run time, with source lines if `lines`."""
    original = compiler._nvrtc
    if lines:
        compiler._nvrtc = lambda: _WithLines(original())
    try:
        return compiler.compile(kernel, capability)
    finally:
        compiler._nvrtc = original


def compiler_version() -> str:
    """Returns the version of NVRTC."""
    return ".".join(map(str, compiler.version()))


class _WithLines:
    """NVRTC's Python module with one more option in every compilation."""

    def __init__(self, nvrtc: Any) -> None:
        self._nvrtc = nvrtc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nvrtc, name)

    def nvrtcCompileProgram(self, program: Any, count: int, options: list[bytes]) -> Any:
        return self._nvrtc.nvrtcCompileProgram(program, count + 1, [*options, b"--generate-line-info"])
