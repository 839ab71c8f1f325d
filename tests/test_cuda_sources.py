"""The CUDA sources compile without warnings or spills, and every launch fits. Compilers need no GPU.

The default compiles, per number of channels, the 3 x 3 float32 kernels and one other for an H100, and one for an A100
or a B200, and few that others imply; the profile "thorough" compiles all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import cuda_emulator as emulator
import pytest
import torch
from cases import DTYPES
from cuda_emulator import H100
from hypothesis import settings

from nflows_kconv.backends import registry
from nflows_kconv.backends.cuda import compiler, planning
from nflows_kconv.backends.cuda.plan import Device, Kernel, Launch, ProblemSpec

A100 = Device((8, 0), multiprocessors=108, shared_memory=166912)
B200 = Device((10, 0), multiprocessors=148, shared_memory=232448)
DEVICES = (A100, H100, B200)
# A T4, with the least shared memory, and the newest generation for desktops.
SMALLER = (Device((7, 5), 40, 65536), Device((12, 0), 170, 101376))

SIDES = (1, 2, 3, 5)
CHANNELS = (1, 3, 6, 12, 16, 48, 512)
IMAGES = ((100, 16, 16), (1, 300, 501), (7, 4, 3))
# What once spilled: device, channels, side, image, dtype, operation.
SPILLED = (
    (A100, 48, 2, IMAGES[1], torch.float32, "solve"),
    (A100, 48, 3, IMAGES[1], torch.float32, "solve"),
    (A100, 16, 5, IMAGES[2], torch.float32, "weight_gradient"),
    (A100, 512, 3, (100, 10, 10), torch.float32, "weight_gradient"),
    (H100, 48, 2, IMAGES[2], torch.float32, "weight_gradient"),
    (H100, 512, 5, IMAGES[2], torch.float16, "weight_gradient"),
    (H100, 512, 5, IMAGES[2], torch.float32, "weight_gradient"),
    (B200, 48, 2, IMAGES[2], torch.bfloat16, "weight_gradient"),
    (A100, 16, 5, IMAGES[1], torch.bfloat16, "solve"),
    (H100, 16, 5, IMAGES[1], torch.float32, "solve"),
    (H100, 48, 3, IMAGES[1], torch.float16, "solve"),
    (B200, 3, 5, IMAGES[0], torch.float32, "conv"),
    (B200, 3, 3, IMAGES[0], torch.float16, "conv"),
)

SOURCES = sorted(compiler.source_directory().glob("*.cu*"))
REGISTERS_OF_MULTIPROCESSOR = 65536


thorough = settings.default.max_examples > 100


def problems(
    channels: int, side: int, image: tuple[int, int, int], dtype: torch.dtype, device: Device
) -> Iterator[ProblemSpec]:
    corners, sides = ((0, 1, 2, 3), (8, 11, 8, 11)) if channels <= 6 else ((0,), (8,))
    batch, height, width = image
    total = channels * len(corners)
    input = torch.empty(batch, total, height, width, dtype=dtype, device="meta")
    for stencils, rows in ((corners, side), (sides, side // 2 + 1)):
        size = rows, side
        weight = torch.empty(total, channels, *size, dtype=dtype, device="meta")
        for operation, transpose in product(("solve", "conv"), (False, True)):
            # A bias takes registers: if a kernel fits with it, it fits without it.
            bias = None if transpose else torch.empty(total, device="meta")
            called = operation, input, weight, stencils, bias
            problem = emulator.planned(registry.OperatorCall(*called, transpose=transpose, kernel_size=size))
            if operation == "conv" or planning.plan_solution(problem, device):
                yield problem
    yield emulator.planned(registry.OperatorCall("weight_gradient", input, input, corners, kernel_size=(side, side)))
    yield emulator.planned(registry.OperatorCall("log_abs_det", input, input, (0,), kernel_size=(1, 1)))


def is_implied(problem: ProblemSpec) -> bool:
    """Whatever spilled transposed, or convolved with a side, also spilled plain, with a bias, and with a corner."""
    return problem.transpose or (problem.operation == "conv" and problem.tau > 1)


def launches(device: Device) -> Iterator[Launch]:
    others, place = tuple(product(SIDES, IMAGES, DTYPES)), DEVICES.index(device)
    for number, channels in enumerate(CHANNELS):
        # With these steps a few launches cover nearly all pairs of values of a kernel's constants.
        few = [others[(17 * number + 5 * place) % len(others)]]
        if device is H100:
            few.append((3, IMAGES[0], torch.float32))
        elif (device is B200) != number % 2:
            few.clear()
        for side, image, dtype in others if thorough else few:
            for problem in problems(channels, side, image, dtype, device):
                if thorough or not is_implied(problem) or (device is H100 and number % 5 == 0):
                    yield from planning.plan(problem, device).launches
    for where, channels, side, image, dtype, operation in SPILLED:
        for problem in problems(channels, side, image, dtype, device) if where is device else ():
            if problem.operation == operation and not is_implied(problem):
                yield from planning.plan(problem, device).launches
    # Images with weights of their own are groups; the kernels read how many there are.
    for channels in (3, 48, 512) if device is H100 else ():
        problem = next(problems(channels, 3, IMAGES[0], torch.float32, device))
        batch, total, *size = problem.shape
        many = replace(problem, shape=(1, batch * total, *size), stencils=problem.stencils * batch)
        yield from planning.plan(many, device).launches


class Verbose(threading.local):
    """NVRTC with an option to report the resources of kernels; each thread has its own log."""

    def __init__(self, nvrtc: Any) -> None:
        self._nvrtc = nvrtc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nvrtc, name)

    def nvrtcCompileProgram(self, program: Any, count: int, options: list[bytes]) -> Any:
        result = self._nvrtc.nvrtcCompileProgram(program, count + 1, [*options, b"--ptxas-options=-v"])
        log = bytearray(self._nvrtc.nvrtcGetProgramLogSize(program)[1])
        self._nvrtc.nvrtcGetProgramLog(program, log)
        self.log = log.decode()
        return result


@pytest.fixture
def verbose(monkeypatch: pytest.MonkeyPatch) -> Verbose:
    """Returns the compiler of this test."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda.bindings and NVRTC compile the kernels")
    verbose = Verbose(nvrtc)
    monkeypatch.setattr(compiler, "_nvrtc", lambda: verbose)
    return verbose


def complaints(launch: Launch, device: Device, log: str) -> Iterator[str]:
    """Returns the faults of a launch, from the compiler's log."""
    yield from re.findall(r".*(?:warning|error)[ :].*", log)
    found = re.search(rf"Function properties for {launch.kernel.name}\n(.*)\n.*Used (\d+) registers(.*)", log)
    if found is None:
        yield f"nothing about the kernel in the log {log!r}"
        return
    memory, registers, others = found.groups()
    if not memory.endswith(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"):
        yield memory.strip()
    warps = -(-launch.block // 32)
    if warps * 32 * -(-int(registers) // 8) * 8 > REGISTERS_OF_MULTIPROCESSOR:
        yield f"{registers} registers for each of {launch.block} threads"
    if " smem" in others:
        yield f"static shared memory: {others}"
    if launch.shared > device.shared_memory:
        yield f"{launch.shared} bytes of shared memory"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: "sm_{}{}".format(*device.capability))
def test_kernels_compile_without_warnings_and_spills(device: Device, verbose: Verbose):
    def log(kernel: Kernel) -> str:
        """Returns the compiler's log for a kernel and others of its source, compiled as at run time."""
        try:
            compiler.compile(kernel, device.capability)
        except RuntimeError as error:
            return str(error)
        return verbose.log

    # Kernels with the same source and constants are compiled together.
    programs: dict[str, list[Launch]] = defaultdict(list)
    for launch in dict.fromkeys(launches(device)):
        programs[compiler.digest(launch.kernel, device.capability)].append(launch)
    kernels = [same[0].kernel for same in programs.values()]
    wrong: dict[str, list[Launch]] = defaultdict(list)
    with ThreadPoolExecutor(2) as pool:
        for same, said in zip(programs.values(), pool.map(log, kernels), strict=True):
            for launch in same:
                for complaint in complaints(launch, device, said):
                    wrong[f"{launch.kernel.name}: {complaint}"].append(launch)
    if wrong:
        pytest.fail(
            "\n".join(f"{what}\n    {len(found)}, one is {described(found[0])}" for what, found in wrong.items())
        )


def described(launch: Launch) -> str:
    constants = " ".join(f"{name}={value}" for name, value in launch.kernel.constants)
    return f"{constants}, {launch.block} threads with {launch.shared} bytes"


@pytest.mark.parametrize("device", SMALLER, ids=lambda device: "sm_{}{}".format(*device.capability))
def test_launches_fit_gpus_with_less_shared_memory(device: Device):
    for channels, image, dtype in product(CHANNELS, IMAGES, (torch.float32, torch.float64)):
        for problem in problems(channels, 3, image, dtype, device):
            for launch in planning.plan(problem, device).launches:
                assert launch.shared <= device.shared_memory, described(launch)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".cu"], ids=lambda path: path.name)
def test_nvcc_has_no_warnings(path: Path, tmp_path: Path):
    images = [problem for channels in CHANNELS for problem in problems(channels, 3, IMAGES[0], torch.float32, H100)]
    plans = (planning.plan(problem, H100) for problem in images)
    kernel = next(launch.kernel for plan in plans for launch in plan.launches if launch.kernel.source == path.name)
    definitions = [f"-D{name}={value}" for name, value in kernel.constants]
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", f"-I{path.parent}", *definitions]
    done = subprocess.run([*command, "-cubin", "-o", tmp_path / "cubin", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_stand_alone(path: Path):
    """The run-time compiler has no system headers, and the emulator has no assembly."""
    text = path.read_text()
    own = {path.name for path in SOURCES}
    assert set(re.findall(r'#include [<"](.*)[>"]', text)) <= own
    assert path.name == "ptx.cuh" or not re.search(r"\basm\b", text)
    # All shared memory is dynamic and counted in the plan.
    assert not re.search(r"^\s*(static )?__shared__", text, re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_know_transposes_in_one_place(path: Path):
    """To all but the views of arguments.cuh, a transposed operator is one of other strides."""
    assert path.name == "arguments.cuh" or "TRANSPOSE" not in re.sub("//.*", "", path.read_text())
