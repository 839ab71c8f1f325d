"""The CPU backend: kernels of the native library, from csrc/cpu."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache

import torch
from torch import Tensor

from nflows_kconv import stencil
from nflows_kconv.backends import native, reference
from nflows_kconv.backends.native import Options, Outcome
from nflows_kconv.backends.registry import OperatorCall, Status
from nflows_kconv.torch_internals import address

# The stencils of csrc/cpu/stencil.h.
_STENCILS = frozenset((*stencil.parse(stencil.CORNERS[3], 3), *stencil.parse(("T", "B", "L", "R"))))
_pack = struct.Struct("6P").pack  # `Arguments` of csrc/cpu_caller.cpp
_INSTRUCTION_SET_NAMES = {"baseline": "baseline instructions", "avx2": "AVX2", "avx512": "AVX-512"}


def status() -> Status:
    """Returns whether the native library is available, with its instruction set and threads."""
    if not native.available:
        return Status(False, native.reason)
    threads = torch.get_num_threads()
    name = _INSTRUCTION_SET_NAMES[native.instruction_set()]
    return Status(True, f"{name}, {threads} thread{'s' * (threads != 1)}")


def why_not(call: OperatorCall) -> str | None:
    """Returns why the native library cannot run a call; None if it can."""
    if not native.available:
        return native.reason
    return None if _STENCILS.issuperset(call.stencils) else "it has no kernel for a stencil"


def run(call: OperatorCall) -> Tensor:
    """Runs a call, on torch's own convolutions where they are as fast."""
    if call.operation not in ("conv", "solve"):
        return reference.run(call)
    operation, input, weight, stencils, bias, log_diagonal, unit_diagonal, transpose, _, dilation = call
    dtype = torch.promote_types(input.dtype, torch.float32)
    weight = weight.to(dtype).contiguous()
    bias, log_diagonal = (None if t is None else t.to(dtype).contiguous() for t in (bias, log_diagonal))
    options = tuple(stencils), tuple(dilation), unit_diagonal, transpose
    output = attempt(operation, input.to(dtype), weight, bias, log_diagonal, *options)
    if output is not None:
        return output.to(input.dtype)
    for tensor in (input, weight, bias, log_diagonal):
        if tensor is not None and tensor.numel() and not tensor.data_ptr():  # sharding libraries do that
            raise RuntimeError("the memory of a tensor must not have been freed")
    return reference.run(call)  # as fast, or raises the error about the diagonal


def attempt(
    operation: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_diagonal: Tensor | None,
    stencils: tuple[int, ...],
    dilation: tuple[int, ...],
    unit_diagonal: bool,
    transpose: bool,
) -> Tensor | None:
    """Runs a call on unchecked tensors; see `registry.Implementation`."""
    if not input.is_cpu:
        return None
    options = _options(operation, stencils, dilation, unit_diagonal, transpose)
    if options is None:
        return None
    try:
        output = torch.empty_like(input)
    except RuntimeError:  # of some tensors that are not dense, or out of memory: the checked call tells
        return None
    outcome = native.run_kernel(
        _pack(
            options.address,
            address(input),
            address(output),
            address(weight),
            0 if bias is None else address(bias),
            0 if log_diagonal is None else address(log_diagonal),
        )
    )
    if outcome == 0:  # faster than comparing with the enumeration
        return output
    if outcome == Outcome.OUT_OF_MEMORY:
        raise RuntimeError("out of memory for the buffers of the CPU kernel")
    return None


@lru_cache(maxsize=256)
def _options(
    operation: str, stencils: tuple[int, ...], dilation: tuple[int, ...], unit_diagonal: bool, transpose: bool
) -> Options | None:
    """Returns what does not depend on the tensors; None without a kernel for these stencils."""
    if not _STENCILS.issuperset(stencils):
        return None
    dimensions, groups = len(dilation), len(stencils)
    steps = (1,) * (3 - dimensions) + dilation
    codes = (ctypes.c_int64 * groups)(*stencils)
    return Options(codes, groups, dimensions, steps, unit_diagonal, transpose, operation == "solve")
