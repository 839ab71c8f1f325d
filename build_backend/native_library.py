"""Compiles csrc into the native library, or records why not."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from build_backend.environment import MINIMUM_TORCH, Torch, find_compiler, find_torch, search_path, why_not

SOURCES = Path(__file__).parent.parent / "csrc"
RECORD = "_native_build.json"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH),
)
INSTRUCTION_SET_FLAGS = {
    "_avx2.cpp": ("-mavx2", "-mfma"),
    "_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}


@dataclass(frozen=True)
class Outcome:
    """The record for the installed package of how the native library was built, or why it was not."""

    built: bool
    reason: str = ""
    compiler: str = ""
    torch: str = ""


class CompilerError(Exception):
    """The compiler failed; the message is its first error."""


def build(library: Path) -> Outcome:
    """Builds `library` if possible, and writes the outcome next to it either way."""
    library.parent.mkdir(parents=True, exist_ok=True)
    # Never overwrites in place, because a running process may have mapped an earlier build.
    library.unlink(missing_ok=True)
    outcome = _build(library)
    library.with_name(RECORD).write_text(json.dumps(asdict(outcome), indent=4) + "\n")
    if not outcome.built:
        print(
            f"nflows-kconv: the native library was not built: {outcome.reason}. "
            "The package works without it, on a slower implementation for the CPU and with slower launches for CUDA.",
            file=sys.stderr,
        )
    return outcome


def _build(library: Path) -> Outcome:
    reason = why_not()
    if reason is not None:
        return Outcome(False, reason)
    torch = find_torch(search_path())
    if torch is None or not torch.recent_enough:
        wanted, found = ".".join(map(str, MINIMUM_TORCH)), torch.version if torch else "none"
        return Outcome(False, f"torch >= {wanted} must be there at build time, found {found}")
    compiler = find_compiler()
    sources = [*sorted(SOURCES.glob("*.cpp")), *sorted((SOURCES / "cpu").glob("*.cpp"))]
    try:
        compile_library(compiler, torch, sources, library)
        version = _run([*compiler, "--version"]).partition("\n")[0]
    except CompilerError as error:
        return Outcome(False, f"the compiler failed: {error}")
    return Outcome(True, compiler=version, torch=torch.version)


def compile_library(compiler: Sequence[str], torch: Torch, sources: Sequence[Path], library: Path) -> None:
    """Compiles `sources` in parallel and links them into `library`.

    The library refers to torch's libraries by name, without a path, because torch is always imported before it.

    Raises:
        CompilerError: If the compiler or the linker fails.
    """
    # Error messages name paths inside the sources, because the directories above differ between machines.
    places = [f"-ffile-prefix-map={directory}=." for directory in (SOURCES.parent, torch.directory.parent)]
    compile = [*compiler, *FLAGS, *places, "-isystem", str(torch.directory / "include"), "-c"]
    link = [*compiler, "-shared", f"-L{torch.directory / 'lib'}", "-o", str(library)]
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(scratch, f"{index}.o")) for index in range(len(sources))]
        commands = [
            [*compile, *source_flags(source, platform.machine()), str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([*link, *objects, "-ltorch_cpu"])


def source_flags(source: Path, machine: str) -> tuple[str, ...]:
    """Returns the flags for a file: those of the instruction set in its name, on machines that have it."""
    if machine not in ("x86_64", "AMD64"):
        return ()
    return next((flags for end, flags in INSTRUCTION_SET_FLAGS.items() if source.name.endswith(end)), ())


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"{command[0]} ended with status {done.returncode}"]
        raise CompilerError(next((line for line in lines if "error" in line), lines[0]))
    return done.stdout
