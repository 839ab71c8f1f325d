"""Types for planning on a GPU: a problem, and the plan of kernel launches that solves it.

Nothing here touches a GPU: plans are made, packed and tested anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import registry

Strides = tuple[int, int, int, int]

# Kernels are chosen for the nearest of these numbers of images, and of groups above four, by ratio, so a few kernels
# serve all.
_TYPICAL = (1, 6, 25, 100, 400, 1600)

POINTER_BYTES = 6 * 8  # first, second, output, scratch, bias, log_diagonal


class Arguments(ctypes.Structure):
    """`struct Arguments` of arguments.cuh, except for its last field, the words of `corners`."""

    _fields_ = (
        ("pointers", ctypes.c_byte * POINTER_BYTES),
        ("strides", ctypes.c_int64 * 12),
        ("sizes", ctypes.c_int32 * 4),
        ("kernel_size", ctypes.c_int32 * 2),
        ("parameters", ctypes.c_int32 * 8),
        ("offsets", ctypes.c_int64 * 4),
        ("last_column", ctypes.c_int32),
        ("unit_diagonal", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that plans depend on.

    Attributes:
        capability: Compute capability, (9, 0) for an H100.
        multiprocessors: Number of multiprocessors.
        shared_memory: Most bytes of shared memory that a thread block may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class ProblemSpec:
    """Everything about a call that its kernels depend on: sizes, strides and options, but no data. No size is zero.

    Attributes:
        operation: See `OperatorCall`.
        dtype: Of all tensors: float32, float64, float16 or bfloat16.
        shape: (B, C, H, W) of the images.
        kernel_size: (kh, kw).
        stencils: One per channel group, all of one family, without exchanged axes.
        unit_diagonal: Whether the pivot's diagonal counts as 1, or has no gradient; see `ops`.
        transpose: Whether A^T stands for A; False for weight gradients.
        first_strides: Of the input, in elements.
        second_strides: Of the weight, or of the gradient.
        output_strides: Of the output.
        bias: Whether there is one, contiguous: y = A x + b, x = A^-1 (y - b).
    """

    operation: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    kernel_size: tuple[int, int]
    stencils: tuple[int, ...]
    unit_diagonal: bool
    transpose: bool
    first_strides: Strides
    second_strides: Strides
    output_strides: Strides
    bias: bool = False

    @classmethod
    def of(cls, call: registry.OperatorCall, output: Tensor) -> ProblemSpec:
        """Returns the problem of a two-dimensional call without dilation that writes this output."""
        sizes = map(tuple, (call.input.shape, call.kernel_size, call.stencils))
        strides = (tensor.stride() for tensor in (call.input, call.other, output))
        fields: Any = [*sizes, call.unit_diagonal, call.transpose, *strides, call.bias is not None]
        return cls(call.operation, call.input.dtype, *fields)

    @property
    def typical(self) -> ProblemSpec:
        """The problem with typical sizes, to select kernels; grids, scratch and arguments use the real ones."""
        groups = self.few_groups or _nearest(len(self.stencils))
        shape = (_nearest(self.shape[0]), self.channels * groups, *self.shape[2:])
        return replace(self, shape=shape, stencils=self.stencils[:1] * groups)

    @property
    def few_groups(self) -> int:
        """The number of groups up to four, else 0.

        Kernels for more serve any number, because images with weights of their own are groups.
        """
        return len(self.stencils) if len(self.stencils) <= 4 else 0

    @property
    def channels(self) -> int:
        """Channels of a group."""
        return self.shape[1] // len(self.stencils)

    @property
    def taps(self) -> tuple[int, int]:
        """(kh, kw) without taps that read only padding."""
        left = min(self._pivot_column, self.shape[3] - 1)
        return self._tap_rows, left + 1 + self.right

    @property
    def right(self) -> int:
        """How far to the right a pixel reads in the rows before it, in the canonical frame."""
        return min(self.kernel_size[1] - 1 - self._pivot_column, self.shape[3] - 1) if self._tap_rows > 1 else 0

    @property
    def tau(self) -> int:
        """The schedule: pixels with equal tau * row + column can be solved at once."""
        return stencil.schedule([(1, -self.right), (0, 1)])[0]

    @property
    def last_column(self) -> int:
        """The kernel's last column in memory, before mirroring: the tap that reads farthest to the right."""
        return self._pivot_column + self.right

    @property
    def _tap_rows(self) -> int:
        return min(self.kernel_size[0], self.shape[2])

    @property
    def _pivot_column(self) -> int:
        return stencil.pivot(stencil.family(self.stencils[0]), self.kernel_size)[1]

    @property
    def accumulator_bytes(self) -> int:
        """Size of the type that the kernels compute in."""
        return 8 if self.dtype == torch.float64 else 4


@dataclass(frozen=True)
class Kernel:
    """A kernel with its constants; equal ones are compiled once.

    Attributes:
        source: File under csrc/cuda.
        name: The `extern "C"` function in it.
        constants: Preprocessor definitions, sorted by name.
    """

    source: str
    name: str
    constants: tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: What to launch.
        grid: Thread blocks.
        block: Threads a block.
        shared: Bytes of dynamic shared memory.
        arguments: `struct Arguments` of arguments.cuh as bytes; its pointers, the first `POINTER_BYTES`, are zero.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared: int
    arguments: bytes


@dataclass(frozen=True)
class LaunchPlan:
    """The launches that solve a problem, in order on one stream.

    Attributes:
        launches: What to launch.
        scratch: Bytes of scratch memory they share.
        zeroed: Bytes at the start of the scratch that must be zero before the first launch.
    """

    launches: tuple[Launch, ...]
    scratch: int = 0
    zeroed: int = 0


def ceil_div(dividend: int, divisor: int) -> int:
    """Returns the quotient rounded up."""
    return -(-dividend // divisor)


def _nearest(size: int) -> int:
    return min(_TYPICAL, key=lambda typical: max(typical / size, size / typical))


def aligned(offset: int) -> int:
    """Returns the next aligned offset in the scratch."""
    return 256 * ceil_div(offset, 256)


_SCALARS = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "BFloat16"}


def kernel(problem: ProblemSpec, source: str, name: str, **constants: int | str) -> Kernel:
    """Returns the kernel for this problem, with `constants` in addition to those in arguments.cuh."""
    constants |= {
        "SCALAR": _SCALARS[problem.dtype],
        "CHANNELS": problem.channels,
        "KERNEL_H": problem.taps[0],
        "KERNEL_W": problem.taps[1],
        "TAU": problem.tau,
        "TRANSPOSE": int(problem.transpose),
        "CORNERS": len(_corners(problem)),
    }
    return Kernel(source, name, tuple(sorted(constants.items())))


def _corners(problem: ProblemSpec) -> tuple[int, ...]:
    """Returns the stencils that groups take in turn.

    They are 16 for up to 16 groups, zeros after the last; else one period, repeated up to 16.
    """
    codes, count = problem.stencils, len(problem.stencils)
    if count <= 16:
        return codes + (0,) * (16 - count)
    turn = next(codes[:n] for n in range(1, count + 1) if codes[:n] * (count // n) == codes)
    return turn * max(1, 16 // len(turn))


def arguments(problem: ProblemSpec, parameters: Sequence[int] = (), offsets: Sequence[int] = ()) -> bytes:
    """Returns `struct Arguments` of arguments.cuh as bytes, with zero pointers."""
    batch, _, height, width = problem.shape
    codes = _corners(problem)
    words = [sum((code & 3) << 2 * i for i, code in enumerate(codes[at : at + 16])) for at in range(0, len(codes), 16)]
    fields = Arguments(
        strides=(*problem.first_strides, *problem.second_strides, *problem.output_strides),
        sizes=(batch, height, width, len(problem.stencils)),
        kernel_size=problem.kernel_size,
        parameters=tuple(parameters),
        offsets=tuple(offsets),
        last_column=problem.last_column,
        unit_diagonal=problem.unit_diagonal,
    )
    packed = bytes(fields) + bytes((ctypes.c_uint32 * len(words))(*words))
    return packed + b"\0" * (-len(packed) % 8)
