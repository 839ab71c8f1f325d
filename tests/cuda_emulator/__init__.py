"""Runs plans of CUDA kernels on the CPU: compiles their sources as C++, with a fiber for every CUDA thread.

It is made to show mistakes, see emulator.cpp. Beyond what that finds inside a kernel, memory that a kernel may not
touch lies behind guard pages, and memory that nobody wrote reads as NaN.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nflows_kconv.cuda import compiler, planning
from nflows_kconv.cuda.plan import Device, Kernel, Launch, Plan, Problem

H100 = Device((9, 0), 132, 232448)

# Orders of threads: increasing, decreasing, and random ones, which any seed from 0 on gives.
INCREASING, DECREASING = -1, -2
ORDERS = (INCREASING, DECREASING, 0, 1)

_HERE = Path(__file__).parent
_SOURCES = compiler.source_directory()
_CACHE = _HERE.parents[1] / ".pytest_cache" / "cuda_emulator"
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
_KERNEL_FLAGS = (
    *("-g1", "-gdwarf-4"),  # lines, as addr2line reads them
    "-fsanitize=thread",  # calls of emulator.cpp at every access to memory
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,bool,null,float-cast-overflow",
    "-fsanitize-undefined-trap-on-error",
)

# What every GPU allows, but for the shared memory, which is that of the largest one.
MAX_SHARED = 232448
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)


_COMPILER = "g++"  # others instrument accesses to memory in other ways
needs_compiler = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(_COMPILER) is None, reason="the emulator of CUDA needs Linux and g++"
)


class EmulatorError(RuntimeError):
    """A kernel did what no CUDA kernel may do."""


def call(
    operation: str,
    first: Tensor,
    second: Tensor,
    corners: Sequence[int],
    *,
    transpose: bool = False,
    kernel_size: Sequence[int] | None = None,
    device: Device = H100,
    seed: int = INCREASING,
) -> Tensor:
    """Plans and runs one call of the primitive as the CUDA backend does.

    Args:
        operation: "conv", "solve" or "weight_gradient".
        first: The input, [B, C, H, W], not empty.
        second: The weight, or the gradient.
        corners: One a channel group.
        transpose: Of conv and solve.
        kernel_size: Of weight_gradient.
        device: Which GPU to plan for.
        seed: The order of threads.

    Returns:
        The output.
    """
    output = _output(operation, first, corners, kernel_size)
    made = planning.plan(problem(operation, first, second, corners, transpose, kernel_size), device)
    run(made, first, second, output, seed=seed)
    return output


def problem(
    operation: str,
    first: Tensor,
    second: Tensor,
    corners: Sequence[int],
    transpose: bool = False,
    kernel_size: Sequence[int] | None = None,
) -> Problem:
    """The problem of a call; tensors on the device "meta" will do."""
    size = tuple(kernel_size or second.shape[2:])
    strides = (first.stride(), second.stride(), _output(operation, first, corners, kernel_size).stride())
    return Problem(operation, first.dtype, tuple(first.shape), size, tuple(corners), transpose, *strides)


def _output(operation: str, first: Tensor, corners: Sequence[int], kernel_size: Sequence[int] | None) -> Tensor:
    if operation != "weight_gradient":
        return torch.empty_like(first)
    assert kernel_size is not None
    channels = first.shape[1]
    return first.new_empty(channels, channels // len(corners), *kernel_size)


def run(plan: Plan, first: Tensor, second: Tensor, output: Tensor, *, seed: int = INCREASING) -> None:
    """Runs every launch of a plan on CPU tensors; they may lie anywhere.

    Args:
        plan: What to run.
        first: The input.
        second: The weight, or the gradient.
        output: Overwritten.
        seed: The order of threads: `INCREASING`, `DECREASING`, or a seed from 0 on for a random order.

    Raises:
        EmulatorError: If a kernel reads or writes where it may not, waits for ever, or breaks a rule of CUDA.
    """
    at_end = seed != INCREASING
    memories = [_Memory(_span(tensor), tensor.element_size(), at_end) for tensor in (first, second, output)]
    memories.append(_Memory(plan.scratch, 256, at_end))
    for tensor, memory in zip((first, second), memories, strict=False):
        _once(memory.like(tensor)).copy_(_once(tensor))
        memory.make_read_only()
    result, scratch = memories[2:]
    scratch.data[: plan.zeroed] = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # what is compiled, all at once
        list(pool.map(_library, {launch.kernel for launch in plan.launches}))
    for launch in plan.launches:
        _run(launch, memories, seed)
    output.copy_(result.like(output))
    result.like(output, _INTEGERS[output.element_size()]).fill_(-1)
    scratch.data.fill_(255)
    for name, memory in (("output", result), ("scratch", scratch)):
        wrong = (memory.all != 255).nonzero()
        if len(wrong):
            raise EmulatorError(f"wrote byte {wrong[0].item() - memory.start} of the {name}, which is not its own")


_GUARD = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Memory:
    """Memory between two pages that nothing may touch, filled with NaN.

    Attributes:
        all: All of it, as bytes.
        data: The bytes asked for, at the start or at the end.
        start: Where these start.
        alignment: Of these.
        address: Of these.
    """

    def __init__(self, size: int, alignment: int, at_end: bool) -> None:
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        whole = torch.frombuffer(mmap.mmap(-1, self._size + 2 * _GUARD, private), dtype=torch.uint8)
        self._begin = whole.data_ptr() + _GUARD
        for guard in (self._begin - _GUARD, self._begin + self._size):
            _protect(guard, _GUARD, 0)
        self.all = whole[_GUARD : _GUARD + self._size]
        self.all.fill_(255)
        self.alignment = alignment
        self.start = (self._size - size) // alignment * alignment if at_end else 0
        self.data = self.all[self.start : self.start + size]
        self.address = self._begin + self.start

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The data as elements with the shape and strides of a tensor."""
        return self.data.view(dtype or tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def make_read_only(self) -> None:
        _protect(self._begin, self._size, mmap.PROT_READ)


def _protect(address: int, size: int, protection: int) -> None:
    if size and _libc.mprotect(address, size, protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _once(tensor: Tensor) -> Tensor:
    """The tensor without the elements that expanding it repeats."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _run(launch: Launch, memories: Sequence[_Memory], seed: int) -> None:
    library = _library(launch.kernel)
    bound = ctypes.c_int.in_dll(library, "launch_bound").value
    assert 1 <= launch.block <= bound <= MAX_THREADS, f"{launch.block} threads of {bound} and of {MAX_THREADS}"
    assert 0 <= launch.shared <= MAX_SHARED, f"{launch.shared} bytes of shared memory, of {MAX_SHARED}"
    for blocks, most in zip(launch.grid, MAX_GRID, strict=True):
        assert 1 <= blocks <= most, f"{blocks} blocks of {most} in the grid {launch.grid}"
    addresses = [memory.address for memory in memories]
    arguments = struct.pack("=4q", *addresses) + launch.arguments[32:]
    expected = ctypes.c_int.in_dll(library, "arguments_size").value
    assert len(arguments) == expected, f"{len(arguments)} bytes for the {expected} of struct Arguments"
    error = ctypes.create_string_buffer(1000)
    output, scratch = memories[2:]
    request = _Launch(
        grid=launch.grid,
        block=launch.block,
        shared=launch.shared,
        output_element=output.alignment,
        output=output.address,
        output_size=len(output.data),
        scratch=scratch.address,
        scratch_size=len(scratch.data),
        arguments=arguments,
        seed=seed,
        error=ctypes.addressof(error),
        error_size=len(error),
    )
    if not library.run(ctypes.byref(request)):
        message = re.sub("<([0-9a-f]+)>", functools.partial(_line, Path(library._name)), error.value.decode())
        raise EmulatorError(f"{launch.kernel.name} in {launch.kernel.source}: {message}")


class _Launch(ctypes.Structure):
    """`struct Launch` of emulator.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_int),
        ("output_element", ctypes.c_int),
        ("output", ctypes.c_void_p),
        ("output_size", ctypes.c_longlong),
        ("scratch", ctypes.c_void_p),
        ("scratch_size", ctypes.c_longlong),
        ("arguments", ctypes.c_char_p),
        ("seed", ctypes.c_longlong),
        ("error", ctypes.c_void_p),
        ("error_size", ctypes.c_longlong),
    )


def _line(library: Path, offset: re.Match[str]) -> str:
    """Where in the sources the code at an offset comes from."""
    command = ["addr2line", "-i", "-e", str(library), offset[1]]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return offset[0]


@functools.cache
def _library(kernel: Kernel) -> ctypes.CDLL:
    source = _SOURCES / kernel.source
    constants = "\n".join(f"#define {name} {value}" for name, value in kernel.constants)
    bound = re.search(rf"__launch_bounds__\((\w+)(?:, \w+)?\)\s+{kernel.name}\(", source.read_text())
    assert bound, f"{kernel.source} must define {kernel.name} with __launch_bounds__(THREADS)"
    code = f"""
        #include "emulator.h"
        {constants}
        #include "{source}"
        extern "C" const int arguments_size = sizeof(Arguments), launch_bound = {bound[1]};
        extern "C" bool run(const emulator::Launch& launch) {{
          return emulator::execute([](const void* a) {{ {kernel.name}(*static_cast<const Arguments*>(a)); }}, launch);
        }}
    """
    runtime = _compiled((_HERE / "emulator.cpp").read_text(), (), [_HERE / "emulator.h", _HERE / "races.h"])
    files = [source, *sorted(_SOURCES.glob("*.cuh")), _HERE / "emulator.h", _HERE / "ptx.cuh"]
    program = _compiled(code, _KERNEL_FLAGS, files)
    library = program.with_name(f"{program.stem}-{runtime.stem}.so")
    _make(library, ["-shared", str(program), str(runtime)])
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_bool
    return loaded


def _compiled(code: str, flags: Sequence[str], files: Sequence[Path]) -> Path:
    """Compiles C++ that includes files to an object file whose name is as unique as these."""
    command = [*_FLAGS, *flags, f"-I{_HERE}", f"-I{_SOURCES}", "-c"]
    parts = [_COMPILER, *command, code, *(file.read_text() for file in files)]
    path = _CACHE / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.o"
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".cpp")
    source.write_text(code)
    _make(path, [*command, str(source)])
    return path


def _make(path: Path, arguments: Sequence[str]) -> None:
    """Runs the compiler for a file, unless it is there."""
    if path.exists():
        return
    unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    done = subprocess.run([_COMPILER, *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"{_COMPILER} {' '.join(arguments)} failed:\n{done.stderr}")
    unfinished.replace(path)
