"""From a problem to launches that are ready to run: planned, compiled and loaded, each kernel once on each device."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from nflows_kconv.backends.cuda import cache, compiler, driver, planning
from nflows_kconv.backends.cuda.plan import Kernel, Plan, Problem


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and what the driver knows its kernels by.

    Attributes:
        plan: The launches.
        functions: The loaded function of each launch.
    """

    plan: Plan
    functions: tuple[int, ...]


class Runtime:
    """What was loaded in this process. Threads may share it.

    Args:
        driver: The module `driver`, or what stands for it in tests.
    """

    def __init__(self, driver: Any = driver) -> None:
        self._driver = driver
        self.forget()

    def load(self, problem: Problem, device: int) -> LoadedPlan:
        """Plans a problem, and compiles and loads what its plan needs and nothing needed before.

        Raises:
            RuntimeError: If a kernel does not compile or load; if there is one to load while the current stream is
                captured into a CUDA graph.
        """
        plan = planning.plan(problem, self._driver.describe(device))
        return LoadedPlan(plan, tuple(self._function(launch.kernel, device) for launch in plan.launches))

    def forget(self) -> None:
        """Drops everything, for the child of a fork: CUDA does not work there, and the lock may be held for ever."""
        self._functions: dict[tuple[Kernel, int], int] = {}
        self._modules: dict[tuple[Any, ...], int] = {}
        self._lock = threading.Lock()

    def _function(self, kernel: Kernel, device: int) -> int:
        function = self._functions.get((kernel, device))
        if function is not None:
            return function
        if self._driver.is_capturing(device):
            raise RuntimeError(
                f"the kernel {kernel.name} is first needed inside the capture of a CUDA graph, where nothing can be "
                "compiled; call nflows_kconv.warmup(module, input_shape), or the module itself, before the capture"
            )
        with self._lock:
            # The kernels of a source are compiled together.
            unit = kernel.source, kernel.constants, device
            if unit not in self._modules:
                code = _code(kernel, self._driver.describe(device).capability)
                self._modules[unit] = self._driver.load(code, device)
            function = self._driver.function(self._modules[unit], kernel.name, device)
            return self._functions.setdefault((kernel, device), function)


def why_not() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        compiler.version()
        driver.device_names()
    except ModuleNotFoundError as error:
        return f"the package cuda-bindings, which CUDA builds of torch install, is missing: {error}"
    except Exception as error:  # Whatever is wrong with the installation, there is the reference to run on.
        return f"NVRTC or the CUDA driver does not work: {error}"
    return None


@functools.cache
def told_why_not() -> str | None:
    """What `why_not` says at the first call, which tells it as a warning."""
    reason = why_not()
    if reason is not None:
        warnings.warn(f"CUDA tensors run on the slow reference implementation: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _code(kernel: Kernel, capability: tuple[int, int]) -> bytes:
    digest = compiler.digest(kernel, capability)
    code = cache.load(digest)
    if code is None:
        code = compiler.compile(kernel, capability)
        cache.store(digest, code)
    return code


runtime = Runtime()
os.register_at_fork(after_in_child=runtime.forget)
