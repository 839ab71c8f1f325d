"""Wraps the CUDA driver functions that load and launch kernels, from `cuda.bindings`.

Kernels run in the primary context of their device, as torch's do. A device is torch's index; a context, a module, a
function and a stream are the driver's handles as integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from nflows_kconv.backends.cuda.plan import Device

_DRIVER_FUNCTIONS = (
    "cuLaunchKernel",
    "cuMemsetD8Async",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuGetErrorName",
)


def device_names() -> list[str]:
    """Returns the names of the devices that this process sees.

    Raises:
        ImportError: If `cuda.bindings` is not installed.
        RuntimeError: If there is no driver, or it does not work here.
    """
    driver = _driver()
    _call(driver.cuInit, 0)
    names = [_call(driver.cuDeviceGetName, 256, _device(index)) for index in range(_call(driver.cuDeviceGetCount))]
    return [name.split(b"\0")[0].decode() for name in names]


def version() -> tuple[int, int]:
    """Returns the major and minor version of the CUDA that the driver supports."""
    number = _call(_driver().cuDriverGetVersion)
    return number // 1000, number % 1000 // 10


@cache
def describe(index: int) -> Device:
    """Returns the properties of a device that plans depend on."""
    attributes = _driver().CUdevice_attribute

    def get(name: str) -> int:
        return _call(_driver().cuDeviceGetAttribute, getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), _device(index))

    return Device(
        (get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")),
        get("MULTIPROCESSOR_COUNT"),
        get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


@cache
def context(index: int) -> int:
    """Returns the primary context of a device. Never releases it, because torch never does either."""
    return int(_call(_driver().cuDevicePrimaryCtxRetain, _device(index)))


def load(code: bytes, index: int) -> int:
    """Loads compiled code on a device and returns its module."""
    with _current(context(index)):
        return int(_call(_driver().cuModuleLoadData, code))


def function(module: int, name: str, index: int) -> int:
    """Returns a function of a module, and lets it use all shared memory of a block."""
    driver = _driver()
    with _current(context(index)):
        function = _call(driver.cuModuleGetFunction, module, name.encode())
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute, function, attribute, describe(index).shared_memory)
        return int(function)


def zero(index: int, address: int, size: int, stream: int) -> None:
    """Fills device memory with zeros."""
    driver = _driver()
    with _current(context(index)):
        _call(driver.cuMemsetD8Async, address, 0, size, stream)


def launch(
    index: int, function: int, grid: tuple[int, int, int], block: int, shared: int, arguments: bytes, stream: int
) -> None:
    """Launches a function with these bytes as its only parameter."""
    parameter = ctypes.create_string_buffer(arguments, len(arguments))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
    with _current(context(index)):
        address = ctypes.addressof(parameters)
        _call(_driver().cuLaunchKernel, function, *grid, block, 1, 1, shared, stream, address, 0)


def current_stream(index: int) -> int:
    """Returns torch's current stream."""
    return torch.cuda.current_stream(index).cuda_stream


def is_capturing(index: int) -> bool:
    """Returns whether the current stream is being captured into a CUDA graph."""
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def function_addresses() -> tuple[int, ...]:
    """Returns the addresses of the functions in `struct Driver` of csrc/cuda_launcher.h, in its order.

    Raises:
        RuntimeError: If one of them is missing.
    """
    try:
        libraries = {name: ctypes.CDLL(name) for name in ("libcuda.so.1", "libtorch_cuda.so")}
        functions = [
            *(getattr(libraries["libcuda.so.1"], name) for name in _DRIVER_FUNCTIONS),
            libraries["libtorch_cuda.so"].aoti_torch_get_current_cuda_stream,
        ]
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"a function that kernel launches need is missing: {error}") from error
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


@contextmanager
def _current(context: int) -> Iterator[None]:
    # A thread that has not used CUDA yet has no context.
    _call(_driver().cuCtxPushCurrent, context)
    try:
        yield
    finally:
        _call(_driver().cuCtxPopCurrent)


def _device(index: int) -> Any:
    return _call(_driver().cuDeviceGet, index)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _call(function: Callable[..., Any], *args: Any) -> Any:
    error, *values = function(*args)
    if error != type(error).CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__} failed: {error.name}")
    return values[0] if values else None
