"""The evidence benchmark: that it runs and goes on, compares flows of equal size, and calculates its tables right."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

pytest.importorskip("nflows")

from benchmarks import evidence, evidence_report, evidence_training
from benchmarks.evidence_training import Configuration

SHAPE = (1, 8, 8)
ARGUMENTS = "--seconds 0.05 --steps 1 2 --widths 4 5".split()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures each time once, as none is looked at closely."""
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(evidence_training, "ROUNDS", 1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
    with torch.random.fork_rng():
        evidence.main()


def test_runs_and_goes_on_where_it_was(in_this_process, monkeypatch, tmp_path, capsys):
    run(monkeypatch, *ARGUMENTS, "--output", str(tmp_path), "--seeds", "0")
    results = json.loads((tmp_path / "runs.json").read_text())
    first = results["runs"]
    assert len(first) == 6 + 4 + 2 * 3
    assert {one["method"] for one in first} == set(evidence_training.METHODS)
    for one in first:
        assert 0 < one["bits_per_dim"] < 20
        assert one["curve"][-1]["step"] == one["training_steps"] > 0
        assert one["round_trip_error"] < 1e-3
        assert 0 < 0.05 - one["step_seconds"] * (one["training_steps"] - 1) <= one["step_seconds"]
        assert one["sampling_seconds"] > 0
    assert Image.open(tmp_path / "samples-pair-inverse.png").size == (6 * 102, 6 * 102)
    assert "log2 15" in (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} > {"pareto.png", "learning_curves.png"}

    run(monkeypatch, *ARGUMENTS, "--output", str(tmp_path), "--seeds", "0", "1")
    again = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert again[: len(first)] == first
    # A size is timed once.
    assert [one["step_seconds"] for one in again[len(first) :]] == [one["step_seconds"] for one in first[:6]]
    assert [one["seed"] for one in again[len(first) :]] == [1] * 6

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the same command goes on"):
        patch.setattr(evidence, "_add", interrupt)
        run(patch, *ARGUMENTS, "--output", str(tmp_path), "--seeds", "2")
    with pytest.raises(SystemExit, match="--output FOLDER writes elsewhere"):
        run(monkeypatch, "--seconds", "0.06", "--output", str(tmp_path))
    assert json.loads((tmp_path / "runs.json").read_text())["runs"] == again


def test_missing_data_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", "fashion-mnist", "--data-root", str(tmp_path), "--output", str(tmp_path / "new"))
    assert "fashion-mnist needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_glow_of_equal_size_is_just_as_large_as_the_other():
    pair = Configuration("pair", 2, 2, 8, 3, 0)
    glow = evidence.as_large_as(pair, SHAPE)
    sizes = [
        sum(parameter.numel() for parameter in configuration.build(SHAPE).parameters())
        for configuration in (glow, glow._replace(width=glow.width - 1), pair)
    ]
    assert glow.method == "Glow"
    assert sizes[1] < sizes[2] <= sizes[0]


def test_methods_differ_in_the_layer_alone():
    def names(method: str) -> set[str]:
        flow = Configuration(method, 2, 1, 8, 0 if method == "Glow" else 3, 0).build(SHAPE)
        return {type(module).__name__ for module in flow.modules()}

    glow = names("Glow")
    assert names("pair") - glow == names("FInC unit") - glow == {"InvertibleConv2d"}
    assert names("pair, inverse") - glow == {"InvertibleConv2d", "Inverse"}


def test_learning_rate_rises_and_falls_with_the_time():
    values = [evidence_training._schedule(fraction) for fraction in (0.001, 0.01, 0.02, 0.5, 0.7, 0.85, 1)]
    assert values == pytest.approx([0.05, 0.5, 1, 1, 1, 0.5, 0])


def fake(method: str, milliseconds: float, bits: float, seed: int = 0, **others) -> dict:
    return {
        "method": method,
        "levels": 2,
        "steps": 4,
        "width": 64,
        "kernel": 0 if method == "Glow" else 3,
        "seed": seed,
        "parameters": 1000,
        "training_steps": 10,
        "step_seconds": 12.8,
        "bits_per_dim": bits,
        "standard_error": 0.01,
        "round_trip_error": 1e-6,
        "sampling_seconds": milliseconds / 1000,
        "curve": [{"step": 10, "bits_per_dim": bits}],
        **others,
    }


RUNS = [
    fake("Glow", 10, 3.0),
    fake("Glow", 12, 3.1, steps=6),  # slower and worse: not on the front
    fake("Glow", 20, 2.8, steps=8, parameters=1100),
    fake("pair", 15, 2.85, parameters=1050),
    fake("pair", 15, 2.99, seed=1, parameters=1050),
    fake("pair", 40, 2.7, steps=8),
]


def test_equal_sampling_time_is_interpolated_on_the_front_of_glow():
    table = evidence_report._sampling_table(RUNS).splitlines()
    assert table[2:] == [
        "| pair | 2, 4, 64, 3 | 15.0 | 2.920 | 2.900 | +0.020 |",
        "| pair | 2, 8, 64, 3 | 40.0 | 2.700 | 2.800 (the slowest size) | -0.100 |",
    ]


def test_seeds_make_mean_and_spread():
    row = evidence_report._training_table(evidence_report._by_size(RUNS)).splitlines()[5]
    assert row.startswith("| pair | 2, 4, 64, 3 | 1,050 | 2 | 2.920 ± 0.099 | 10 | 5 | 15.0 | 1e-06 |")


def test_equal_parameters_takes_the_nearest_larger_glow():
    methods = [size[:3] for size in evidence_report._of_equal_parameters(evidence_report._by_size(RUNS))]
    assert methods == [("Glow", 2, 8), ("pair", 2, 4)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_report_of_any_device(device):
    results = {
        "machine": {"device": "a machine", "torch": "2", "date": "today"},
        "settings": {"data": "digits", "device": device, "seconds": 1},
        "note": "",
        "runs": RUNS,
    }
    report = evidence_report.report(results)
    assert ("one thread" in report) == (device == "cpu")
    assert report.count("\n| pair |") == 2 + 1 + 2
