"""The implementations of the convolution and its inverse: which can run here, which will, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nflows_kconv import native
from nflows_kconv.cuda import compiler, driver, runtime

_INSTRUCTION_SET_NAMES = {"baseline": "baseline instructions", "avx2": "AVX2", "avx512": "AVX-512"}


@dataclass(frozen=True)
class Backend:
    """One implementation, as `print` shows it: `native (cpu): selected, AVX-512, 8 threads`.

    Attributes:
        name: "native", "cuda" or "reference".
        device: The type of the tensors it is for, "any" for every type.
        available: Whether it can run here.
        selected: Whether tensors of some device that is present will run on it.
        reason: What it runs with, or why it cannot run or is not selected.
    """

    name: str
    device: str
    available: bool
    selected: bool
    reason: str

    def __str__(self) -> str:
        """One line for people."""
        state = "selected" if self.selected else "available" if self.available else "not available"
        return f"{self.name} ({self.device}): {state}, {self.reason}"


def available_backends() -> dict[str, Backend]:
    """Tells for every backend, by name, whether it can and will run here, and why or why not.

    Examples:
        >>> from nflows_kconv import available_backends
        >>> for backend in available_backends().values():
        ...     print(backend)
        native (cpu): ...
        cuda (cuda): ...
        reference (...): ...
    """
    return {backend.name: backend for backend in (_native(), _cuda(), _reference())}


def selected_backends() -> dict[str, str]:
    """The name of the backend that tensors will run on, for each type of device present."""
    selected = {"cpu": "native" if native.available else "reference"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kernels = accelerator.type == "cuda" and runtime.why_not() is None
        selected[accelerator.type] = "cuda" if kernels else "reference"
    return selected


def _native() -> Backend:
    if not native.available:
        return Backend("native", "cpu", False, False, native.reason)
    threads = torch.get_num_threads()
    runs_with = f"{_INSTRUCTION_SET_NAMES[native.instruction_set()]}, {threads} thread{'s' * (threads != 1)}"
    return Backend("native", "cpu", True, True, runs_with)


def _cuda() -> Backend:
    reason = runtime.why_not()
    if reason is not None:
        return Backend("cuda", "cuda", False, False, reason)
    names = ", ".join(dict.fromkeys(driver.device_names()))
    launcher = "C++" if native.available else f"Python, slower, since the native library is missing: {native.reason}"
    runs_with = "{}, compiled at run time by NVRTC {}.{}, launched from {}".format(names, *compiler.version(), launcher)
    return Backend("cuda", "cuda", True, True, runs_with)


def _reference() -> Backend:
    devices = [device for device, name in selected_backends().items() if name == "reference"]
    reason = f"plain PyTorch for {' and '.join(devices)} tensors" if devices else "no device here needs it"
    return Backend("reference", "any", True, bool(devices), reason)
