"""A process that runs out of memory or is interrupted can go on: right results and no partial state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cuda_double import DriverDouble

from nflows_kconv.backends import native
from nflows_kconv.backends.cuda import native_launcher, planning, runtime
from nflows_kconv.backends.cuda.native_launcher import NativeLauncher
from nflows_kconv.backends.cuda.plan import LaunchPlan
from nflows_kconv.backends.cuda.runtime import Runtime
from nflows_kconv.backends.registry import OperatorCall

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
needs_native = pytest.mark.skipif(not native.available, reason=f"no native library: {native.reason}")

START = """
import resource, signal, torch
from nflows_kconv import InvertibleConv2d

torch.set_num_threads(1)
torch.manual_seed(0)
layer = InvertibleConv2d(8, diagonal="learned", bias=True)
image = torch.randn(3, 8, 6, 5, requires_grad=True)


def results():
    output, log_det = layer(image)
    restored, _ = layer.inverse(output)
    gradients = torch.autograd.grad(restored.sum() + (output * log_det[:, None, None, None]).sum(),
                                    [image, *layer.parameters()])
    return [output, log_det, restored, *gradients]


def state():
    return [value.clone() for value in layer.state_dict().values()], layer.training, image.clone()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


expected, before = results(), state()


def check():
    after = state()
    assert same(after[0], before[0]) and after[1] == before[1] and torch.equal(after[2], before[2])
    assert same(results(), expected)
    assert torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
    assert all(parameter.grad is None for parameter in layer.parameters())


def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def refused(function, words):
    try:
        function()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError("nothing was raised")
    limit(1 << 30)
    check()
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
@needs_native
def test_too_little_memory():
    """For the output, for the buffers of the kernel, and in the backward pass, one after the other.

    The kernel holds a vector of lanes, one per image, for 64 channels of a row: 64 MiB besides the output.
    """
    run("""
huge = torch.zeros(1).expand(1 << 26, 8, 1, 1)  # 2 GiB
for function in (layer, layer.inverse):
    limit(1 << 28)
    refused(lambda: function(huge), "allocate")

wide, image_ = InvertibleConv2d(64, (1, 3), corners="TL"), torch.randn(9, 64, 1, 1 << 14)
for function in (wide, wide.inverse):
    limit(48 << 20)
    refused(lambda: function(image_), "out of memory for the buffers of the CPU kernel")
assert wide.inverse(wide(image_)[0])[0].isfinite().all()

large = torch.zeros(1, requires_grad=True)
output, _ = layer(large.expand(1 << 21, 8, 2, 2))  # 256 MiB
ones = torch.ones(()).expand(output.shape)
limit(128 << 20)
refused(lambda: torch.autograd.grad(output, [large, *layer.parameters()], ones), "allocate")
""")


@linux
def test_interrupted_anywhere():
    """A timer raises KeyboardInterrupt between any two Python instructions."""
    interrupts = run("""
import random
random.seed(0)


def interrupt(*_):
    raise KeyboardInterrupt


signal.signal(signal.SIGALRM, interrupt)
interrupts = 0
for _ in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
        while True:
            results()
    except KeyboardInterrupt:
        interrupts += 1
check()
print(interrupts)
""")
    assert interrupts == "150\n"


# The launcher of CUDA kernels, on a double of the driver


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Returns the native launcher for CPU tensors, with real plans and kernels."""
    monkeypatch.setattr(runtime, "_code", lambda kernel, capability: kernel)
    connected, driver = NativeLauncher.connected, DriverDouble(run=lambda launch: None)
    NativeLauncher(native.loaded(), Runtime(driver), driver).connect()
    yield
    connected.connect()


def call() -> torch.Tensor:
    image, weight = torch.randn(2, 4, 5, 6), torch.eye(4)[:, :, None, None].contiguous()
    return native_launcher.run(OperatorCall("solve", image, weight, [0], kernel_size=[1, 1]))


@needs_native
def test_out_of_gpu_memory_is_torchs_error(launcher: None, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as context:
        context.setattr(planning, "plan", lambda problem, device: LaunchPlan((), scratch=1 << 50))
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory: .*"):
                call()


@needs_native
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory to plan with")], ids=repr)
def test_interrupted_plans_are_not_kept(launcher: None, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def fail(*args: object) -> None:
        raise error

    for module, name in ((planning, "plan"), (runtime, "_code")):  # before planning, and halfway
        with monkeypatch.context() as context:
            context.setattr(module, name, fail)
            with pytest.raises(type(error)):
                call()
    assert call().shape == (2, 4, 5, 6)
