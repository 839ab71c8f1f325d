"""Backends: which can run here, which will, and why. New ones register below.

registry     what an operator call is; asks the backends in the order of registration here
reference    plain PyTorch: every stencil, dimension and device
products     solves images by matrix products, also on a GPU if no kernel can
cpu          the kernels under csrc/cpu, in the native library
cuda         the kernels under csrc/cuda, compiled at run time
planes       solves volumes plane by plane
polyphase    runs dilated calls as undilated ones, for backends without dilated kernels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nflows_kconv.backends import cpu, cuda, native, reference
from nflows_kconv.backends.registry import Implementation, Status, register, registered, use_backend

__all__ = ["Backend", "available_backends", "selected_backends", "use_backend"]


@dataclass(frozen=True)
class Backend:
    """A backend, printed as `cpu (cpu): selected, AVX-512, 8 threads`.

    Attributes:
        name: "cpu", "cuda" or "reference", as `use_backend` takes it.
        device: The device type of its tensors, or "any".
        available: Whether it can run here.
        selected: Whether tensors of some device here will run on it.
        reason: What it runs with, or why it is not available or not selected.
    """

    name: str
    device: str
    available: bool
    selected: bool
    reason: str

    def __str__(self) -> str:
        """Returns a readable line."""
        state = "selected" if self.selected else "available" if self.available else "not available"
        return f"{self.name} ({self.device}): {state}, {self.reason}"


def available_backends() -> dict[str, Backend]:
    """Returns, by name, whether each backend can and will run here, and why or why not.

    Examples:
        >>> from nflows_kconv import available_backends
        >>> for backend in available_backends().values():
        ...     print(backend)
        cpu (cpu): ...
        cuda (cuda): ...
        reference (...): ...
    """
    selected = set(selected_backends().values())
    backends = {}
    for each in registered():
        available, reason = each.status()
        backends[each.name] = Backend(each.name, each.device, available, each.name in selected, reason)
    return backends


def selected_backends() -> dict[str, str]:
    """Returns the name of the backend that runs the tensors of each device type here."""
    return {
        device: next(each.name for each in registered() if each.device in (device, "any") and each.status().available)
        for device in _devices()
    }


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _reference_status() -> Status:
    served = {each.device for each in registered() if each.device != "any" and each.status().available}
    devices = [device for device in _devices() if device not in served]
    return Status(True, f"plain PyTorch for {' and '.join(devices)} tensors" if devices else "no device here needs it")


register(Implementation("cpu", "cpu", cpu.status, cpu.why_not, cpu.run, cpu.attempt if native.available else None))
register(Implementation("cuda", "cuda", cuda.status, cuda.why_not, cuda.run))
register(Implementation("reference", "any", _reference_status, reference.why_not, reference.run))
