"""From a call of an operator to launches, by both launchers, on a driver that is a test double."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import cuda_emulator
import pytest
import torch
from cases import BL, BR, CORNERS, TL, TR, Case
from cuda_double import CONTEXT, STREAM, DriverDouble, native_operators
from oracles import assert_close

from nflows_kconv import geometry, native, reference
from nflows_kconv.backends.cuda import planning, runtime
from nflows_kconv.backends.cuda.native_launcher import NativeLauncher
from nflows_kconv.backends.cuda.plan import POINTER_BYTES, Launch, Plan, Problem, arguments, kernel
from nflows_kconv.backends.cuda.python_launcher import PythonLauncher
from nflows_kconv.backends.cuda.runtime import Runtime

needs_native = pytest.mark.skipif(not native.available, reason=f"no native library: {native.reason}")


@pytest.fixture(params=["python", pytest.param("native", marks=needs_native)])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A launcher's operators on a new driver: `conv`, `solve`, `weight_gradient`, `driver` and `name`."""
    monkeypatch.setattr(runtime, "_code", lambda kernel, capability: kernel)
    driver = DriverDouble()
    if request.param == "python":
        operators = PythonLauncher(Runtime(driver), driver)
    else:
        connected = NativeLauncher.connected
        NativeLauncher(native.loaded(), Runtime(driver), driver, lambda: False).connect()
        _, operators = native_operators()
    yield SimpleNamespace(
        name=request.param,
        driver=driver,
        conv=operators.conv,
        solve=operators.solve,
        weight_gradient=operators.weight_gradient,
    )
    if request.param == "native":
        connected.connect()


def numbers(case: Case) -> list[int]:
    return geometry.parse_corners(case.corners)


# With real plans and kernels

EMULATED = (
    Case(batch=2),
    Case((TL, BR), per_group=3, layout="channels_last"),
    Case((BR,), per_group=2, layout="cropped", dtype=torch.float64),
    Case((TR, BL), per_group=2, kernel_size=(2, 4), layout="expanded", dtype=torch.float16),
    Case(CORNERS * 5, per_group=1, kernel_size=(2, 2), height=3, width=3),
    Case((TL,), per_group=70, batch=1, height=2, width=3, kernel_size=(2, 2)),
)


@cuda_emulator.needs_compiler
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_results_are_those_of_the_reference(launcher: SimpleNamespace, case: Case):
    input, weight, grad, corners = case.input(), case.weight(), case.input(seed=2), numbers(case)
    bias = case.bias().repeat_interleave(2)[::2]
    for transpose in (False, True):
        for name, b in (("conv", None), ("conv", bias), ("solve", bias if transpose else None)):
            output = getattr(launcher, name)(input, weight, b, corners, transpose)
            assert_close(output, getattr(reference, name)(input, weight, b, corners, transpose))
            assert output.stride() == torch.empty_like(input).stride()
    gradient = launcher.weight_gradient(input, grad, corners, case.kernel_size)
    assert_close(gradient, reference.weight_gradient(input, grad, corners, case.kernel_size), factor=4)
    assert gradient.is_contiguous()
    assert len(launcher.driver.launches) >= 5


# With plans that are made up


class Planner:
    """Plans two launches, with scratch memory, for every problem."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, problem: Problem, device: object) -> Plan:
        self.problems.append(problem)
        first = Launch(kernel(problem, "made_up.cu", "first"), (3, 2, 1), 64, 1000, arguments(problem, (1, 2)))
        second = Launch(kernel(problem, "made_up.cu", "second"), (70000, 1, 1), 128, 0, arguments(problem, (3,), (16,)))
        return Plan((first, second), scratch=1000, zeroed=600)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch, launcher: SimpleNamespace) -> Planner:
    """Makes up the plans of the launcher, whose launches do nothing then."""
    planner = Planner()
    monkeypatch.setattr(planning, "plan", planner)
    launcher.driver.run = lambda launch: None
    return planner


def call(launcher: SimpleNamespace, **options) -> torch.Tensor:
    case = Case(**options)
    return launcher.solve(case.input(), case.weight(), None, numbers(case), False)


@pytest.mark.parametrize("name", ["conv", "solve", "weight_gradient"])
def test_the_problem_is_that_of_the_call(launcher: SimpleNamespace, planner: Planner, name: str):
    case = Case((BR, TL, TL), per_group=2, kernel_size=(2, 3), layout="cropped", dtype=torch.float64)
    input, weight, grad = case.input(), case.weight(), case.input(seed=2).contiguous()
    if name == "weight_gradient":
        second, output = grad, launcher.weight_gradient(input, grad, numbers(case), case.kernel_size)
    else:
        second, output = weight, getattr(launcher, name)(input, weight, case.bias(), numbers(case), True)
    assert planner.problems == [
        Problem(
            operation=name,
            dtype=torch.float64,
            shape=case.input_shape,
            kernel_size=(2, 3),
            corners=(3, 0, 0),
            transpose=name != "weight_gradient",
            first_strides=input.stride(),
            second_strides=second.stride(),
            output_strides=output.stride(),
            bias=name != "weight_gradient",
        )
    ]
    assert output.shape == (case.weight_shape if name == "weight_gradient" else case.input_shape)
    assert output.dtype == torch.float64


def test_launches_are_those_of_the_plan(launcher: SimpleNamespace, planner: Planner):
    case = Case()
    input, weight, bias = case.input(), case.weight(), case.bias()
    seen = []

    def run(launch: Launch) -> None:
        first, second, output, scratch, bias = struct.unpack("=5q", launch.arguments[:POINTER_BYTES])
        seen.append((first, second, output, bias, ctypes.string_at(scratch, 600)))
        ctypes.memset(scratch, 1, 1000)

    launcher.driver.run = run
    output = launcher.solve(input, weight, bias, numbers(case), False)
    pointers = input.data_ptr(), weight.data_ptr(), output.data_ptr(), bias.data_ptr()
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
    inputs, weight = [Case().input(seed=seed) for seed in range(3)], Case().weight()
    outputs = [launcher.solve(input, weight, None, [0, 1, 2, 3], False) for input in inputs]
    firsts = [struct.unpack_from("=5q", launch.arguments) for launch, _, _ in launcher.driver.launches[::2]]
    assert [(*first[:3], first[4]) for first in firsts] == [
        (input.data_ptr(), weight.data_ptr(), output.data_ptr(), 0)
        for input, output in zip(inputs, outputs, strict=True)
    ]


def test_a_problem_is_planned_once(launcher: SimpleNamespace, planner: Planner):
    changes = [
        {},
        dict(batch=3),
        dict(height=6),
        dict(width=7),
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
    launcher.solve(Case().input(), Case().weight(), None, [0, 1, 2, 3], True)
    launcher.solve(Case().input(), Case().weight(), Case().bias(), [0, 1, 2, 3], False)
    launcher.conv(Case().input(), Case().weight(), None, [0, 1, 2, 3], False)
    assert len(planner.problems) == len(set(planner.problems)) == len(changes) + 3


def test_plans_are_bounded_and_kernels_stay(launcher: SimpleNamespace, planner: Planner):
    weight = torch.ones(1, 1, 1, 1)
    images = torch.ones(1, 1, 1, 1).expand(5000, 1, 1, 1)
    for batch in range(1, 4200):
        launcher.solve(images[:batch], weight, None, [0], False)
    assert len(planner.problems) == 4199
    launcher.solve(images[:1], weight, None, [0], False)
    assert len(planner.problems) == 4200
    assert len(launcher.driver.loaded) == 1


def test_empty_tensors_need_no_launch(launcher: SimpleNamespace, planner: Planner):
    for size in ("batch", "height", "width"):
        case = Case(layout="channels_last", **{size: 0})
        output = launcher.solve(case.input(), case.weight(), None, numbers(case), False)
        assert output.shape == case.input_shape
        gradient = launcher.weight_gradient(case.input(), case.input(), numbers(case), (3, 3))
        assert torch.equal(gradient, torch.zeros(case.weight_shape))
    assert not planner.problems


@pytest.mark.parametrize("error", [RuntimeError("it cannot be planned"), ValueError("it cannot be planned")], ids=repr)
def test_what_python_raises_comes_out(launcher: SimpleNamespace, planner: Planner, monkeypatch, error):
    def fail(problem: Problem, device: object) -> Plan:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(planning, "plan", fail)
        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError), match=r"it cannot be planned$"):
                call(launcher)
    call(launcher)


def test_errors_of_the_driver_have_a_name(launcher: SimpleNamespace, planner: Planner):
    launcher.driver.error = 719
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel failed: CUDA_ERROR_719$"):
        call(launcher)
    launcher.driver.error = 0
    call(launcher)


def test_too_little_memory_says_so(launcher: SimpleNamespace, planner: Planner, monkeypatch):
    monkeypatch.setattr(planning, "plan", lambda problem, device: Plan((), scratch=1 << 50))
    with pytest.raises(RuntimeError, match="memory"):
        call(launcher)


def test_nothing_is_compiled_inside_a_capture(launcher: SimpleNamespace, planner: Planner):
    launcher.driver.capturing = True
    with pytest.raises(RuntimeError, match=r"first is first needed inside .* call nflows_kconv\.warmup\(module, "):
        call(launcher)
    assert not launcher.driver.loaded
    launcher.driver.capturing = False
    call(launcher)
    launcher.driver.capturing = True
    call(launcher)
    call(launcher, batch=7)  # another plan of the same kernels
    assert len(launcher.driver.loaded) == 1


ALL = [0, 1, 2, 3]
WRONG = {
    "channels": lambda x, w, b: (x[:, :7], w, b, ALL, False),
    "corners": lambda x, w, b: (x, w, b, [0, 1], False),
    "dtype": lambda x, w, b: (x, w.double(), b, ALL, False),
    "size of the kernel": lambda x, w, b: (x, w[..., :0], b, ALL, False),
    "rank": lambda x, w, b: (x[0], w, b, ALL, False),
    "bias's channels": lambda x, w, b: (x, w, b[:7], ALL, False),
    "bias's rank": lambda x, w, b: (x, w, b[None], ALL, False),
    "bias's dtype": lambda x, w, b: (x, w, b.double(), ALL, False),
}


@needs_native
@pytest.mark.parametrize("launcher", ["native"], indirect=True)
@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_not_launched(launcher: SimpleNamespace, planner: Planner, arguments):
    for name in ("conv", "solve"):
        with pytest.raises(RuntimeError, match="must"):
            getattr(launcher, name)(*arguments(Case().input(), Case().weight(), Case().bias()))
    assert not planner.problems


def test_wrong_shapes_are_not_launched(launcher: SimpleNamespace, planner: Planner):
    input, weight = Case().input(), Case().weight()
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        launcher.solve(input, weight[:4], None, [0, 1, 2, 3], False)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        launcher.conv(input, weight, input.new_ones(7), [0, 1, 2, 3], False)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        launcher.weight_gradient(input, input[:1], [0, 1, 2, 3], (3, 3))
    assert not planner.problems


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


# What the native launcher does by itself


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


def test_arguments_must_fit(native_alone: SimpleNamespace, planner: Planner, monkeypatch):
    def plan(problem: Problem, device: object) -> Plan:
        return Plan((Launch(kernel(problem, "made_up.cu", "first"), (1, 1, 1), 1, 0, bytes(5000)),))

    monkeypatch.setattr(planning, "plan", plan)
    with pytest.raises(RuntimeError, match="must have 40 to 4096 bytes, got 5000"):
        call(native_alone)


@needs_native
@pytest.mark.parametrize("name", ["conv", "solve", "weight_gradient"])
def test_the_reference_runs_where_kernels_cannot(name: str):
    connected = NativeLauncher.connected
    driver = DriverDouble()
    NativeLauncher(native.loaded(), Runtime(driver), driver, lambda: True).connect()
    try:
        _, operators = native_operators()
        arguments = Case().input(), Case().weight(), Case().bias(), [0, 1, 2, 3], True
        if name == "weight_gradient":
            arguments = Case().input(), Case().input(seed=2), [0, 1, 2, 3], (3, 3)
        assert torch.equal(getattr(operators, name)(*arguments), getattr(reference, name)(*arguments))
        assert not driver.launches
    finally:
        connected.connect()
