"""The backend of the native library's CPU kernels, csrc/cpu."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native, reference
from nflows_kconv.backends.registry import Problem, Status

# What csrc/cpu/stencil.h has.
_STENCILS = frozenset((*stencil.parse(stencil.CORNERS[3], 3), *stencil.parse(("T", "B", "L", "R"))))
_INSTRUCTION_SET_NAMES = {"baseline": "baseline instructions", "avx2": "AVX2", "avx512": "AVX-512"}
# Bytes of a group's weights that stay in a second-level cache. Every position reads them all, so that beyond this size
# torch's own, which holds several positions in registers, is the faster forward.
_CACHED_WEIGHTS = 1 << 20
_BAD_DIAGONAL, _OUT_OF_MEMORY = 1, 2
_SET_IN_CPP = (False, False)  # exchanged, images_differ
_PACK = struct.Struct("6P 10q 5q 4q 3q 5?").pack


def status() -> Status:
    """Whether the native library is there, and with what it runs."""
    if not native.available:
        return Status(False, native.reason)
    threads = torch.get_num_threads()
    name = _INSTRUCTION_SET_NAMES[native.instruction_set()]
    return Status(True, f"{name}, {threads} thread{'s' * (threads != 1)}")


def why_not(problem: Problem) -> str | None:
    """None where the native library is there and knows the stencils."""
    if not native.available:
        return native.reason
    return None if _STENCILS.issuperset(problem.stencils) else "it has no kernel for a stencil"


def run(problem: Problem) -> Tensor:
    """Runs a problem; what torch's own convolutions do as fast, they do."""
    if problem.operation != "solve" and not (problem.operation == "conv" and _has_few_weights(problem)):
        return reference.run(problem)
    if problem.input.dtype in native.KERNELS:
        return _run_kernel(problem)
    names = ("input", "other", "bias", "log_diagonal")
    wide = problem._replace(**{name: t.float() for name in names if (t := getattr(problem, name)) is not None})
    return _run_kernel(wide).to(problem.input.dtype)


def _has_few_weights(problem: Problem) -> bool:
    weight = problem.other
    return weight.numel() * weight.element_size() <= _CACHED_WEIGHTS * len(problem.stencils)


def _run_kernel(problem: Problem) -> Tensor:
    operation, input, weight, stencils, bias, log_diagonal, unit_diagonal, transpose, kernel_size, dilation = problem
    output = torch.empty_like(input)
    if output.numel() == 0:
        return output
    # What the kernel reads must live until it ends.
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    log_diagonal = None if log_diagonal is None else log_diagonal.contiguous()
    steps, output_steps, shape = input.stride(), output.stride(), tuple(input.shape)
    if len(shape) == 4:  # of one plane
        steps, output_steps, shape = (0, *steps), (0, *output_steps), (1, *shape)
        kernel_size, dilation = (1, *kernel_size), (1, *dilation)
    else:
        steps, output_steps, shape = map(_planes_first, (steps, output_steps, shape))
    codes = _codes(tuple(stencils))
    problem_bytes = _PACK(
        _address(input),
        _address(output),
        _address(weight),
        0 if bias is None else _address(bias),
        0 if log_diagonal is None else _address(log_diagonal),
        codes.buffer_info()[0],
        *steps,
        *output_steps,
        *shape,
        len(stencils),
        *kernel_size,
        *dilation,
        unit_diagonal,
        transpose,
        operation == "solve",
        *_SET_IN_CPP,
    )
    outcome = native.KERNELS[input.dtype](problem_bytes)
    if outcome == _OUT_OF_MEMORY:
        raise RuntimeError("not enough memory for the buffers of the CPU kernel")
    return reference.run(problem) if outcome == _BAD_DIAGONAL else output  # which tells about the diagonal


def _planes_first(numbers: Sequence[int]) -> tuple[int, ...]:
    batch, channels, planes, rows, columns = numbers
    return planes, batch, channels, rows, columns


@lru_cache(maxsize=256)
def _codes(stencils: tuple[int, ...]) -> array[int]:
    return array("q", stencils)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address:  # freed under the tensor, as sharding libraries do
        raise RuntimeError("the memory of the tensors must not have been freed")
    return address
