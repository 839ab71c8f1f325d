"""Plans, compiles and loads the kernels of a problem, each kernel once per device."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nflows_kconv.backends.cuda import cache, compiler, driver, planning
from nflows_kconv.backends.cuda.plan import Kernel, LaunchPlan, ProblemSpec

# Compiled, or read from the cache, before the first call: NVRTC may load and lack what it loads only to compile.
_ONES = (1, 1, 1, 1)
_DIAGONAL = ProblemSpec("log_abs_det", torch.float32, _ONES, (1, 1), (0,), False, False, _ONES, _ONES, _ONES)
_TRIAL = planning.plan_log_abs_det(_DIAGONAL).launches[0].kernel


class LoadedPlan(NamedTuple):
    """A plan with the driver's handle of each launch's function."""

    plan: LaunchPlan
    functions: tuple[int, ...]


class Runtime:
    """Everything loaded in this process. Threads may share it.

    Args:
        driver: The module `driver`, or a substitute in tests.
    """

    def __init__(self, driver: Any = driver) -> None:
        self._driver = driver
        self.forget()

    def load(self, problem: ProblemSpec, device: int) -> LoadedPlan:
        """Plans a problem, and compiles and loads the kernels that are not loaded yet.

        Raises:
            RuntimeError: If a kernel does not compile or load, or must be loaded while the current stream is captured
                into a CUDA graph.
        """
        plan = planning.plan(problem, self._driver.describe(device))
        kernels = dict.fromkeys(launch.kernel for launch in plan.launches)
        missing = [kernel for kernel in kernels if (kernel, device) not in self._functions]
        if missing:
            self._add(missing, device)
        return LoadedPlan(plan, tuple(self._functions[launch.kernel, device] for launch in plan.launches))

    def forget(self) -> None:
        """Drops everything, for the child of a fork, where CUDA does not work and locks may be held forever."""
        self._functions: dict[tuple[Kernel, int], int] = {}
        self._modules: dict[tuple[Kernel, int], int] = {}
        self._locks: dict[Kernel, threading.Lock] = {}

    def _add(self, kernels: Sequence[Kernel], device: int) -> None:
        if self._driver.is_capturing(device):
            raise RuntimeError(
                f"kernel {kernels[0].name} must be compiled before the capture of a CUDA graph: first call "
                "nflows_kconv.warmup(module, input_shape), or the module itself"
            )
        # The kernels of one source are compiled together, and several sources in parallel.
        sources = dict.fromkeys(replace(kernel, name="") for kernel in kernels)
        with ThreadPoolExecutor(len(sources)) as pool:
            list(pool.map(self._load_source, sources, itertools.repeat(device)))
        for kernel in kernels:
            module = self._modules[replace(kernel, name=""), device]
            self._functions[kernel, device] = self._driver.function(module, kernel.name, device)

    def _load_source(self, source: Kernel, device: int) -> None:
        with self._locks.setdefault(source, threading.Lock()):  # other threads may load it too
            if (source, device) not in self._modules:
                code = _code(source, self._driver.describe(device).capability)
                self._modules[source, device] = self._driver.load(code, device)


def why_not(device: int | None = None) -> str | None:
    """Returns why the kernels cannot run here, or on a device; None if they can."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        compiler.version()
        driver.device_names()
        if device is not None:
            capability = driver.describe(device).capability
            reason = compiler.why_not(capability, driver.version())
            if reason is None:
                _code(_TRIAL, capability)
            return reason
    except ModuleNotFoundError as error:
        return f"the package cuda-bindings, which CUDA builds of torch install, is missing: {error}"
    except Exception as error:  # The reference still runs, whatever is wrong with the installation.
        return f"NVRTC or the CUDA driver does not work: {error}"
    return None


@functools.cache
def told_why_not(device: int) -> str | None:
    """Returns `why_not` of a device as of the first call, and warns at that call."""
    reason = why_not(device)
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
