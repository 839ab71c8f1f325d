"""Tests that need a GPU: streams, graphs, devices, threads, processes; `--device cuda` runs the properties on it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import BR, CORNERS, TL, Case
from torch import Tensor

import nflows_kconv
from nflows_kconv import InvertibleConv2d, functional, ops
from nflows_kconv.backends import cuda, native
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.cuda.runtime import Runtime, runtime
from nflows_kconv.backends.registry import OperatorCall

pytestmark = pytest.mark.gpu

CASES = (
    Case(batch=100, per_group=3, size=(16, 16)),
    Case((TL,), batch=20, per_group=24, size=(8, 8)),
    Case((TL, BR), batch=3, per_group=40, kernel_size=(2, 3), size=(9, 7), dtype=torch.float64),
    Case((BR,), batch=2, per_group=200, size=(8, 8), layout="channels_last"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def directions(case: Case, device: str = "cuda") -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Returns the convolution, its inverse, and the gradients of both, as a function of the input."""
    weight = case.weight(device).requires_grad_()

    def run(input: Tensor) -> tuple[Tensor, ...]:
        results = []
        for function in (functional.conv2d, functional.conv2d_inverse):
            leaf = input.detach().requires_grad_()
            output = function(leaf, weight, corners=case.corners)
            results += [output.detach(), *torch.autograd.grad(output, (leaf, weight), torch.ones_like(output))]
        return tuple(results)

    return run


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


def never_compiled(per_group: int) -> Case:
    """Returns a case whose kernels no other test needs."""
    return Case((TL, BR), per_group=per_group, kernel_size=(4, 5), dtype=torch.float64)


@every_case
def test_deterministic(case: Case):
    run, input = directions(case), case.input("cuda")
    expected = run(input)
    for _ in range(5):
        assert_equal(run(input), expected)


@every_case
def test_in_a_graph(case: Case):
    run, input = directions(case), case.input("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the warm-up of torch's documentation
        run(input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(input)
    for seed in (2, 3):
        input.copy_(case.input("cuda", seed))
        graph.replay()
        assert_equal(outputs, run(input))


def test_first_seen_in_a_graph():
    case = never_compiled(5)
    input, weight = case.input("cuda"), case.weight("cuda")
    with pytest.raises(RuntimeError, match=r"nflows_kconv\.warmup\(module, input_shape\)"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            functional.conv2d_inverse(input, weight, corners=case.corners)
    torch.cuda.synchronize()
    expected = functional.conv2d_inverse(input, weight, corners=case.corners)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = functional.conv2d_inverse(input, weight, corners=case.corners)
    graph.replay()
    assert torch.equal(output, expected)


def test_warmup_makes_a_capture_possible():
    case = never_compiled(6)
    options = dict(corners=case.corners, diagonal="learned", device="cuda", dtype=case.dtype)
    layer, input = InvertibleConv2d(case.channels, case.kernel_size, **options), case.input("cuda")
    nflows_kconv.warmup(layer, case.input_shape)
    loaded = len(runtime._functions)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs, restored = layer(input), layer.inverse(input)
    graph.replay()
    with torch.no_grad():
        assert_equal(outputs, layer(input))
        assert_equal(restored, layer.inverse(input))
    layer(input)[0].sum().backward()
    layer.inverse(input)[0].sum().backward()
    assert len(runtime._functions) == loaded


def test_a_last_smaller_batch_runs_on_the_same_kernels():
    layer, images = InvertibleConv2d(12).cuda(), torch.randn(100, 12, 16, 16, device="cuda")
    nflows_kconv.warmup(layer, images.shape)
    expected = layer.inverse(images)[0][:70]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        restored = layer.inverse(images[:70])[0]
    graph.replay()
    torch.testing.assert_close(restored, expected)


@every_case
def test_on_the_current_stream(case: Case):
    run, input, stream = directions(case), case.input("cuda"), torch.cuda.Stream()
    expected = run(input)
    late = torch.zeros_like(input)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on another stream would read zeros
        late.copy_(input)
        outputs = run(late)
    stream.synchronize()
    assert_equal(outputs, expected)


@every_case
def test_nothing_waits_for_the_device(case: Case):
    run, input = directions(case), case.input("cuda")
    run(input)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(input)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_memory_is_given_back(case: Case):
    run, input = directions(case), case.input("cuda")
    run(input)
    before = torch.cuda.memory_allocated()
    run(input)
    assert torch.cuda.memory_allocated() == before


@every_case
def test_in_new_threads(case: Case):
    run, input, weight = directions(case), case.input("cuda"), case.weight("cuda")
    expected, failures = run(input), []
    torch.cuda.synchronize()

    def work() -> None:
        try:
            first = functional.conv2d(input, weight, corners=case.corners)  # this thread's first use of CUDA
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    assert_equal(run(input), expected)
            assert torch.equal(first, expected[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_on_a_device_that_is_not_the_current_one(case: Case):
    expected = directions(case, "cuda:0")(case.input("cuda:0"))
    with torch.cuda.device(0):
        outputs = directions(case, "cuda:1")(case.input("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(output.device == torch.device("cuda:1") for output in outputs)
    torch.testing.assert_close([output.cpu() for output in outputs], [value.cpu() for value in expected])


@every_case
def test_launched_from_python(case: Case):
    launcher, weight, bias = PythonLauncher(Runtime()), case.weight("cuda"), case.bias("cuda")
    images = case.input("cuda"), case.input("cuda", seed=2)
    calls = [OperatorCall("weight_gradient", *images, case.stencils, kernel_size=case.kernel_size)]
    for name, transpose, biased in product(("conv", "solve"), (False, True), (False, True)):
        changes = dict(bias=bias, log_diagonal=bias / 8) if biased else dict(unit_diagonal=transpose)
        calls.append(calls[0]._replace(operation=name, other=weight, transpose=transpose, **changes))
    for call in calls:
        output, expected = launcher.run(call), cuda.run(call)
        assert torch.equal(output, expected)
        assert output.stride() == expected.stride()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str):
    torch.compiler.reset()
    layer = InvertibleConv2d(12, diagonal="learned", bias=True).cuda()
    input = torch.randn(10, 12, 8, 8, device="cuda")
    for function in (layer.forward, layer.inverse):
        fast = torch.compile(function, fullgraph=True, mode=mode)
        for _ in range(3):
            output, log_det = fast(input)
            expected, expected_log_det = function(input)
            torch.testing.assert_close((output.clone(), log_det.clone()), (expected, expected_log_det))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype):
    layer = InvertibleConv2d(12).cuda()
    input = torch.randn(10, 12, 8, 8, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype):
        output, restored = layer(input)[0], layer.inverse(input)[0]
    assert output.dtype == restored.dtype == torch.float32
    assert torch.equal(output, layer(input.float())[0])
    assert torch.equal(restored, layer.inverse(input.float())[0])


def test_arguments_on_two_devices():
    case = Case()
    for input, weight in ((case.input("cuda"), case.weight()), (case.input(), case.weight("cuda"))):
        with pytest.raises(ValueError, match="input and weight must be on the same device"):
            functional.conv2d(input, weight, corners=case.corners)
        with pytest.raises((RuntimeError, ValueError)):
            ops.solve(input, weight, None, None, [0, 1, 2, 3], [1, 1], False, False)


def test_report():
    backend = nflows_kconv.available_backends()["cuda"]
    assert backend.selected
    name = torch.cuda.get_device_name()
    launcher = "C++" if native.available else "Python"
    assert backend.reason.startswith(f"{name}")
    assert f", compiled at run time by NVRTC {torch.version.cuda.split('.')[0]}." in backend.reason
    assert f", launched from {launcher}" in backend.reason
    assert not nflows_kconv.available_backends()["reference"].selected


def in_a_process(script: str, **environment: str) -> str:
    script = "import torch, nflows_kconv\n" + script
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout


def test_a_second_process_compiles_nothing(tmp_path):
    script = """
from nflows_kconv.backends.cuda import compiler
compile, compiled = compiler.compile, []
compiler.compile = lambda *args: (compiled.append(args), compile(*args))[1]
layer, input = nflows_kconv.InvertibleConv2d(12).cuda(), torch.ones(2, 12, 8, 8, device="cuda")
torch.testing.assert_close(layer(layer.inverse(input)[0])[0], input)
print(len(compiled) > 0)
"""
    place = str(tmp_path / "kernels")
    assert in_a_process(script, NFLOWS_KCONV_CACHE=place) == "True\n"
    assert in_a_process(script, NFLOWS_KCONV_CACHE=place) == "False\n"
    assert in_a_process(script, NFLOWS_KCONV_CACHE=os.devnull) == "True\n"


def test_images_are_checked():
    """Eager flows look at their first batch; the assertion of a compiled one ends its process's use of the GPU."""
    printed = in_a_process("""
from nflows_kconv.flows.images import UniformDequantization
right, wrong = (torch.full((3, 1, 2, 2), value, device="cuda") for value in (2.0, 0.5))
try:
    UniformDequantization()(wrong)
except ValueError as error:
    print(error)
compiled = torch.compile(UniformDequantization(), backend="aot_eager", fullgraph=True)
for images in (right, wrong):
    compiled(images)
    try:
        torch.cuda.synchronize()
        print("accepted")
    except RuntimeError as error:
        print(error)
""").splitlines()
    assert "whole numbers in 0..255, got 0.5" in printed[0]
    assert printed[1] == "accepted" and "device-side assert" in printed[2]


def test_forked_workers():
    """The parent's use of the GPU does not disturb workers that only use the CPU."""
    in_a_process("""
class Images(torch.utils.data.Dataset):
    layer = nflows_kconv.InvertibleConv2d(4)
    def __len__(self):
        return 8
    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer.inverse(torch.full((1, 4, 3, 3), float(index)))[0][0]

images = Images()
layer = nflows_kconv.InvertibleConv2d(4).cuda()
layer.load_state_dict(images.layer.state_dict())
expected = layer.inverse(torch.arange(8.0, device="cuda").view(8, 1, 1, 1).expand(8, 4, 3, 3))[0].cpu()
loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=2, multiprocessing_context="fork")
torch.testing.assert_close(torch.cat(list(loader)), expected)
""")


def test_corners_are_those_of_the_reference():
    """Checks the whole path from the public function to the kernels."""
    case = Case(CORNERS, batch=5)
    output = functional.conv2d(case.input("cuda"), case.weight("cuda"), corners=case.corners)
    torch.testing.assert_close(output.cpu(), functional.conv2d(case.input(), case.weight(), corners=case.corners))
