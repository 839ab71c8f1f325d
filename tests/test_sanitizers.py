"""The CPU kernel without torch: no access outside its memory, no undefined behaviour, no race, also on arm64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build_backend import environment, native_library
from nflows_kconv.backends import native

HARNESS = Path(__file__).parent / "sanitizers" / "harness.cpp"
CPU = native_library.SOURCES / "cpu"
FLAGS = ("-std=c++17", "-g1", "-pthread", f"-I{native_library.SOURCES}")
# Checks of pointers double the compile time, and other sanitizers detect the use of a wrong one.
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize=pointer-overflow,null", "-fno-sanitize-recover=all")
# The compiler takes most of the time, so each sanitizer gets what it needs: addresses depend on the number of lanes,
# of which the widest vectors and the narrowest have all between them; arithmetic and races do not.
WIDEST = ("baseline", *native.instruction_sets())[-1]


def solve(
    directory: Path,
    compiler: list[str],
    machine: str,
    sets: dict[str, tuple[str, ...]],
    problems: int,
    threads: int,
    runner: Sequence[str] = (),
) -> None:
    """Runs random problems with these instruction sets, each compiled with its own options, and requires right numbers.

    The options of the baseline are everything else's, too. Skips the test if the compiler lacks them.
    """
    options = sets["baseline"]
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
        own = sets.get(source.stem.removeprefix("kernel_"), options)
        subprocess.run([*compiler, *FLAGS, *flags, *own, "-c", str(source), "-o", target], check=True)
        return target

    sources = [*(CPU / f"kernel_{name}.cpp" for name in sets), CPU / "plan.cpp", CPU / "run.cpp", HARNESS]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, sources))
    harness = str(directory / "harness")
    other_sets = "-Wl,--unresolved-symbols=ignore-all"  # run.cpp names them, nothing calls them
    subprocess.run([*compiler, *FLAGS, *options, *objects, other_sets, "-o", harness], check=True)
    command = [*runner, harness, "0", str(problems), str(threads), *sets]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout == f"{problems} problems\n"


@pytest.mark.parametrize(
    ("sets", "problems", "threads"),
    [
        ({WIDEST: ("-fsanitize=address",), "baseline": ("-fsanitize=address", *UNDEFINED)}, 1000, 1),
        ({"baseline": ("-fsanitize=thread",)}, 400, 4),
    ],
    ids=["address and undefined behaviour", "threads"],
)
def test_random_problems(tmp_path: Path, sets: dict[str, tuple[str, ...]], problems: int, threads: int):
    # The thread sanitizer needs addresses that a randomised layout may occupy.
    fixed_layout = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    solve(tmp_path, environment.find_compiler(), platform.machine(), sets, problems, threads, fixed_layout)


def test_random_problems_on_arm64(tmp_path: Path):
    if not shutil.which("qemu-aarch64"):
        pytest.skip("needs qemu-aarch64, which runs programs for arm64")
    sets = {"baseline": ("-static", "-O3")}  # the optimisation of wheels
    solve(tmp_path, ["aarch64-linux-gnu-g++"], "aarch64", sets, 200, 2, ["qemu-aarch64"])
