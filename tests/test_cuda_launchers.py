"""From an operator call to launches, with both launchers, on a double of the driver."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import BL, BR, TL, TR, Case
from cuda_double import CONTEXT, STREAM, DriverDouble
from oracles import assert_close
from torch import Tensor, nn

from nflows_kconv import ConditionalInvertibleConv2d, InvertibleConv1d, InvertibleConv2d, warmup
from nflows_kconv.backends import cuda, native, reference, registry
from nflows_kconv.backends.cuda import driver, native_launcher, plan, planning, runtime
from nflows_kconv.backends.cuda.native_launcher import NativeLauncher
from nflows_kconv.backends.cuda.plan import POINTER_BYTES, Launch, LaunchPlan, arguments, kernel
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.cuda.runtime import Runtime
from nflows_kconv.backends.registry import OperatorCall

needs_native = pytest.mark.skipif(not native.available, reason=f"no native library: {native.reason}")


@pytest.fixture(params=["python", pytest.param("native", marks=needs_native)])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Returns a launcher on a new driver: `run`, `driver` and `name`."""
    monkeypatch.setattr(runtime, "_code", lambda kernel, capability: kernel)
    driver = DriverDouble()
    if request.param == "python":
        run = PythonLauncher(Runtime(driver), driver).run
    else:
        connected = NativeLauncher.connected
        NativeLauncher(native.loaded(), Runtime(driver), driver).connect()
        run = native_launcher.run
    yield SimpleNamespace(name=request.param, driver=driver, run=run)
    if request.param == "native":
        connected.connect()


def call_of(case: Case, operation: str = "solve", **changes: Any) -> OperatorCall:
    other = case.input(seed=2) if operation == "weight_gradient" else case.weight()
    own = OperatorCall(operation, case.input(), other, case.stencils, kernel_size=case.kernel_size)
    return own._replace(**changes)


# With real plans and kernels

# Uses the sizes in the table of test_cuda_kernels where possible, to share compiled kernels.
EMULATED = (
    Case(),
    Case(layout="channels_last"),
    Case((BR,), per_group=2, layout="cropped", dtype=torch.float64),
    Case((TR, BL), per_group=2, kernel_size=(2, 4), layout="expanded", dtype=torch.float16),
    Case((TL, BR) * 9, per_group=1, batch=13, size=(3, 3)),
    Case((BL,), per_group=68, kernel_size=(2, 1), size=(3, 5), dtype=torch.bfloat16),
)


@cuda_emulator.needs_compiler
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_results_are_those_of_the_reference(launcher: SimpleNamespace, case: Case):
    bias = case.bias().repeat_interleave(2)[::2]
    for asked in (
        call_of(case, "conv", unit_diagonal=True, bias=bias),
        call_of(case, transpose=True, log_diagonal=bias / 8),
    ):
        output = launcher.run(asked)
        assert_close(output, reference.run(asked))
        assert output.stride() == torch.empty_like(asked.input).stride()
    for unit_diagonal in (False, True):
        asked = call_of(case, "weight_gradient", unit_diagonal=unit_diagonal)
        gradient = launcher.run(asked)
        assert_close(gradient, reference.run(asked), factor=4)
        assert gradient.is_contiguous()
    assert len(launcher.driver.launches) >= 6


@cuda_emulator.needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        Case(("L", "R"), kernel_size=(3, 2), layout="cropped", biased=True),
        Case(("R",), per_group=3, kernel_size=(5, 3), layout="channels_last", dtype=torch.float64),
        Case(("NTL", "FBR"), kernel_size=(2, 2, 3), size=(3, 4, 5), biased=True),
        Case(("B",), per_group=17, kernel_size=(2, 3), size=(3, 4), biased=True),
        Case((TR,), per_group=65, batch=1, size=(3, 2), dtype=torch.float64),
    ],
    ids=str,
)
def test_what_kernels_do_a_part_of(launcher: SimpleNamespace, case: Case, monkeypatch: pytest.MonkeyPatch):
    """Covers exchanged axes, three dimensions, and solutions of many channels."""
    monkeypatch.setattr(native, "available", launcher.name == "native")
    monkeypatch.setattr(driver, "describe", launcher.driver.describe)
    monkeypatch.setattr(cuda, "_python_launcher", launcher)
    for operation in ("conv", "solve"):
        for changes in (dict(unit_diagonal=True, bias=case.bias()), dict(transpose=True, log_diagonal=case.bias() / 8)):
            asked = call_of(case, operation, **changes)
            output = cuda.run(asked)
            assert_close(output, reference.run(asked))
            assert output.stride() == torch.empty_like(asked.input).stride()
    assert launcher.driver.launches


@cuda_emulator.needs_compiler
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_log_determinants_take_one_launch(launcher: SimpleNamespace, dtype: torch.dtype, transpose: bool):
    for log_diagonal in (torch.randn(40, dtype=dtype), torch.randn(7, 3, dtype=dtype)):
        images = log_diagonal[..., None, None].expand(7, -1, 30, 1)
        asked = OperatorCall("log_abs_det", images, images, (0,), transpose=transpose, kernel_size=(1, 1))
        sums = launcher.run(asked)
        assert sums.dtype == torch.promote_types(dtype, torch.float32)
        assert sums.is_contiguous()
        assert_close(sums, reference.run(asked))
    assert [launch.kernel.name for launch, _, _ in launcher.driver.launches] == ["log_abs_det"] * 2
    assert len(launcher.driver.loaded) == 1  # one kernel for all sizes
    assert not launcher.driver.zeroed


@pytest.fixture
def as_on_a_gpu(launcher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Runs all calls on the CUDA backend; returns a function that returns the kernels launched since its last call."""
    monkeypatch.setattr(native, "available", launcher.name == "native")
    monkeypatch.setattr(driver, "describe", launcher.driver.describe)
    monkeypatch.setattr(cuda, "_python_launcher", launcher)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    backend = registry.Implementation("cuda", "any", cuda.status, lambda call: None, cuda.run)
    for name, value in dict(_registered={"cuda": backend}, _chosen=None, attempt=None).items():
        monkeypatch.setattr(registry, name, value)

    def launched() -> list[str]:
        names = [launch.kernel.name for launch, _, _ in launcher.driver.launches]
        launcher.driver.launches.clear()
        return names

    return launched


@cuda_emulator.needs_compiler
@pytest.mark.parametrize(
    ("layer", "shape", "context"),
    [
        (InvertibleConv2d(4, diagonal="learned"), (3, 4, 5, 6), None),
        (InvertibleConv1d(4, diagonal="learned", dtype=torch.float16), (3, 4, 6), None),
        (ConditionalInvertibleConv2d(4, diagonal="learned", context_features=2), (3, 4, 5, 6), torch.randn(3, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_takes_one_launch_more_than_its_kernel(as_on_a_gpu, layer: nn.Module, shape: tuple, context: Tensor):
    layer.log_diagonal.data.normal_()
    images, own = torch.randn(shape, dtype=layer.raw_weight.dtype), () if context is None else (context,)
    for function, own_kernel in ((layer.forward, "convolution"), (layer.inverse, "solve_rows")):
        expected = function(images, *own)[1].detach()
        assert as_on_a_gpu() == [own_kernel]  # torch differentiates its own operators
        with torch.no_grad():
            log_det = function(images, *own)[1]
            assert as_on_a_gpu() == [own_kernel, "log_abs_det"]
            assert function(images[:0], *(each[:0] for each in own))[1].shape == (0,)
        assert as_on_a_gpu() == []
        torch.testing.assert_close(log_det, expected)


def test_warmup_loads_the_kernel_of_log_determinants(as_on_a_gpu, launcher: SimpleNamespace, monkeypatch):
    launcher.driver.run = lambda launch: None
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    layer, images = InvertibleConv2d(4, diagonal="learned"), torch.randn(3, 4, 5, 6)
    warmup(layer, images.shape)
    launcher.driver.capturing = True
    with torch.no_grad():
        for function in (layer.forward, layer.inverse):
            function(images)
            assert "log_abs_det" in as_on_a_gpu()


# With made-up plans


class Planner:
    """Plans two launches with scratch memory for every problem."""

    def __init__(self) -> None:
        self.problems: list[plan.ProblemSpec] = []

    def __call__(self, problem: plan.ProblemSpec, device: object) -> LaunchPlan:
        self.problems.append(problem)
        first = Launch(kernel(problem, "made_up.cu", "first"), (3, 2, 1), 64, 1000, arguments(problem, (1, 2)))
        second = Launch(kernel(problem, "made_up.cu", "second"), (70000, 1, 1), 128, 0, arguments(problem, (3,), (16,)))
        return LaunchPlan((first, second), scratch=1000, zeroed=600)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch, launcher: SimpleNamespace) -> Planner:
    """Replaces the launcher's plans by made-up ones, whose launches do nothing."""
    planner = Planner()
    monkeypatch.setattr(planning, "plan", planner)
    launcher.driver.run = lambda launch: None
    return planner


def call(launcher: SimpleNamespace, **options) -> torch.Tensor:
    return launcher.run(call_of(Case(**options)))


@pytest.mark.parametrize("name", ["conv", "solve", "weight_gradient"])
def test_the_problem_is_that_of_the_call(launcher: SimpleNamespace, planner: Planner, name: str):
    case = Case((BR, TL, TL), per_group=2, kernel_size=(2, 3), layout="cropped", dtype=torch.float64)
    is_operator = name != "weight_gradient"
    asked = call_of(case, name, unit_diagonal=True)
    if is_operator:
        asked = asked._replace(bias=case.bias(), transpose=True)
    output = launcher.run(asked)
    assert planner.problems == [
        plan.ProblemSpec(
            operation=name,
            dtype=torch.float64,
            shape=case.input_shape,
            kernel_size=(2, 3),
            stencils=(3, 0, 0),
            unit_diagonal=True,
            transpose=is_operator,
            first_strides=asked.input.stride(),
            second_strides=asked.other.stride(),
            output_strides=output.stride(),
            bias=is_operator,
        )
    ]
    assert output.shape == (case.input_shape if is_operator else case.weight_shape)
    assert output.dtype == torch.float64


def test_launches_are_those_of_the_plan(launcher: SimpleNamespace, planner: Planner):
    case = Case()
    bias, log_diagonal = case.bias(), case.bias()
    asked = call_of(case, bias=bias, log_diagonal=log_diagonal)
    seen = []

    def run(launch: Launch) -> None:
        first, second, output, scratch, *vectors = struct.unpack("=6q", launch.arguments[:POINTER_BYTES])
        seen.append((first, second, output, *vectors, ctypes.string_at(scratch, 600)))
        ctypes.memset(scratch, 1, 1000)

    launcher.driver.run = run
    output = launcher.run(asked)
    pointers = [tensor.data_ptr() for tensor in (asked.input, asked.other, output, bias, log_diagonal)]
    assert seen == [(*pointers, bytes(600)), (*pointers, b"\1" * 600)]
    assert launcher.driver.zeroed == [600]
    planned = planner(planner.problems[0], None).launches
    launched, streams, contexts = zip(*launcher.driver.launches, strict=True)
    assert [
        replace(launch, arguments=bytes(POINTER_BYTES) + launch.arguments[POINTER_BYTES:]) for launch in launched
    ] == list(planned)
    assert set(streams) == {STREAM}
    assert set(contexts) == {CONTEXT}


def test_every_call_has_pointers_of_its_own(launcher: SimpleNamespace, planner: Planner):
    problems = [call_of(Case(), input=Case().input(seed=seed)) for seed in range(3)]
    outputs = [launcher.run(asked) for asked in problems]
    firsts = [struct.unpack_from("=6q", launch.arguments) for launch, _, _ in launcher.driver.launches[::2]]
    assert [(*first[:3], *first[4:]) for first in firsts] == [
        (asked.input.data_ptr(), asked.other.data_ptr(), output.data_ptr(), 0, 0)
        for asked, output in zip(problems, outputs, strict=True)
    ]


def test_a_problem_is_planned_once(launcher: SimpleNamespace, planner: Planner):
    changes = [
        {},
        dict(batch=3),
        dict(size=(6, 6)),
        dict(size=(5, 7)),
        dict(dtype=torch.float16),
        dict(kernel_size=(2, 2)),
        dict(corners=(TL, TR, BL, BL)),
        dict(corners=(TL, TR), per_group=4),
        dict(layout="channels_last"),
        dict(layout="cropped"),
    ]
    for _ in range(3):
        for change in changes:
            call(launcher, **change)
        launcher.run(call_of(Case(), transpose=True))
        launcher.run(call_of(Case(), bias=Case().bias()))
        launcher.run(call_of(Case(), unit_diagonal=True))
        # Needs no other plan, because kernels read it at run time.
        launcher.run(call_of(Case(), log_diagonal=Case().bias()))
        launcher.run(call_of(Case(), "conv"))
    assert len(planner.problems) == len(set(planner.problems)) == len(changes) + 4


def test_plans_are_bounded_and_kernels_stay(launcher: SimpleNamespace, planner: Planner):
    weight = torch.ones(1, 1, 1, 1)
    images = torch.ones(1, 1, 1, 1).expand(5000, 1, 1, 1)
    asked = OperatorCall("solve", images, weight, [0], kernel_size=(1, 1))
    for batch in range(1, 4200):
        launcher.run(asked._replace(input=images[:batch]))
    assert len(planner.problems) == 4199
    launcher.run(asked._replace(input=images[:1]))
    assert len(planner.problems) == 4200
    assert len(launcher.driver.loaded) == 1


def test_empty_tensors_need_no_launch(launcher: SimpleNamespace, planner: Planner):
    for change in (dict(batch=0), dict(size=(0, 6)), dict(size=(5, 0))):
        case = Case(layout="channels_last", **change)
        assert launcher.run(call_of(case)).shape == case.input_shape
        gradient = launcher.run(call_of(case, "weight_gradient"))
        assert torch.equal(gradient, torch.zeros(case.weight_shape))
    assert not planner.problems


@pytest.mark.parametrize(
    "error", [error("it cannot be planned") for error in (RuntimeError, ValueError, KeyboardInterrupt)], ids=repr
)
def test_what_python_raises_comes_out(launcher: SimpleNamespace, planner: Planner, monkeypatch, error):
    def fail(problem: plan.ProblemSpec, device: object) -> LaunchPlan:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(planning, "plan", fail)
        for _ in range(2):
            with pytest.raises(BaseException, match=r"^it cannot be planned$") as raised:
                call(launcher)
            assert raised.value is error
    call(launcher)


def test_errors_of_the_driver_have_a_name(launcher: SimpleNamespace, planner: Planner):
    launcher.driver.error = 719
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel failed: CUDA_ERROR_719$"):
        call(launcher)
    launcher.driver.error = 0
    call(launcher)


def test_too_little_memory_says_so(launcher: SimpleNamespace, planner: Planner, monkeypatch):
    monkeypatch.setattr(planning, "plan", lambda problem, device: LaunchPlan((), scratch=1 << 50))
    with pytest.raises(RuntimeError, match="memory"):
        call(launcher)


def test_nothing_is_compiled_inside_a_capture(launcher: SimpleNamespace, planner: Planner):
    launcher.driver.capturing = True
    with pytest.raises(
        RuntimeError, match=r"kernel first must be compiled before .* call nflows_kconv\.warmup\(module, "
    ):
        call(launcher)
    assert not launcher.driver.loaded
    launcher.driver.capturing = False
    call(launcher)
    launcher.driver.capturing = True
    call(launcher)
    call(launcher, batch=7)  # another plan of the same kernels
    assert len(launcher.driver.loaded) == 1


def test_threads_share_what_is_loaded(launcher: SimpleNamespace, planner: Planner):
    barrier, failures = threading.Barrier(8), []

    def run(offset: int) -> None:
        barrier.wait()
        try:
            for index in range(24):
                call(launcher, batch=1 + (offset + index) % 8)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(launcher.driver.loaded) == 1
    assert len(launcher.driver.launches) == 8 * 24 * 2


# Only the native launcher


@pytest.fixture
def native_alone(launcher: SimpleNamespace) -> SimpleNamespace:
    if launcher.name != "native":
        pytest.skip("the Python launcher leaves this to the module `driver`")
    return launcher


@pytest.mark.parametrize("current", [None, 0xBAD])
def test_the_context_is_the_devices(native_alone: SimpleNamespace, planner: Planner, current: int | None):
    native_alone.driver.contexts = [current]
    call(native_alone)
    assert {context for _, _, context in native_alone.driver.launches} == {CONTEXT}
    assert native_alone.driver.contexts == [current]
    native_alone.driver.error = 1
    with pytest.raises(RuntimeError):
        call(native_alone)
    assert native_alone.driver.contexts == [current]


def test_no_error_of_an_earlier_call_comes_out(native_alone: SimpleNamespace, planner: Planner, monkeypatch):
    asked = call_of(Case())
    arguments = asked.input, asked.other, None, None, list(asked.stencils), False, False
    with monkeypatch.context() as broken:
        broken.delattr(planning, "plan")
        with pytest.raises(RuntimeError, match="has no attribute 'plan'"):  # leaves what Python raised
            torch.ops.nflows_kconv_native.solve_cuda(*arguments)
    with monkeypatch.context() as broken:
        broken.setattr(planning, "plan", lambda problem, device: LaunchPlan((), scratch=1 << 50))
        with pytest.raises(RuntimeError, match="memory"):
            torch.ops.nflows_kconv_native.conv_cuda(*arguments)
    native_alone.driver.error = 719
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel failed: CUDA_ERROR_719$") as raised:
        call(native_alone)
    assert type(raised.value) is RuntimeError
