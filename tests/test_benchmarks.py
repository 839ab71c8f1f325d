"""The benchmarks run in their smallest form, and their numbers mean what they claim.

No test measures time. Without a GPU, its tables run on the CPU.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from types import SimpleNamespace

import cuda_emulator
import pytest
import torch
from torch import nn

pytest.importorskip("nflows")
pytest.importorskip("normflows")

import nflows_kconv.nflows
from benchmarks import (
    accuracy,
    calibration,
    contestants,
    cuda_tables,
    dense,
    evidence,
    evidence_report,
    evidence_training,
    first_use,
    floors,
    layer,
    one_by_one,
    plain_backend,
    plots,
    published,
    sampling,
    smoke,
    summary,
    targets,
    timing,
    workloads,
)
from benchmarks.evidence_training import Configuration
from benchmarks.workloads import CPU, CUDA, FOUR, ONE, Case
from nflows_kconv import InvertibleConv2d, functional, stencil
from nflows_kconv.backends import registry, selected_backends
from nflows_kconv.backends.cuda import compiler, planning
from nflows_kconv.backends.cuda.plan import Kernel

H100 = "NVIDIA H100 80GB HBM3"
# cuda.bindings asks the driver for functions of later versions, which a sanitizer reports as errors by default.
SANITIZER = """#!/bin/sh
case "$*" in *"--report-api-errors no"*) ;; *) echo '========= Program hit CUDA_ERROR_NOT_FOUND' ;; esac
echo '========= Invalid __global__ read of size 4 bytes'
exit 1
"""


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Runs the command in this process and restores its settings for a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with torch.random.fork_rng():
        importlib.import_module(f"benchmarks.{name}").main()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def backends_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {**registry._registered})


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the GPU and its clock by the CPU's."""
    for name in (*cuda_tables.MODES, "host"):
        monkeypatch.setattr(timing, name, timing.wall)
    sections = cuda_tables.sections
    monkeypatch.setattr(cuda_tables, "sections", lambda sizes, seconds, _, name: sections(sizes, seconds, "cpu", name))
    monkeypatch.setattr(nflows_kconv, "available_backends", lambda: {"cuda": SimpleNamespace(selected=True)})
    monkeypatch.setattr(layer, "gpu_machine", layer.machine)
    # Nothing is compiled, so one process stands for both.
    monkeypatch.setattr(first_use, "_in_new_process", cache(first_use._in_new_process))
    for name in ("Stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


@pytest.mark.parametrize(
    ("name", "arguments", "keys"),
    [
        ("layer", "--tiny --seconds 0", {"machine", "tiny", *CPU.tables, *CPU.curves, *CPU.inverses}),
        (
            "layer",
            "--tiny --seconds 0 --device cuda",
            {"machine", "tiny", "speeds", *CUDA.tables, *CUDA.curves, "host", "accuracy", "first use"},
        ),
        ("reversible", "--tiny --seconds 0", {"machine", "tiny", "size", "rows"}),
        ("sampling", "--tiny --seconds 0", {"machine", "tiny", "model", "sampling", "training", "variants"}),
        ("one_by_one", "--tiny --seconds 0", {"machine", "tiny", "1x1"}),
        ("published", "--tiny --seconds 0 --models MNIST --images 1", {"machine", "tiny", "models"}),
        ("calibration", "", set()),  # only compiles its kernels without a GPU
    ],
)
def test_commands_run(name: str, arguments: str, keys: set[str], monkeypatch, tmp_path, request):
    if name == "calibration":
        pytest.importorskip("cuda.bindings.nvrtc")
    if "cuda" in arguments and not torch.cuda.is_available():
        request.getfixturevalue("stand_ins")
    output = tmp_path / "results.json"
    run(monkeypatch, name, *arguments.split(), "--output", str(output))
    assert set(json.loads(output.read_text()) if output.exists() else {}) == keys
    if name == "layer":
        run(monkeypatch, "plots", str(output))
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_host_times_come_before_the_long_tables(stand_ins):
    sections = cuda_tables.sections(workloads.tiny(CUDA), 0, "cuda", H100)
    assert [name for name, _ in islice(sections, 2)] == ["speeds", "host"]


def test_the_evidence_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(evidence_training, "ROUNDS", 1)
    arguments = f"--seconds 0.05 --steps 1 --widths 4 --output {tmp_path}".split()
    run(monkeypatch, "evidence", *arguments, "--seeds", "0")
    first = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {one["method"] for one in first} == set(evidence_training.METHODS)
    for one in first:  # as many steps as fit in the time
        assert 0 < 0.05 - one["step_seconds"] * (one["training_steps"] - 1) <= one["step_seconds"]
    assert (tmp_path / "report.md").exists()
    run(monkeypatch, "evidence", *arguments, "--seeds", "0", "1")
    again = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert again[: len(first)] == first
    assert [one["step_seconds"] for one in again[len(first) :]] == [
        one["step_seconds"] for one in first[: len(again) - len(first)]
    ]
    with pytest.raises(SystemExit, match="--output FOLDER writes elsewhere"):
        run(monkeypatch, "evidence", "--seconds", "0.06", "--output", str(tmp_path))


def test_parts_on_a_gpu_that_fail_stop_no_other(tmp_path):
    """Runs them on the CPU with a fake sanitizer."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    own = {"OUT": str(tmp_path / "out"), "DEVICE": "cpu", "PYTHON": sys.executable, "PATH": path}
    command = ["bash", str(layer.RESULTS.parent / "on_a_gpu.sh")]
    for parts in (["memcheck", "memcheck"], ["smoke"]):
        done = subprocess.run([*command, *parts], env=os.environ | own, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    *_, first, second = (tmp_path / "out" / "parts.txt").read_text().splitlines()
    assert re.match(r"memcheck: exit 1 after \d+ s: ========= Invalid __global__ read", first)
    assert re.match(r"smoke: exit 0 after \d+ s: (\d+) of \1 problems are right", second)
    # Also of a part that ran before, and only of its last run
    assert f"summary\n\n{first}\n{second}\n\nmemcheck: 1 failures\n  ========= Invalid __global__ read" in done.stdout


def test_the_summary_counts_each_failure_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "parts.txt").write_text("gpu_tests: exit 1 after 9 s: 1 failed\n")
    name = "tests/test_layer.py::test_weight[a b]"
    (tmp_path / "gpu_tests.log").write_text(f"[gw1] [ 50%] FAILED {name} \nFAILED {name} - assert 0\n")
    clean = ("========= COMPUTE-SANITIZER", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    (tmp_path / "racecheck.log").write_text("\n".join(clean))
    run(monkeypatch, "summary", str(tmp_path))
    assert capsys.readouterr().out.endswith(f"\n\ngpu_tests: 1 failures\n  FAILED {name} - assert 0\n")


# Clocks


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces torch.cuda in the clocks; `gpu.call(n)` makes a call that takes n microseconds."""
    gpu = SimpleNamespace(now=0.0, synchronize=lambda: None, current_stream=lambda: None)

    def call(microseconds):
        return lambda: setattr(gpu, "now", gpu.now + microseconds)

    def event(enable_timing):
        event = SimpleNamespace(synchronize=lambda: None, record=lambda: setattr(event, "time", gpu.now))
        event.elapsed_time = lambda end: 1e-3 * (end.time - event.time)
        return event

    @contextlib.contextmanager
    def graph(captured, stream):
        before = gpu.now
        yield
        captured.replay, gpu.now = call(gpu.now - before), before

    gpu.call, gpu.Event, gpu.CUDAGraph, gpu.graph = call, event, SimpleNamespace, graph
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=gpu))
    return gpu


@pytest.mark.parametrize("clock", [timing.eager, timing.graph, timing.cold])
def test_clocks_of_the_gpu_give_the_time_of_one_call(clock, gpu, monkeypatch):
    monkeypatch.setattr(timing, "_read_of_the_cache", lambda: gpu.call(40))  # not counted
    assert clock({"short": gpu.call(1), "long": gpu.call(7)}, 0) == pytest.approx({"short": 1, "long": 7})


@pytest.mark.parametrize("clock", [timing.graph, timing.cold])
def test_what_cannot_be_captured_has_no_time_and_stops_no_other(clock, gpu, monkeypatch, capsys):
    monkeypatch.setattr(timing, "_read_of_the_cache", lambda: gpu.call(40))

    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    times = clock({"first": fail, "long": gpu.call(7)}, 0)
    assert times == pytest.approx({"first": math.nan, "long": 7}, nan_ok=True)
    assert "first cannot be captured: operation not permitted" in capsys.readouterr().out


def test_contestants_take_turns_and_the_median_counts():
    order, values = [], iter([1, 50, 2, 60, 900, 40, 3, 70, 4, 80])

    def sample(name):
        order.append(name)
        return next(values)

    times = timing.take_turns({"a": lambda: sample("a"), "b": lambda: sample("b")}, 0)
    assert order == ["a", "b"] * timing.LEAST_SAMPLES
    assert times == {"a": 3, "b": 60}


def test_calls_beyond_the_limit_are_stopped_and_have_no_time():
    def endless():
        while True:
            pass

    handler = signal.getsignal(signal.SIGALRM)
    assert list(timing.wall_within(0.3, {"endless": endless, "quick": lambda: None}, 0)) == ["quick"]
    assert timing.wall_within(0.01, {"endless": endless}, 0) == {}
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# What is compared, and with what


@pytest.mark.parametrize("corners", [FOUR, ONE, ("BR", "TR")])
def test_the_baseline_is_the_layer(corners):
    x, weight = torch.randn(2, 8, 5, 4), InvertibleConv2d(8, corners=corners).weight.detach()
    expected = functional.conv2d(x, weight, corners=corners)
    torch.testing.assert_close(contestants.pad_conv_cat(x, weight, corners), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float16, 0.02)])
@pytest.mark.parametrize("options", [{}, {"diagonal": "learned", "bias": True}], ids=str)
@pytest.mark.parametrize("corners", [FOUR, ONE, ("BR", "TR")])
def test_the_plain_backend_is_the_layer(corners, options, dtype, tolerance):
    module = InvertibleConv2d(8, (2, 3), corners=corners, dtype=dtype, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # masked entries, too
    x = torch.randn(2, 8, 5, 4, dtype=dtype)

    def results():
        for function in (module, module.inverse):
            leaves = x.clone().requires_grad_(), *module.parameters()
            output, log_det = function(leaves[0])
            yield output, *torch.autograd.grad(output.square().sum() + log_det.sum(), leaves)
        yield functional.conv2d(x, module.raw_weight, corners=corners)

    before, expected = selected_backends(), list(results())
    plain_backend.register_last()
    assert selected_backends() == before
    assert registry.registered()[-1].name == plain_backend.NAME
    with nflows_kconv.use_backend(plain_backend.NAME):
        torch.testing.assert_close(list(results()), expected, rtol=tolerance, atol=tolerance)


def test_forward_is_from_data_to_latent_in_every_library():
    x = torch.randn(2, 4, 3, 5)
    for build in (one_by_one.YARDSTICKS | one_by_one.OURS).values():
        ways = one_by_one.directions(build(4), len(x))
        torch.testing.assert_close(ways["inverse"](ways["forward"](x)[0])[0], x, rtol=1e-4, atol=1e-4)
    module = one_by_one.YARDSTICKS["normflows"](4)
    expected = torch.nn.functional.conv2d(x, module._assemble_W()[..., None, None])
    torch.testing.assert_close(one_by_one.directions(module, len(x))["forward"](x)[0], expected)


@pytest.mark.parametrize("corners", [FOUR, ONE, ("BR",), ("TR", "BL")])
def test_the_dense_solve_is_the_inverse(corners):
    case = Case(3, (4, 5, 6), corners)
    module = InvertibleConv2d(4, corners=corners).double()
    module.raw_weight.data.mul_(10)
    weight, y = module.weight.detach(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
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
    ("value", "aim", "verdict"),
    [(5, 5, "aim met"), (5.1, 5, "met"), (10, None, "met"), (10.1, 5, "missed"), (float("nan"), None, "missed")],
)
def test_verdicts(value, aim, verdict):
    assert targets.Target(10, "us", aim).judge("inverse", "graph", value)["verdict"] == verdict


def test_rows_are_judged_and_the_summary_names_what_was_missed(capsys):
    case = Case(100, (12, 16, 16))
    names = {"conv2d": 100.0, "conv2d_backward": 100.0, "forward": 10.0, "forward_backward": 10.0, "inverse": 11.0}
    records = targets.judge_row(case, {"eager": names, "graph": names}, H100)
    summary.print_targets({"machine": {}, "four groups": [{**case._asdict(), "targets": records}]})
    first, missed = capsys.readouterr().out.strip().splitlines()
    assert first == "targets: 4 of 5 met"
    assert missed.endswith(f"corners {FOUR}, graph inverse: 11 us, <= 10 us: missed (aim 5 us)")
    others = targets.judge_row(case, {"eager": names, "graph": names}, "NVIDIA A100")
    assert {record["unit"] for record in others} == {"x"}  # microseconds are for an H100 or H200
    assert targets.judge_row(case, {"eager": names, "graph": names}, "NVIDIA H200") == records


def test_every_row_of_the_gpu_has_a_target_and_tiny_ones_have_none():
    for workload, wanted in ((CUDA, True), (workloads.tiny(CUDA), False)):
        for cases in workload.tables.values():
            assert all(bool(targets.of_case(case, H100)) == wanted for case in cases)


def test_errors_are_compared_with_those_of_the_cpu():
    torch.manual_seed(0)
    for error in accuracy.errors(Case(2, (4, 6, 5)), "cpu").values():
        assert 0 < error["cpu"] == error["device"] < 1e-5
    assert accuracy.ratio({"cpu": 1e-6, "device": 3e-6}) == pytest.approx(3)
    assert accuracy.ratio({"cpu": 0, "device": 2**-24}) == pytest.approx(1)


@pytest.mark.parametrize("kernel", smoke.CASES)
def test_small_problems_reach_every_family_of_kernels(kernel):
    for case in smoke.CASES[kernel]:
        images = torch.empty(case.batch, *case.shape, device="meta")
        weight = torch.empty(case.shape[0], case.shape[0] // len(case.corners), 3, 3, device="meta")
        problem = registry.OperatorCall("solve", images, weight, stencil.parse(case.corners), kernel_size=(3, 3))
        plan = planning.plan_solution(cuda_emulator.planned(problem), cuda_emulator.H100)
        assert kernel in ({launch.kernel.name for launch in plan.launches} if plan else {"products"})


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_wrong_numbers_are_a_failure(error, monkeypatch, capsys):
    errors = {"forward": {"cpu": 1e-7, "device": 2e-7}, "inverse": {"cpu": 1e-7, "device": error}}
    monkeypatch.setattr(accuracy, "errors", lambda case, device: errors)
    monkeypatch.setattr(smoke, "CASES", {"products": smoke.CASES["products"][:1]})
    with pytest.raises(SystemExit, match="True"):
        run(monkeypatch, "smoke")
    assert "inverse  WRONG\n\n0 of 1 problems are right" in capsys.readouterr().out


def test_curves_have_a_line_for_what_was_measured():
    rows = [
        {
            "shape": [12, side, side],
            "microseconds": {"eager": {"inverse": 20.0} | ({"dense_solve": 1.0} if side < 64 else {})},
            "floors": {"inverse": {"bytes": 1.0, "operations": 5.0}},
        }
        for side in (8, 64)
    ]
    (panel,) = plots.draw({"image side": rows}).axes
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines} == {
        "inverse, eager": ([8, 64], [20, 20]),
        "dense triangular solve, eager": ([8], [1]),
        "floor of the inverse": ([8, 64], [5, 5]),
    }


# Constants of a GPU


def test_latencies_and_nodes_of_a_graph_are_slopes(gpu, monkeypatch):
    def launch(index, function, grid, block, shared, arguments, stream):
        """Takes a thousand cycles, plus five of half a nanosecond per instruction."""
        result, _, count, _ = struct.unpack("=QQif", arguments)
        cycles = 1000 + 5 * count
        ctypes.memmove(result, (ctypes.c_int64 * 3)(cycles, cycles // 2, 0), 24)

    monkeypatch.setattr(calibration, "driver", SimpleNamespace(launch=launch, current_stream=lambda index: "stream"))
    assert calibration.latency("barrier", calibration.LATENCIES["BAR, 256 threads"], "cpu") == (5, 2)
    monkeypatch.setattr(calibration, "launcher", lambda function, threads, arguments: gpu.call(3))
    assert calibration.node_microseconds("nothing", 0) == pytest.approx(3)


def test_chains_stay_chains_of_addresses_that_go_round():
    pytest.importorskip("cuda.bindings.nvrtc")
    # Text, not code for a GPU.
    code = compiler.compile(Kernel(str(calibration.SOURCE), "nothing", ()), (99, 0)).decode()
    for instruction in ("fma.rn", "shfl.sync", "bar.sync", "ld.shared", "ld.global.ca", "ld.global.cg"):
        assert code.count(instruction) == 128
    ring = calibration.ring(1024, "cpu")
    address, seen = ring.data_ptr(), []
    for _ in range(8):
        seen.append(address - ring.data_ptr())
        address = ctypes.c_int64.from_address(address).value
    assert seen == list(range(0, 1024, calibration.STRIDE))
    assert address == ring.data_ptr()


# Whole models


def test_targets_of_the_big_model():
    times = {"FInC, flow": 66.0, "Glow, flow": 60.0, "FInC, sampler": 26.0, "Glow, sampler": 25.0}
    records = sampling.judge_sampling(times, 100, sampling.SIZES["cuda"], H100)
    assert [record["verdict"] for record in records] == ["missed", "met", "met"]
    assert [record["value"] for record in records] == pytest.approx([66 / 60, 26 / 25, 26 / 60])
    assert not sampling.judge_sampling(times, 16, sampling.SIZES["cpu"], "a CPU")
    assert len(sampling.judge_sampling(times, 1, sampling.SIZES["cuda"], "NVIDIA H200")) == 1


@pytest.mark.parametrize("name", sampling.VARIANTS)
def test_variants_compute_the_same_to_their_rounding(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    batch = sampling.images(sampling.TINY, "cpu")
    values = []
    for variant in (sampling.VARIANTS["as it is"], sampling.VARIANTS[name]):
        flow = sampling.prepared("FInC", variant, sampling.TINY, "cpu").eval()
        torch.manual_seed(0)  # dequantisation draws noise
        with torch.no_grad(), variant.context("cpu"):
            values.append(flow.log_prob(batch))
    torch.testing.assert_close(values[1], values[0], rtol=0.05 if "bfloat16" in name else 1e-5, atol=0)


def test_lost_pixel_values_are_counted():
    class Rounding(nn.Module):
        def inverse_and_log_det(self, images):
            return images, 0

        def forward_and_log_det(self, latents):
            return latents.index_fill(3, torch.tensor([0, 1]), -1), 0

    batch = sampling.images(sampling.TINY, "cpu")
    assert sampling.values_lost(Rounding(), batch) == 2 / 8
    for model in sampling.COMPARED:
        assert sampling.values_lost(sampling.build("normflows", model, sampling.TINY, "cpu").eval(), batch) == 0


@pytest.mark.parametrize(
    ("model", "millions"), [("MNIST", 10), ("CIFAR-10", 44), ("ImageNet32", 113), ("ImageNet64", 44)]
)
def test_sizes_of_the_papers_models(model, millions):
    size = published.MODELS[model].size
    with torch.device("meta"):
        flow = nflows_kconv.nflows.finc_flow(*size[:3], hidden_channels=size.hidden_channels, **sampling.UNIT)
    assert round(sum(parameter.numel() for parameter in flow.parameters()) / 1e6) == millions


def test_what_of_the_papers_models_is_skipped_says_why(monkeypatch):
    monkeypatch.setattr(timing, "wall_within", lambda *_: {"FInC unit": 1e6})
    rows = published.measure(sampling.TINY, [3], ["sampling"], "cpu", 0, 5)
    found = {row["convolution"]: row for row in rows}
    assert found["FInC unit"]["seconds"] == {"sampling": 1.0}
    assert found["MaCow"]["skipped"] == {"sampling": "more than 5 s"}
    assert "got 3 x 3" in found["periodic"]["skipped"]["sampling"]
    assert {(None, name) for name in found} <= plots.LINES.keys()


# The evidence


def test_glow_of_equal_size_is_just_as_large_as_the_other():
    pair = Configuration("pair", 2, 2, 16, 3, 0)
    glow = evidence.as_large_as(pair, (1, 8, 8))
    sizes = [
        sum(parameter.numel() for parameter in configuration.build((1, 8, 8)).parameters())
        for configuration in (glow, glow._replace(width=glow.width - evidence.WIDTHS_APART), pair)
    ]
    assert glow.method == "Glow"
    assert sizes[1] < sizes[2] <= sizes[0]


def test_methods_differ_in_the_layer_alone():
    def names(method: str) -> set[str]:
        flow = Configuration(method, 2, 1, 8, 0 if method == "Glow" else 3, 0).build((1, 8, 8))
        return {type(module).__name__ for module in flow.modules()}

    glow = names("Glow")
    assert names("pair") - glow == names("FInC unit") - glow == {"InvertibleConv2d"}
    assert names("pair, inverse") - glow == {"InvertibleConv2d", "Inverse"}


def fake(method: str, milliseconds: float, bits: float, seed: int = 0, steps: int = 4, parameters: int = 1000) -> dict:
    """Makes up a run."""
    return {
        **Configuration(method, 2, steps, 64, 0 if method == "Glow" else 3, seed)._asdict(),
        "parameters": parameters,
        "training_steps": 10,
        "step_seconds": 12.8,
        "bits_per_dim": bits,
        "standard_error": 0.01,
        "round_trip_error": 1e-6,
        "sampling_seconds": milliseconds / 1000,
    }


RUNS = [
    fake("Glow", 10, 3.0),
    fake("Glow", 12, 3.1, steps=6),  # slower and worse, so not on the front
    fake("Glow", 20, 2.8, steps=8, parameters=1100),
    fake("pair", 15, 2.85, parameters=1050),
    fake("pair", 15, 2.99, seed=1, parameters=1050),
    fake("pair", 40, 2.7, steps=8),
]


def test_equal_sampling_time_is_interpolated_on_the_front_of_glow():
    assert evidence_report._sampling_table(RUNS).splitlines()[2:] == [
        "| pair | 2, 4, 64, 3 | 15.0 | 2.920 | 2.900 | +0.020 |",
        "| pair | 2, 8, 64, 3 | 40.0 | 2.700 | 2.800 (the slowest size) | -0.100 |",
    ]


def test_seeds_make_mean_and_spread_and_equal_parameters_the_nearest_larger_glow():
    sizes = evidence_report._by_size(RUNS)
    row = evidence_report._training_table(sizes).splitlines()[5]
    assert row.startswith("| pair | 2, 4, 64, 3 | 1,050 | 2 | 2.920 ± 0.099 | 10 | 5 | 15.0 | 1e-06 |")
    assert [size[:3] for size in evidence_report._of_equal_parameters(sizes)] == [("Glow", 2, 8), ("pair", 2, 4)]
