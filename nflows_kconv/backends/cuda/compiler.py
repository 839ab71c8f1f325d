"""Compiles the kernels in csrc/cuda for a GPU and given constants, with NVRTC.

Every CUDA build of torch on PyPI installs NVRTC, the run-time compiler, and `cuda.bindings`, its Python interface. Both
are imported when something is first compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nflows_kconv.backends.cuda.plan import Kernel


def source_directory() -> Path:
    """Returns the directory of the kernels' sources: inside an installed package, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent.parent
    installed = package / "csrc" / "cuda"
    return installed if installed.exists() else package.parent / "csrc" / "cuda"


def version() -> tuple[int, int]:
    """Returns the major and minor version of NVRTC.

    Raises:
        ImportError: If `cuda.bindings` is not installed.
        RuntimeError: If NVRTC is not installed or does not load.
    """
    nvrtc = _nvrtc()
    major, minor = _call(nvrtc.nvrtcVersion)
    return major, minor


def why_not(capability: tuple[int, int], supported: tuple[int, int]) -> str | None:
    """Returns why a GPU cannot run code from NVRTC; None if it can.

    Args:
        capability: Compute capability of the GPU.
        supported: CUDA version that its driver supports.
    """
    nvrtc, least = version(), divmod(max(70, min(_architectures())), 10)  # kernels need 7.0, for acquire and release
    if capability < least:
        what = "the GPU must have compute capability {}.{} or higher for the kernels and NVRTC {}.{}, got {}.{}"
        return what.format(*least, *nvrtc, *capability)
    # A driver loads machine code of any compiler of its major version, but assembles PTX of earlier compilers only.
    needed = nvrtc if _architecture(capability)[1] else (nvrtc[0], 0)
    if supported < needed:
        what = "the driver must support CUDA {}.{} or higher for NVRTC {}.{} and compute capability {}.{}, got {}.{}"
        return what.format(*needed, *nvrtc, *capability, *supported)
    return None


def digest(kernel: Kernel, capability: tuple[int, int]) -> str:
    """Returns a digest that identifies the code that `compile` returns.

    Raises:
        ImportError: If `cuda.bindings` is not installed.
        RuntimeError: If NVRTC does not load.
    """
    program = _program(kernel, capability)
    parts = [
        repr(version()).encode(),
        program.source,
        *(option.encode() for option in program.options),
        *(part for name, text in program.headers.items() for part in (name.encode(), text)),
    ]
    lengths = repr([len(part) for part in parts]).encode()
    return hashlib.sha256(b"".join([lengths, *parts])).hexdigest()


def compile(kernel: Kernel, capability: tuple[int, int]) -> bytes:
    """Compiles a kernel to a cubin, or to PTX if NVRTC does not know the GPU yet.

    Args:
        kernel: What to compile.
        capability: Compute capability of the GPU, (9, 0) for an H100, that `why_not` accepts.

    Raises:
        ImportError: If `cuda.bindings` is not installed.
        RuntimeError: If the kernel does not compile, with the compiler's log; if NVRTC does not load.
    """
    nvrtc = _nvrtc()
    program = _program(kernel, capability)
    names = [name.encode() for name in program.headers]
    texts = list(program.headers.values())
    options = [option.encode() for option in program.options]
    (handle,) = _call(nvrtc.nvrtcCreateProgram, program.source, kernel.source.encode(), len(names), texts, names)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle)
            raise RuntimeError(
                "NVRTC {}.{} could not compile {} with {}:\n{}".format(
                    *version(), kernel.source, " ".join(program.options), log.rstrip(b"\0\n").decode(errors="replace")
                )
            )
        if program.virtual:
            return _output(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, handle)
        return _output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


class _Program(NamedTuple):
    """The input of NVRTC: a source, its headers by name, options, and whether the architecture is virtual."""

    source: bytes
    headers: dict[str, bytes]
    options: tuple[str, ...]
    virtual: bool


def _program(kernel: Kernel, capability: tuple[int, int]) -> _Program:
    directory = source_directory()
    headers = {path.name: path.read_bytes() for path in sorted(directory.glob("*.cuh"))}
    architecture, virtual = _architecture(capability)
    target = f"--gpu-architecture={'compute' if virtual else 'sm'}_{architecture}"
    definitions = (f"-D{name}={value}" for name, value in kernel.constants)
    source = (directory / kernel.source).read_bytes()
    return _Program(source, headers, ("--std=c++17", target, *definitions), virtual)


def _architecture(capability: tuple[int, int]) -> tuple[int, bool]:
    """Returns the architecture to compile for, and whether it is virtual, so that the driver assembles the code."""
    known, wanted = _architectures(), 10 * capability[0] + capability[1]
    return max(architecture for architecture in known if architecture <= wanted), wanted not in known


def _architectures() -> list[int]:
    (known,) = _call(_nvrtc().nvrtcGetSupportedArchs)
    return known


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _call(function: Callable[..., Any], *args: Any) -> list[Any]:
    error, *values = function(*args)
    if error != type(error).NVRTC_SUCCESS:
        raise RuntimeError(f"{function.__name__} failed: {error.name}")
    return values


def _output(size: Callable[..., Any], get: Callable[..., Any], handle: Any) -> bytes:
    buffer = bytearray(_call(size, handle)[0])
    _call(get, handle, buffer)
    return bytes(buffer)
