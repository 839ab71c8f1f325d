"""Registers the CUDA implementation of the operators with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nflows_kconv import native
from nflows_kconv.cuda.native_launcher import NativeLauncher
from nflows_kconv.cuda.python_launcher import PythonLauncher
from nflows_kconv.cuda.runtime import by_reference, runtime


def register(library: torch.library.Library, references: dict[str, Callable[..., Tensor]]) -> None:
    """Makes CUDA tensors run on the kernels, or on the references where kernels cannot run.

    The native library has registered its operators itself; it wants a planner.
    """
    if native.available:
        NativeLauncher(native.loaded(), runtime).connect()
        return
    launcher = PythonLauncher(runtime)
    for name, reference in references.items():
        library.impl(name, _either(getattr(launcher, name), reference), "CUDA")


def _either(kernel: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operator(*args: Any) -> Tensor:
        return (reference if by_reference() else kernel)(*args)

    return operator
