"""The CPU kernel without torch: no access outside its memory, no undefined behaviour, no race, also on arm64."""

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
# These checks double the compile time, and other sanitizers detect the use of a wrong pointer.
POINTERS = "-fno-sanitize=pointer-overflow,null"


def build(directory: Path, compiler: list[str], machine: str, *options: str) -> Path:
    """Compiles the harness with these options; skips the test if the compiler lacks them."""
    if platform.system() != "Linux" or not compiler or not shutil.which(compiler[0]):
        pytest.skip(f"needs Linux and a C++ compiler for {machine}")
    empty = directory / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run(
        [*compiler, *options, str(empty), "-o", str(directory / "empty")], capture_output=True
    ).returncode:
        pytest.skip(f"{compiler[0]} cannot link {' '.join(options)}")

    def compile(source: Path) -> str:
        target = str(directory / f"{source.stem}.o")
        # Optimising the kernel would take longer than it saves and would hide removed accesses; the formula takes most
        # of the time.
        flags = ["-O1" if source == HARNESS else "-O0", *native_library.source_flags(source, machine)]
        subprocess.run([*compiler, *FLAGS, *flags, *options, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, SOURCES))
    harness = directory / "harness"
    subprocess.run([*compiler, *FLAGS, *options, *objects, "-o", str(harness)], check=True)
    return harness


def solve(harness: list[str], problems: int, threads: int) -> None:
    """Runs the harness and requires right numbers."""
    done = subprocess.run([*harness, "0", str(problems), str(threads)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout == f"{problems} problems\n"


@pytest.mark.parametrize(
    ("sanitizer", "problems", "threads"),
    [
        (("-fsanitize=address,undefined", POINTERS, "-fno-sanitize-recover=all"), 1000, 1),
        (("-fsanitize=thread",), 400, 4),
    ],
    ids=["address and undefined behaviour", "threads"],
)
def test_random_problems(tmp_path: Path, sanitizer: tuple[str, ...], problems: int, threads: int):
    harness = build(tmp_path, environment.find_compiler(), platform.machine(), *sanitizer)
    # The thread sanitizer needs addresses that a randomised layout may occupy.
    fixed_layout = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    solve([*fixed_layout, str(harness)], problems, threads)


def test_random_problems_on_arm64(tmp_path: Path):
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs qemu-aarch64, which runs programs for arm64")
    harness = build(tmp_path, ["aarch64-linux-gnu-g++"], "aarch64", "-static", "-O3")  # the optimisation of wheels
    solve(["qemu-aarch64", str(harness)], 200, 2)
