"""The backend of the native library's CPU kernels, csrc/cpu."""

from __future__ import annotations

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
    operation, input, weight, stencils, bias, log_diagonal, unit_diagonal, transpose, _, dilation = problem
    cached = weight.numel() * weight.element_size() <= _CACHED_WEIGHTS * len(stencils)
    if operation == "solve" or (operation == "conv" and cached):
        return native.call(operation, input, weight, bias, log_diagonal, stencils, dilation, unit_diagonal, transpose)
    return reference.run(problem)
