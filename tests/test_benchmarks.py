"""The benchmarks: what they compare, count and judge; and that both devices' tables run and can be read again.

No test measures time. Where there is no GPU, its tables run on the CPU with stand-ins for the clocks' CUDA.
"""

import contextlib
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import cuda_emulator
import pytest
import torch

from benchmarks import (
    accuracy,
    calibration,
    contestants,
    cuda_tables,
    dense,
    first_use,
    floors,
    layer,
    plots,
    smoke,
    targets,
    timing,
    workloads,
)
from benchmarks.workloads import FOUR, ONE, Case
from nflows_kconv import InvertibleConv2d, functional, stencil
from nflows_kconv.backends import registry
from nflows_kconv.backends.cuda import compiler, planning
from nflows_kconv.backends.cuda.plan import Kernel

BENCHMARKS = Path(layer.__file__).parent
H100 = "NVIDIA H100 80GB HBM3"
CURVE = {"conv2d", "inverse"}
TABLE = CURVE | {"forward", "conv2d_backward", "inverse_backward", "forward_backward"}
CUDA_TABLE = TABLE | {"grouped_conv2d", "grouped_conv2d_backward", "reference_inverse"}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=BENCHMARKS.parent)


class FakeCuda:
    """Stands for torch.cuda in the clocks.

    Attributes:
        now: Microseconds of GPU time.
        capturing: Whether a graph is being captured; contestants take no time then.
        captured_time: Microseconds that a replay of this graph will take.
    """

    def __init__(self):
        self.now, self.capturing, self.captured_time = 0.0, False, 0
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.time = None

            def record(self):
                self.time = cuda.now

            def synchronize(self):
                assert self.time is not None

            def elapsed_time(self, end):
                return 1e-3 * (end.time - self.time)

        class CUDAGraph:
            def replay(self):
                cuda.now += self.time

        @contextlib.contextmanager
        def graph(captured, stream):
            assert stream == "the current stream"
            cuda.capturing, cuda.captured_time = True, 0
            yield
            cuda.capturing, captured.time = False, cuda.captured_time

        self.Event, self.CUDAGraph, self.graph = Event, CUDAGraph, graph

    def current_stream(self):
        return "the current stream"

    def synchronize(self):
        assert not self.capturing

    def contestant(self, microseconds: int = 1):
        """Returns a call that takes this long on the GPU, and must not be captured before it ran, which compiles it."""
        compiled = False

        def call():
            nonlocal compiled
            if self.capturing:
                assert compiled
                self.captured_time += microseconds
            else:
                compiled = True
                self.now += microseconds

        return call


@pytest.fixture
def fake_cuda(monkeypatch):
    cuda = FakeCuda()
    fake_torch = types.SimpleNamespace(cuda=cuda)
    monkeypatch.setattr(timing, "torch", fake_torch)
    return cuda


@pytest.mark.parametrize("clock", [timing.eager, timing.graph])
def test_clocks_of_the_gpu_give_the_time_of_one_call(clock, fake_cuda):
    times = clock({"short": fake_cuda.contestant(1), "long": fake_cuda.contestant(7)}, 0)
    assert times == pytest.approx({"short": 1, "long": 7})


def test_what_empties_the_cache_is_not_counted(fake_cuda, monkeypatch):
    monkeypatch.setattr(timing, "_read_of_the_cache", lambda: fake_cuda.contestant(40))
    times = timing.cold({"short": fake_cuda.contestant(1), "long": fake_cuda.contestant(7)}, 0)
    assert times == pytest.approx({"short": 1, "long": 7})


def test_the_clock_of_the_host_takes_no_notice_of_the_gpu(fake_cuda):
    calls = []
    times = timing.host({"counted": lambda: calls.append(fake_cuda.now)}, 0)
    assert len(calls) == timing.WARM_UP + timing.LEAST_SAMPLES * timing.HOST_CALLS
    assert 0 < times["counted"] < 1e5


def test_contestants_take_turns_and_the_median_counts():
    order, values = [], iter([1, 50, 2, 60, 900, 40, 3, 70, 4, 80])

    def sample(name):
        order.append(name)
        return next(values)

    times = timing.take_turns({"a": lambda: sample("a"), "b": lambda: sample("b")}, 0)
    assert order == ["a", "b"] * timing.LEAST_SAMPLES
    assert times == {"a": 3, "b": 60}


@pytest.mark.parametrize("corners", [FOUR, ONE, ("BR", "TR")])
def test_the_baseline_is_the_layer(corners):
    x, weight = torch.randn(2, 8, 5, 4), InvertibleConv2d(8, corners=corners).weight.detach()
    expected = functional.conv2d(x, weight, corners=corners)
    for baseline in (contestants.pad_conv_cat, contestants.mirrored_conv2d):
        torch.testing.assert_close(baseline(x, weight, corners), expected)


@pytest.mark.parametrize("corners", [FOUR, ONE, ("BR",), ("TR", "BL")])
def test_the_dense_solve_is_the_inverse(corners):
    case = Case(3, (4, 5, 6), corners)
    layer = InvertibleConv2d(4, corners=corners).double()
    layer.raw_weight.data.mul_(10)
    weight, y = layer.weight.detach(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    jacobian = dense.matrices(weight, case)
    assert 4 * jacobian.numel() == dense.matrix_bytes(case)
    assert torch.equal(jacobian, jacobian.tril())
    x = functional.conv2d_inverse(y, weight, corners=corners)
    solved = dense.solve(jacobian, dense.right_hand_sides(y, case))
    torch.testing.assert_close(solved, dense.right_hand_sides(x, case))


@pytest.mark.parametrize("corners", [FOUR, ONE])
@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 7), (2, 1)])
def test_operations_are_the_weights_that_meet_pixels(height, width, corners):
    case = Case(3, (8, height, width), corners)
    # With all free weights one, outputs of an image of ones count the weights they read.
    weight = torch.ones(8, 8 // len(corners), 3, 3, dtype=torch.float64)
    counted = functional.conv2d(torch.ones(3, *case.shape, dtype=torch.float64), weight, corners=corners).sum().item()
    assert floors.count_operations(case) == 2 * counted


def test_floors_are_amounts_over_speeds():
    speeds = floors.Speeds(bytes_per_second=2e12, operations_per_second=5e13, seconds_per_step=1e-7)
    found = floors.floors(Case(100, (12, 16, 16), ONE), speeds)
    values, weights = 100 * 12 * 16 * 16, 12 * 12 * 9
    pairs = 12 * 12 * 45 * 45 - 66 * 256  # 45 = 16 + 15 + 14
    assert found["inverse"] == pytest.approx(
        {"bytes": 4 * (2 * values + weights) / 2e6, "operations": 2 * 100 * pairs / 5e7, "steps": 3.1}
    )
    assert found["forward"] == {name: found["inverse"][name] for name in ("bytes", "operations")}


@pytest.mark.parametrize(
    ("value", "verdict"), [(4.9, "aim met"), (5, "aim met"), (5.1, "met"), (10, "met"), (10.1, "missed")]
)
def test_verdict_with_an_aim(value, verdict):
    assert targets.Target(10, "us", aim=5).judge("inverse", "graph", value)["verdict"] == verdict


@pytest.mark.parametrize(("value", "verdict"), [(0.2, "met"), (0.21, "missed"), (float("nan"), "missed")])
def test_verdict_without_an_aim(value, verdict):
    assert targets.Target(0.2).judge("forward", "eager", value)["verdict"] == verdict


def made_up_times(**changed: float) -> dict[str, dict[str, float]]:
    """Times of a row in both modes, no measurements: all baselines take 100, all others 10."""
    times = {name: 100.0 if "conv2d" in name else 10.0 for name in TABLE}
    return {"eager": dict(times), "graph": times | changed, "cold": dict(times)}


def test_microseconds_are_judged_on_an_h100_alone():
    case, times = Case(100, (12, 16, 16)), made_up_times(inverse=7)
    (record,) = (record for record in targets.judge_row(case, times, H100) if record["quantity"] == "inverse")
    assert (record["value"], record["limit"], record["unit"], record["verdict"]) == (7, 10, "us", "met")
    others = targets.judge_row(case, times, "NVIDIA A100")
    assert {(record["quantity"], record["mode"], record["value"]) for record in others} == {
        (quantity, mode, 0.1) for quantity in ("forward", "forward_backward") for mode in ("eager", "graph")
    }


def test_one_group_is_judged_against_its_convolution_in_a_graph():
    (record,) = targets.judge_row(Case(100, (48, 4, 4), ONE), made_up_times(inverse=110), H100)
    assert (record["quantity"], record["mode"], record["value"]) == ("inverse", "graph", 1.1)
    assert record["verdict"] == "missed"


def test_many_channels_are_judged_in_both_modes():
    records = targets.judge_row(Case(100, (512, 16, 16)), made_up_times(inverse=90), H100)
    assert [(record["mode"], record["verdict"]) for record in records] == [("eager", "aim met"), ("graph", "met")]


def test_every_row_of_the_gpu_has_a_target_and_tiny_ones_have_none():
    for workload, wanted in ((workloads.CUDA, True), (workloads.tiny(workloads.CUDA), False)):
        for cases in workload.tables.values():
            assert all(bool(targets.of_case(case, H100)) == wanted for case in cases)
    absolute = [("inverse", "graph") in targets.of_case(case, H100) for case in workloads.CUDA.tables["four groups"]]
    assert absolute == [True] * 10


def test_errors_are_compared_with_those_of_the_cpu():
    torch.manual_seed(0)
    errors = accuracy.errors(Case(2, (4, 6, 5)), "cpu")
    quantities = ("", "_input_gradient", "_weight_gradient")
    assert list(errors) == [name + quantity for name in ("forward", "inverse") for quantity in quantities]
    for error in errors.values():
        assert 0 < error["cpu"] == error["device"] < 1e-5
    assert accuracy.ratio({"cpu": 1e-6, "device": 3e-6}) == pytest.approx(3)
    assert accuracy.ratio({"cpu": 0, "device": 2**-24}) == pytest.approx(1)


def test_first_use_tells_what_failed():
    with pytest.raises(RuntimeError, match=r"benchmarks.first_use nowhere 2 4 3 5 failed:\n[\s\S]*nowhere"):
        first_use.measure_first_use(Case(2, (4, 3, 5)), "nowhere")


def assert_schema(results: dict, workload: workloads.Workload) -> None:
    """Asserts that results of the GPU's tables have all there must be."""
    assert set(results) == {"machine", "tiny", "speeds", *workload.tables, "host", "accuracy", "first use"} | set(
        workload.curves
    )
    assert results["tiny"] is True
    assert {"device", "torch", "cuda", "cudnn", "driver", "date", "nflows_kconv", "python"} <= set(results["machine"])
    assert results["machine"]["tf32"] is False
    assert results["machine"]["cudnn_benchmark"] is True
    for name in workload.tables:
        for row in results[name]:
            assert set(row) == {"batch", "shape", "corners", "microseconds", "floors", "targets"}
            assert {mode: set(times) for mode, times in row["microseconds"].items()} == dict.fromkeys(
                cuda_tables.MODES, CUDA_TABLE
            )
            assert row["targets"] == []
    for name in workload.curves:
        for row in results[name]:
            assert set(row) == {"batch", "shape", "corners", "microseconds", "floors", "dense_matrix_bytes"}
            assert set(row["microseconds"]["graph"]) == CURVE
            assert set(row["microseconds"]["eager"]) == CURVE | {"dense_solve"}
    assert list(results["first use"]) == ["empty cache", "filled cache"]
    for calls in results["first use"].values():
        assert list(calls) == ["inverse", "forward", "forward and weight gradient"]
        assert all(len(times) == 2 and min(times) > 0 for times in calls.values())


@pytest.fixture
def fake_machine(monkeypatch):
    """Lets the command of the GPU run on the CPU: its clocks, its device and its flags."""
    workload = workloads.tiny(workloads.CUDA)
    for name in (*cuda_tables.MODES, "host"):
        monkeypatch.setattr(timing, name, timing.wall)
    sections = cuda_tables.sections
    monkeypatch.setattr(
        cuda_tables, "sections", lambda workload, seconds, device, name: sections(workload, seconds, "cpu", name)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    flags = [(torch.backends.cuda.matmul, "allow_tf32")]
    flags += [(torch.backends.cudnn, name) for name in ("allow_tf32", "benchmark")]
    before = [getattr(owner, name) for owner, name in flags]
    yield workload
    for (owner, name), value in zip(flags, before, strict=True):
        setattr(owner, name, value)


def test_tables_of_the_gpu_with_stand_ins(fake_machine, tmp_path, capsys):
    output = tmp_path / "results.json"
    layer.on_cuda(fake_machine, 0, output)
    assert_schema(json.loads(output.read_text()), fake_machine)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "targets: 0 of 0 met" in printed
    assert "nan" not in printed


def test_each_row_is_there_when_it_is_measured(fake_machine):
    speeds = floors.Speeds(1e12, 1e13, 1e-7)
    tables = cuda_tables._table("four groups", [Case(2, (4, 3, 3))] * 2, 0, "cpu", H100, speeds)
    assert [len(rows) for rows in tables] == [1, 2]


def test_a_matrix_too_large_is_not_measured_and_said_so(fake_machine, monkeypatch, capsys):
    monkeypatch.setattr(dense, "MOST_BYTES", 0)
    speeds = floors.Speeds(1e12, 1e13, 1e-7)
    (row,) = cuda_tables._curve("image side", [Case(2, (4, 3, 3))], 0, "cpu", speeds)
    assert set(row["microseconds"]["eager"]) == CURVE
    assert "not measured: its matrix has 0.0 GiB" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr("benchmarks.plots")
    monkeypatch.setitem(sys.modules, "benchmarks.plots", None)
    layer.draw(made_up_results(), tmp_path / "results.png")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.startswith("no plot, since ")


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    def sections():
        yield "first", [1]
        raise KeyboardInterrupt

    output = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        layer.run({"machine": {}}, sections(), output)
    assert json.loads(output.read_text()) == {"machine": {}, "first": [1]}


def test_summary_names_what_was_missed(capsys):
    times = made_up_times(inverse=11)
    case = Case(100, (12, 16, 16))
    row = {**case._asdict(), "microseconds": times, "targets": targets.judge_row(case, times, H100)}
    cuda_tables.print_summary({"machine": {}, "four groups": [row]})
    first, missed = capsys.readouterr().out.strip().splitlines()
    assert first == "targets: 4 of 5 met"
    assert missed.strip() == (
        "missed: four groups, batch 100, shape (12, 16, 16), corners ('TL', 'TR', 'BL', 'BR'), graph inverse: 11 us,"
        " <= 10 us: missed (aim 5 us)"
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [(H100, "cuda-h100-80gb-hbm3.json"), ("NVIDIA GeForce RTX 4090/PCIe", "cuda-geforce-rtx-4090-pcie.json")],
)
def test_results_are_named_after_the_gpu(name, file):
    assert layer.default_output(name) == BENCHMARKS / "results" / file


def made_up_results() -> dict:
    """Results of no measurement, for the plot."""
    curve = [
        {
            "batch": 1,
            "shape": [12, side, side],
            "corners": FOUR,
            "microseconds": {
                "eager": {"inverse": 20.0, "conv2d": 200.0} | ({"dense_solve": side**4} if side < 64 else {}),
                "graph": {"inverse": 5.0 + side, "conv2d": 40.0},
            },
        }
        for side in (8, 16, 64)
    ]
    machine = {"device": "made up, not measured", "torch": "0", "date": "0000-00-00"}
    return {"machine": machine, "image side": curve, "channels": curve, "batch": curve}


def test_plot_of_a_gpu():
    figure = plots.draw(made_up_results())
    assert [panel.get_xlabel() for panel in figure.axes] == ["image side", "channels", "batch"]
    lines = {line.get_label(): list(map(float, line.get_xdata())) for line in figure.axes[0].lines}
    assert lines == {
        "inverse, CUDA graph": [8, 16, 64],
        "inverse, eager": [8, 16, 64],
        "F.conv2d forward, CUDA graph": [8, 16, 64],
        "F.conv2d forward, eager": [8, 16, 64],
        "dense triangular solve, eager": [8, 16],
    }


def test_plot_of_a_cpu():
    results = made_up_results()
    del results["channels"]
    for row in results["image side"]:  # they are those of the batch as well
        row["microseconds"] = row["microseconds"]["graph"]
    figure = plots.draw(results)
    assert [panel.get_xlabel() for panel in figure.axes] == ["image side", "batch"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["inverse", "F.conv2d, forward"]


def test_plot_of_nothing():
    with pytest.raises(ValueError, match=r"at least one of the curves \('image side', 'channels', 'batch'\), got"):
        plots.draw({"machine": {}})


def test_plot_is_drawn_again_from_the_file_alone(tmp_path):
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(made_up_results()))
    done = run("plots", str(path))
    assert done.returncode == 0, done.stderr
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_command_on_the_cpu(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["layer.py", "--tiny", "--seconds", "0", "--output", str(output)])
    with torch.random.fork_rng():
        layer.main()
    results = json.loads(output.read_text())
    inverses = workloads.CPU.inverses
    assert list(results) == ["machine", "tiny", "four groups", "one group", "image side", "batch", *inverses]
    for name in inverses:
        for row in results[name]:
            assert set(row) == {*workloads.InverseCase._fields, "microseconds"}
            assert min(row["microseconds"][contestant] for contestant in ("conv", "inverse")) > 0
    for names, contestants_ in ((("four groups", "one group"), TABLE), (("image side", "batch"), CURVE)):
        for name in names:
            for row in results[name]:
                assert set(row) == {"batch", "shape", "corners", "microseconds"}
                assert set(row["microseconds"]) == contestants_
                assert min(row["microseconds"].values()) > 0
    assert f"written to {output}" in capsys.readouterr().out


def test_stored_results_of_the_cpu_have_the_tables_of_the_command():
    stored = json.loads((BENCHMARKS / "results" / "cpu-epyc-2-threads.json").read_text())
    for name, cases in (workloads.CPU.tables | workloads.CPU.curves).items():
        rows = [Case(row["batch"], tuple(row["shape"]), tuple(row["corners"])) for row in stored[name]]
        assert rows == cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layer.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        layer.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "error: --device cuda needs a GPU on which the CUDA kernels run, got: cuda (cuda): not available, " in (
        printed.err
    )
    assert printed.out == ""


# What a GPU is asked in a quarter of an hour


@pytest.mark.parametrize("kernel", smoke.CASES)
def test_small_problems_reach_every_family_of_kernels(kernel):
    for case in smoke.CASES[kernel]:
        images = torch.empty(case.batch, *case.shape, device="meta")
        weight = torch.empty(case.shape[0], case.shape[0] // len(case.corners), 3, 3, device="meta")
        problem = registry.Problem("solve", images, weight, stencil.parse(case.corners), kernel_size=(3, 3))
        plan = planning.plan_solution(cuda_emulator.planned(problem), cuda_emulator.H100)
        assert kernel in ({launch.kernel.name for launch in plan.launches} if plan else {"products"})


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_wrong_numbers_are_a_failure(error, monkeypatch, capsys):
    errors = {"forward": {"cpu": 1e-7, "device": 2e-7}, "inverse": {"cpu": 1e-7, "device": error}}
    monkeypatch.setattr(accuracy, "errors", lambda case, device: errors if case.shape[0] == 70 else {})
    monkeypatch.setattr(smoke, "CASES", {"products": smoke.CASES["products"][:1]})
    monkeypatch.setattr(sys, "argv", ["smoke.py"])
    with torch.random.fork_rng(), pytest.raises(SystemExit) as stopped:
        smoke.main()
    assert stopped.value.code == 1
    assert "inverse  WRONG\n\n0 of 1 problems are right" in capsys.readouterr().out


def test_latencies_are_slopes(monkeypatch):
    def launch(index, function, grid, block, shared, arguments, stream):
        """Takes a thousand cycles, and five of half a nanosecond for each instruction."""
        assert (function, grid, block, stream) == ("barrier", (1, 1, 1), 256, "stream")
        result, _, count, _ = struct.unpack("=QQif", arguments)
        cycles = 1000 + 5 * count
        ctypes.memmove(result, (ctypes.c_int64 * 3)(cycles, cycles // 2, 0), 24)

    double = types.SimpleNamespace(launch=launch, current_stream=lambda index: "stream")
    monkeypatch.setattr(calibration, "driver", double)
    assert calibration.latency("barrier", calibration.LATENCIES["BAR, 256 threads"], "cpu") == (5, 2)


def test_a_node_of_a_graph_is_a_slope(fake_cuda, monkeypatch):
    nothing = fake_cuda.contestant(3)
    monkeypatch.setattr(calibration, "launcher", lambda function, threads, arguments: nothing)
    assert calibration.node_microseconds("nothing", 0) == pytest.approx(3)


def test_addresses_go_round():
    ring = calibration.ring(1024, "cpu")
    address, seen = ring.data_ptr(), []
    for _ in range(8):
        seen.append(address - ring.data_ptr())
        address = ctypes.c_int64.from_address(address).value
    assert seen == list(range(0, 1024, calibration.STRIDE))
    assert address == ring.data_ptr()


def test_chains_stay_chains():
    pytest.importorskip("cuda.bindings.nvrtc")
    kernel = Kernel(str(calibration.SOURCE), "nothing", ())
    code = compiler.compile(kernel, (99, 0)).decode()  # text for a GPU that no compiler knows yet
    for instruction in ("fma.rn", "shfl.sync", "bar.sync", "ld.shared", "ld.global.ca", "ld.global.cg"):
        assert code.count(instruction) == 128


def on_a_gpu(*parts, folder, **environment):
    """Runs the script of a quarter of an hour on the CPU, with what stands for the sanitizer."""
    sanitizer = folder / "bin" / "compute-sanitizer"
    if not sanitizer.exists():
        sanitizer.parent.mkdir()
        sanitizer.write_text("#!/bin/sh\necho '========= Invalid __global__ read of size 4 bytes'\nexit 1\n")
        sanitizer.chmod(0o755)
    path = os.pathsep.join([str(sanitizer.parent), os.environ["PATH"]])
    environment = (
        os.environ | {"OUT": str(folder / "out"), "DEVICE": "cpu", "PYTHON": sys.executable, "PATH": path} | environment
    )
    command = ["bash", str(BENCHMARKS / "on_a_gpu.sh"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_parts_that_fail_stop_no_other(tmp_path):
    done = on_a_gpu("memcheck", "smoke", folder=tmp_path, SECONDS_A_ROW="0")
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    assert re.match(r"memcheck: exit 1 after \d+ s: ========= Invalid __global__ read", first)
    assert re.match(r"smoke: exit 0 after \d+ s: 12 of 12 problems are right", second)
    summary = "\n".join(rest)
    assert "summary\n\nmemcheck: exit 1" in summary
    assert "memcheck: 1 failures\n  ========= Invalid __global__ read of size 4 bytes" in summary
    assert (tmp_path / "out" / "summary.txt").read_text() == summary + "\n"
    assert len(json.loads((tmp_path / "out" / "smoke.json").read_text())["cases"]) == 12


def test_a_part_ends_at_its_limit(tmp_path):
    done = on_a_gpu("targets", folder=tmp_path, LIMIT="0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("targets: exit 124 after ")


def test_an_unknown_part_is_an_error(tmp_path):
    done = on_a_gpu("nonsense", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "nonsense is no part\n")


@pytest.mark.gpu
def test_command_on_the_gpu(tmp_path):
    output = tmp_path / "results.json"
    done = run("layer", "--device", "cuda", "--tiny", "--seconds", "0.01", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert_schema(json.loads(output.read_text()), workloads.tiny(workloads.CUDA))
    assert output.with_suffix(".png").exists()
