"""The compiler, its cache on disk, the driver's interface, and the runtime that keeps loaded kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_double import DriverDouble
from cuda_emulator import H100, planned

from nflows_kconv import stencil
from nflows_kconv.backends import cuda, registry
from nflows_kconv.backends.cuda import cache, compiler, driver, planning, runtime
from nflows_kconv.backends.cuda.plan import Device, Kernel, ProblemSpec
from nflows_kconv.backends.cuda.runtime import Runtime, why_not


def _why_no_compiler() -> str:
    try:
        compiler.version()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_why_no_compiler()), reason=f"no NVRTC: {_why_no_compiler()}")
PROBLEM = ProblemSpec(
    "solve", torch.float32, (2, 4, 5, 6), (3, 3), (0, 1), False, False, (120, 30, 6, 1), (18, 9, 3, 1), (120, 30, 6, 1)
)
KERNEL = Kernel("made_up.cu", "made_up", (("CHANNELS", 3), ("SCALAR", "float")))
SOURCE = b'extern "C" __global__ void made_up(SCALAR* x) { x[threadIdx.x] = CHANNELS; }'


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns the cache directory of this test, still empty."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns a directory with the source of `KERNEL`."""
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    (tmp_path / KERNEL.source).write_bytes(SOURCE)
    (tmp_path / "empty.cuh").write_bytes(b"")
    return tmp_path


# Planning


@pytest.mark.parametrize("operation", ["solve", "conv", "weight_gradient"])
@pytest.mark.parametrize("images_are", ["a batch", "groups"])
@pytest.mark.parametrize(
    "shape", [(12, 16, 16), (48, 4, 4), (12, 64, 64), (64, 16, 16), (96, 8, 8), (256, 8, 8)], ids=str
)
def test_batches_share_kernels(operation: str, images_are: str, shape: tuple[int, int, int]):
    """A few kernels run every batch size, with more blocks for larger ones; images with own weights are groups."""
    plans = []
    for images in range(1, 129):
        batch, repeats = (images, 1) if images_are == "a batch" else (1, images)
        input = torch.empty(batch, repeats * shape[0], *shape[1:], device="meta")
        weight = torch.empty(repeats * shape[0], shape[0] // 4, 3, 3, device="meta")
        other = input if operation == "weight_gradient" else weight
        asked = registry.OperatorCall(operation, input, other, (0, 1, 2, 3) * repeats, kernel_size=(3, 3))
        plans.append(planning.plan(planned(asked), H100).launches)
    kernels = {tuple((launch.kernel.source, launch.kernel.constants) for launch in plan) for plan in plans}
    assert len(kernels) <= (4 if images_are == "a batch" else 6)
    assert max(len(launch.arguments) for plan in plans for launch in plan) < 256
    if operation != "weight_gradient":  # it shares pixels among enough blocks to fill the device
        blocks = [sum(launch.grid[0] for launch in plan) for plan in plans]
        assert blocks[59] < blocks[119]


# Compiling


def test_sources_are_found():
    assert (compiler.source_directory() / "arguments.cuh").exists()


@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_every_kernel_of_a_plan_compiles(capability: tuple[int, int]):
    for launch in planning.plan(PROBLEM, H100).launches:
        code = compiler.compile(launch.kernel, capability)
        assert code.startswith(b"\x7fELF")
        assert launch.kernel.name.encode() in code


@needs_nvrtc
def test_a_gpu_newer_than_the_compiler_gets_ptx(sources: Path):
    code = compiler.compile(KERNEL, (99, 0))
    assert b".visible .entry made_up(" in code
    assert code.endswith(b"\0")


@needs_nvrtc
def test_a_gpu_older_than_the_compiler_is_not_served():
    reason = compiler.why_not((2, 0), (99, 0))
    assert re.fullmatch(
        r"the GPU must have compute capability [\d.]+ or higher for the kernels and NVRTC [\d.]+, got 2\.0", reason
    )


@needs_nvrtc
def test_a_failed_compilation_says_what_and_why(sources: Path):
    (sources / KERNEL.source).write_text('#include <broken.cuh>\nextern "C" __global__ void made_up() {}')
    (sources / "broken.cuh").write_text("__device__ int x = y;")
    match = r"NVRTC [\d.]+ could not compile made_up\.cu with .*sm_90 -DCHANNELS=3 .*:\nbroken\.cuh\(1\): .*\"y\""
    with pytest.raises(RuntimeError, match=match):
        compiler.compile(KERNEL, (9, 0))


@needs_nvrtc
def test_a_missing_source_is_an_error(sources: Path):
    with pytest.raises(OSError, match=r"missing\.cu"):
        compiler.compile(Kernel("missing.cu", "missing", ()), (9, 0))


@needs_nvrtc
def test_digests_differ_where_code_may(sources: Path, monkeypatch: pytest.MonkeyPatch):
    digests = [compiler.digest(KERNEL, (9, 0)), compiler.digest(KERNEL, (8, 0))]
    digests.append(compiler.digest(Kernel("made_up.cu", "made_up", (("CHANNELS", 4), ("SCALAR", "float"))), (9, 0)))
    (sources / "empty.cuh").write_bytes(b"int x;")
    digests.append(compiler.digest(KERNEL, (9, 0)))
    (sources / KERNEL.source).write_bytes(SOURCE + b"\n")
    digests.append(compiler.digest(KERNEL, (9, 0)))
    with monkeypatch.context() as other:
        other.setattr(compiler, "version", lambda: (1, 2))
        digests.append(compiler.digest(KERNEL, (9, 0)))
    assert len(set(digests)) == len(digests)
    assert compiler.digest(KERNEL, (9, 0)) == digests[4]


# The cache on disk


def test_what_is_stored_is_loaded(directory: Path):
    assert cache.load("a") is None
    cache.store("a", b"code")
    cache.store("b", b"other")
    cache.store("a", b"code again")
    assert (cache.load("a"), cache.load("b"), cache.load("c")) == (b"code again", b"other", None)
    assert sorted(path.name for path in directory.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("damage", [lambda e: e[:-1], lambda e: b"", lambda e: e[:-1] + b"!", lambda e: b"x" + e[1:]])
def test_damaged_entries_are_not_loaded(directory: Path, damage):
    cache.store("a", b"code")
    (directory / "a").write_bytes(damage((directory / "a").read_bytes()))
    assert cache.load("a") is None
    cache.store("a", b"code")
    assert cache.load("a") == b"code"


@pytest.mark.parametrize("place", ["file", "file/below", "directory is an entry"])
def test_without_a_usable_directory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "directory is an entry" / "a").mkdir(parents=True)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / place))
    cache.store("a", b"code")
    assert cache.load("a") is None
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_directory_that_cannot_be_written_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    cache.store("a", b"code")
    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    cache.store("b", b"code")
    assert (cache.load("a"), cache.load("b")) == (b"code", None)


def test_the_directory_is_the_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() == Path("/home/user/.cache/nflows_kconv")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache.directory() == Path("/cache/nflows_kconv")
    monkeypatch.setenv(cache.VARIABLE, "/kernels")
    assert cache.directory() == Path("/kernels")
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.os.path, "expanduser", lambda path: path)
    assert cache.directory() is None
    assert cache.load("a") is None
    cache.store("a", b"code")


def test_processes_share_the_directory(directory: Path):
    """Each writes the same entries many times; readers find none or a complete one."""
    script = """
import runpy, sys
cache = runpy.run_path(sys.argv[1])  # the package would take seconds to import
for index in range(200):
    name = str(index % 5)
    code = cache["load"](name)
    assert code in (None, name.encode() * 100_000), name
    cache["store"](name, name.encode() * 100_000)
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, cache.__file__]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(path.name for path in directory.iterdir()) == list("01234")


# The runtime


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Returns what a fake compiler was asked to compile."""
    compiled: list[Kernel] = []

    def compile(kernel: Kernel, capability: tuple[int, int]) -> bytes:
        compiled.append(kernel)
        return repr((kernel, capability)).encode()

    monkeypatch.setattr(compiler, "digest", lambda kernel, capability: f"{hash((kernel.constants, capability)):x}")
    monkeypatch.setattr(compiler, "compile", compile)
    return compiled


class CodeDriver(DriverDouble):
    """A driver that loads any code."""

    def function(self, module: int, name: str, index: int) -> int:
        return 100 * (1 + index) + module


def test_a_kernel_is_compiled_once(directory: Path, compiled: list[Kernel]):
    for process in range(2):
        driver = CodeDriver()
        running = Runtime(driver)
        functions = [running.load(PROBLEM, device).functions for device in (0, 0, 1)]
        assert functions[0] == functions[1] != functions[2]
        assert len(driver.loaded) == 2, process  # one per device
        assert len(compiled) == 1
    for entry in directory.iterdir():
        entry.write_bytes(b"damaged")
    Runtime(CodeDriver()).load(PROBLEM, 0)
    assert len(compiled) == 2


def test_without_a_directory_kernels_are_kept_in_memory(compiled: list[Kernel], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cache.VARIABLE, os.devnull)
    running = Runtime(CodeDriver())
    assert running.load(PROBLEM, 0) == running.load(PROBLEM, 0)
    assert len(compiled) == 1


def test_a_failed_compilation_can_be_repeated(directory: Path, compiled: list[Kernel], monkeypatch: pytest.MonkeyPatch):
    def fail(kernel: Kernel, capability: tuple[int, int]) -> bytes:
        raise RuntimeError("it does not compile")

    running = Runtime(CodeDriver())
    with monkeypatch.context() as broken:
        broken.setattr(compiler, "compile", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="it does not compile"):
                running.load(PROBLEM, 0)
    running.load(PROBLEM, 0)
    assert len(compiled) == 1


def waiting_compiler(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Makes each compilation wait until this many run at a time."""
    compile, barrier = compiler.compile, threading.Barrier(together)

    def wait(kernel: Kernel, capability: tuple[int, int]) -> bytes:
        barrier.wait(timeout=20)
        time.sleep(0.2)  # time for other threads to arrive
        return compile(kernel, capability)

    monkeypatch.setattr(compiler, "compile", wait)


def test_the_kernels_of_a_plan_compile_side_by_side(directory: Path, compiled: list[Kernel], monkeypatch):
    waiting_compiler(monkeypatch, together=2)
    many = replace(PROBLEM, shape=(2, 96, 5, 6))
    functions = Runtime(CodeDriver()).load(many, 0).functions
    assert sorted({kernel.source for kernel in compiled}) == ["prepare.cu", "solve_channels.cu"]
    assert len(compiled) == len(functions) == 2


def test_threads_compile_a_kernel_once_and_others_meanwhile(directory: Path, compiled: list[Kernel], monkeypatch):
    waiting_compiler(monkeypatch, together=2)
    running, results, start = Runtime(CodeDriver()), [], threading.Barrier(8)

    def load(problem: ProblemSpec) -> None:
        start.wait()
        results.append(running.load(problem, 0).functions)

    problems = (PROBLEM, replace(PROBLEM, operation="conv")) * 4
    threads = [threading.Thread(target=load, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(compiled) == len(set(results)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_wait_for_its_parents_compilations(directory: Path, compiled: list[Kernel], monkeypatch):
    (launch,) = planning.plan(PROBLEM, H100).launches
    with runtime.runtime._locks.setdefault(replace(launch.kernel, name=""), threading.Lock()):
        child = os.fork()
        if child == 0:
            runtime.runtime._driver = CodeDriver()
            loading = threading.Thread(target=runtime.runtime.load, args=(PROBLEM, 0), daemon=True)
            loading.start()
            loading.join(timeout=20)
            os._exit(loading.is_alive())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    runtime.runtime.forget()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_run_layers_on_the_cpu():
    script = """
import torch, nflows_kconv

class Images(torch.utils.data.Dataset):
    layer = nflows_kconv.InvertibleConv2d(4)
    def __len__(self):
        return 8
    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer.inverse(torch.full((1, 4, 3, 3), float(index)))[0][0]

images = Images()
loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=2, multiprocessing_context="fork")
expected = torch.stack([images[index] for index in range(8)])
torch.testing.assert_close(torch.cat(list(loader)), expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


# Why kernels cannot run


def call_of(*corners: str, operation: str = "conv") -> registry.OperatorCall:
    image, weight = torch.ones(1, len(corners), 1, 1), torch.ones(len(corners), 1, 1, 1)
    return registry.OperatorCall(operation, image, weight, stencil.parse(corners), kernel_size=(1, 1))


CODE = runtime._code


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fakes a machine on which the runtime finds no fault."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_architectures", lambda: [75, 80, 90])
    monkeypatch.setattr(driver, "device_names", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(driver, "describe", lambda index: H100)
    monkeypatch.setattr(driver, "version", lambda: (13, 0))
    monkeypatch.setattr(runtime, "_code", lambda kernel, capability: b"")
    runtime.told_why_not.cache_clear()
    yield
    runtime.told_why_not.cache_clear()


def test_nothing_is_wrong_on_a_gpu(gpu: None):
    assert why_not() is None
    assert cuda.why_not(call_of("TL", "BR")) is None
    assert cuda.status().reason.startswith("NVIDIA H100 80GB HBM3, compiled at run time by NVRTC 13.0, launched from ")


@pytest.mark.parametrize(
    ("nvrtc", "supported", "capability", "needed"),
    [
        ((13, 0), (13, 0), (9, 0), None),
        ((13, 2), (13, 0), (9, 0), None),  # of one major version
        ((13, 2), (12, 9), (9, 0), "13.0"),
        ((13, 2), (13, 2), (12, 1), None),
        ((13, 2), (13, 1), (12, 1), "13.2"),  # the driver must assemble what this NVRTC wrote
    ],
)
def test_the_driver_must_be_new_enough(gpu: None, monkeypatch, nvrtc, supported, capability, needed):
    monkeypatch.setattr(compiler, "version", lambda: nvrtc)
    monkeypatch.setattr(driver, "version", lambda: supported)
    monkeypatch.setattr(driver, "describe", lambda index: Device(capability, 1, 1))
    reason = why_not(0)
    assert (reason is None) == (needed is None)
    if needed:
        assert reason.startswith(f"the driver must support CUDA {needed} or higher for NVRTC 13.")
        assert cuda.status() == (False, f"NVIDIA H100 80GB HBM3: {reason}")


def test_each_gpu_is_served_or_not(gpu: None, monkeypatch: pytest.MonkeyPatch):
    reason = "the GPU must have compute capability 7.5 or higher for the kernels and NVRTC 13.0, got 6.1"
    monkeypatch.setattr(driver, "device_names", lambda: ["NVIDIA H100", "NVIDIA GTX 1080"])
    monkeypatch.setattr(driver, "describe", lambda index: H100 if index == 0 else Device((6, 1), 20, 49152))
    assert (why_not(0), why_not(1)) == (None, reason)
    status = cuda.status()
    assert status.available
    assert status.reason.endswith(f"; not on NVIDIA GTX 1080: {reason}")
    call = call_of("TL")
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    with pytest.warns(RuntimeWarning, match=r"the slow reference implementation: the GPU must have compute capability"):
        assert cuda.why_not(call) == reason
    monkeypatch.setattr(compiler, "_architectures", lambda: [50, 60, 70, 75])  # an NVRTC that knows it: kernels do not
    assert why_not(1) == reason.replace("7.5", "7.0")


@needs_nvrtc
def test_a_compiler_that_only_loads_serves_no_gpu(directory: Path, gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "_code", CODE)
    assert why_not(0) is None
    stored = list(directory.iterdir())
    assert why_not(0) is None
    assert list(directory.iterdir()) == stored != []  # compiled once for all processes
    stored[0].unlink()
    monkeypatch.setattr(compiler, "_program", lambda *_: compiler._Program(b"", {}, ("--no-such-option",), False))
    expected = (
        "NVRTC or the CUDA driver does not work: NVRTC 13.0 could not compile log_abs_det.cu with --no-such-option"
    )
    assert why_not(0).startswith(expected)
    assert not cuda.status().available
    with pytest.warns(RuntimeWarning, match="CUDA tensors run on the slow reference implementation: NVRTC or the CUDA"):
        assert cuda.why_not(call_of("TL")).startswith(expected)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_of("T", "B"), None),
        (call_of("L", "R", operation="solve"), None),
        (call_of("TL", "B"), "its kernels take stencils of one family in a call: corners, T and B, or L and R"),
        (call_of("T", "R"), "its kernels take stencils of one family in a call: corners, T and B, or L and R"),
        (call_of("T", operation="weight_gradient"), "its kernel of the weight gradient is for corners"),
    ],
)
def test_reasons_of_stencils(gpu: None, call: registry.OperatorCall, reason: str | None):
    assert cuda.why_not(call) == reason


def test_reasons(gpu: None, monkeypatch: pytest.MonkeyPatch):
    def fail(*args):
        raise OSError("libcuda.so.1 is broken")

    for place, name, value, reason in (
        (driver, "device_names", fail, "NVRTC or the CUDA driver does not work: libcuda.so.1 is broken"),
        (compiler, "version", fail, "NVRTC or the CUDA driver does not work: libcuda.so.1 is broken"),
        (torch.cuda, "is_available", lambda: False, "torch finds no CUDA device"),
        (torch.version, "cuda", None, "this torch is built without CUDA"),
        (torch.version, "hip", "7.0", "this torch is built for ROCm"),
    ):
        monkeypatch.setattr(place, name, value)
        assert why_not() == reason


def test_without_cuda_bindings(gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert why_not().startswith("the package cuda-bindings, which CUDA builds of torch install, is missing: ")


def test_running_on_the_reference_is_told_once(gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    call = call_of("TL")
    with pytest.warns(RuntimeWarning, match="CUDA tensors run on the slow reference implementation: this torch is bui"):
        assert cuda.why_not(call) == "this torch is built for ROCm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.why_not(call) == "this torch is built for ROCm"


# The driver's interface


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs cuda-bindings")
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_calls_of_the_driver(tmp_path: Path):
    """`cuda.bindings` calls a fake driver that reports its calls."""
    stub = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_driver_stub.c")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(stub), "-ldl"], check=True)
    script = """
from nflows_kconv.backends.cuda import driver
print(driver.device_names(), driver.describe(0), driver.context(0), flush=True)
function = driver.function(driver.load(b"code\\0", 0), "kernel", 0)
driver.zero(0, 0x1000, 77, 0x57)
driver.launch(0, function, (3, 2, 1), 64, 1000, b"argument bytes\\0\\1", 0x57)
for call in (lambda: driver.load(b"bad\\0", 0), lambda: driver.describe(1), driver.function_addresses):
    try:
        print(len(call()), "addresses", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    *lines, addresses = done.stdout.splitlines()
    assert lines == [
        "['Stub 0'] Device(capability=(9, 0), multiprocessors=132, shared_memory=232448) 192",
        "push 0xc0",
        "load code",
        "pop",
        "push 0xc0",
        "function 0xa0 kernel",
        "attribute 0xf0 8 232448",
        "pop",
        "push 0xc0",
        "set 1000 0 77 0x57",
        "pop",
        "push 0xc0",
        "launch 0xf0 3 2 1 64 1 1 1000 0x57 argument bytes",
        "pop",
        "push 0xc0",
        "load bad",
        "pop",
        "cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE",
        "cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE",
    ]
    missing = "a function that kernel launches need is missing: libtorch_cuda.so"
    assert addresses == "7 addresses" if torch.version.cuda else addresses.startswith(missing)
