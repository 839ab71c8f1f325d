"""Compiles kernels as C++ to shared libraries for the CPU that call the emulator."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from nflows_kconv.backends.cuda import compiler
from nflows_kconv.backends.cuda.plan import Kernel

COMPILER = "g++"  # other compilers instrument memory accesses differently
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "cuda_emulator"

_HERE = Path(__file__).parent
_SOURCES = compiler.source_directory()
# Of a kernel -O2 takes a quarter longer to compile and runs no faster.
_FLAGS = ("-xc++", "-std=c++17", "-O1", "-march=native", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
_KERNEL_FLAGS = (
    "-fsanitize=thread",  # calls emulator.cpp at every memory access
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,bool,null,float-cast-overflow",
    "-fsanitize-undefined-trap-on-error",
)

# Lines for addr2line. They cost a third of the compile time and move no instruction, so only an error compiles them.
_LINES = ("-g1", "-gdwarf-4")


class Launch(ctypes.Structure):
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


def with_lines(message: str, library: ctypes.CDLL) -> str:
    """Replaces <offsets> in a message of the emulator by lines of the sources."""
    return re.sub("<([0-9a-f]+)>", lambda offset: _line(library, offset[1]) or offset[0], message)


def _line(library: ctypes.CDLL, offset: str) -> str:
    command = ["addr2line", "-i", "-e", library.with_lines(), offset]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", " in ")
    except (OSError, subprocess.CalledProcessError):
        return ""


def library(kernel: Kernel) -> ctypes.CDLL:
    """Compiles a kernel with the others of its source, or finds an earlier result.

    Returns:
        For each kernel `run_NAME`, which takes a `Launch`, and `launch_bound_NAME`, its most threads; `arguments_size`.
    """
    return _library(kernel.source, kernel.constants)


@functools.cache
def _library(source: str, constants: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    path = _SOURCES / source
    definitions = "\n".join(f"#define {name} {value}" for name, value in constants)
    kernels = re.findall(r"__launch_bounds__\((\w+)(?:, \w+)?\)\s+(\w+)\(", path.read_text())
    exports = "".join(
        f"""
        int launch_bound_{name} = {bound};
        bool run_{name}(const emulator::Launch& launch) {{
          return emulator::execute([](const void* a) {{ {name}(*static_cast<const Arguments*>(a)); }}, launch);
        }}
        """
        for bound, name in kernels
    )
    code = f"""
        #include "emulator.h"
        {definitions}
        #include "{path}"
        extern "C" {{
        int arguments_size = sizeof(Arguments);
        {exports}
        }}
    """
    header = _HERE / "emulator.h"
    # Without this it takes a fifth of a kernel's compile time.
    precompiled = _compiled([header], (*_KERNEL_FLAGS, "-xc++-header", "-c"), "/emulator.h.gch")
    # Kernels are not linked with the emulator and the C++ library, which takes another fifth and finds them in memory.
    own = (*_KERNEL_FLAGS, "-shared", "-nostdlib", f"-I{precompiled.parent}")
    files = [path, *sorted(_SOURCES.glob("*.cuh")), header, _HERE / "ptx.cuh"]

    def compiled(*flags: str) -> str:
        return str(_compiled(files, (*own, *flags), ".so", code))

    _emulator()
    library = ctypes.CDLL(compiled())
    library.with_lines = functools.partial(compiled, *_LINES)
    return library


@functools.cache
def _emulator() -> ctypes.CDLL:
    """Loads the emulator, whose functions kernels call."""
    files = [_HERE / name for name in ("emulator.cpp", "emulator.h", "races.h")]
    return ctypes.CDLL(str(_compiled(files, ("-O2", "-shared"), ".so")), ctypes.RTLD_GLOBAL)


def _compiled(files: Sequence[Path], flags: Sequence[str], suffix: str, code: str = "") -> Path:
    """Compiles the first file, or C++ that includes these, to a file with a name unique to them, unless it exists."""
    command = [COMPILER, *_FLAGS, *flags, f"-I{_HERE}", f"-I{_SOURCES}", "-" if code else str(files[0])]
    parts = [*command, code, *(file.read_text() for file in files)]
    path = CACHE / (hashlib.sha256(repr(parts).encode()).hexdigest()[:32] + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        done = subprocess.run([*command, "-o", str(unfinished)], input=code, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed for {code or files[0]}:\n{done.stderr}")
        unfinished.replace(path)
    return path
