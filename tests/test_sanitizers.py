"""The CPU kernel under sanitizers: no step outside its memory, no undefined behaviour, no race between threads."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build_backend import environment, native_library

HARNESS = Path(__file__).parent / "sanitizers" / "harness.cpp"
SOURCES = [*sorted((native_library.SOURCES / "cpu").glob("*.cpp")), HARNESS]
FLAGS = ("-std=c++17", "-g1", "-pthread", f"-I{native_library.SOURCES}")
# Checks that take as long to compile as all others: a wrong pointer shows where it is used, as a wrong address.
POINTERS = "-fno-sanitize=pointer-overflow,null"


def build(directory: Path, *sanitizer: str) -> Path:
    """Compiles the harness with these options; skips the test where the compiler does not have them."""
    compiler = environment.find_compiler()
    if not compiler or platform.system() != "Linux":
        pytest.skip("the sanitizers need Linux and a C++ compiler")
    empty = directory / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run(
        [*compiler, *sanitizer, str(empty), "-o", str(directory / "empty")], capture_output=True
    ).returncode:
        pytest.skip(f"{compiler[0]} cannot link {' '.join(sanitizer)}")

    def compile(source: Path) -> str:
        target = str(directory / f"{source.stem}.o")
        # Optimising the kernel would take longer than the problems gain by it, and hide what it leaves out; the formula
        # takes most of their time.
        flags = ["-O1" if source == HARNESS else "-O0", *native_library.source_flags(source, platform.machine())]
        subprocess.run([*compiler, *FLAGS, *sanitizer, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, SOURCES))
    harness = directory / "harness"
    subprocess.run([*compiler, *FLAGS, *sanitizer, *objects, "-o", str(harness)], check=True)
    return harness


@pytest.mark.parametrize(
    ("sanitizer", "problems", "threads"),
    [
        (("-fsanitize=address,undefined", POINTERS, "-fno-sanitize-recover=all"), 1000, 1),
        (("-fsanitize=thread",), 400, 4),
    ],
    ids=["address and undefined behaviour", "threads"],
)
def test_random_problems(tmp_path: Path, sanitizer: tuple[str, ...], problems: int, threads: int):
    harness = build(tmp_path, *sanitizer)
    # The thread sanitizer needs addresses that a randomised layout may take.
    fixed_layout = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    command = [*fixed_layout, str(harness), "0", str(problems), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout == f"{problems} problems\n"
