"""The benchmark of the papers' models: sizes, the time limit, that all tables run, and how the site shows them."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("normflows")

import nflows_kconv.nflows
from benchmarks import plots, published, timing

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("model", "millions"), [("MNIST", 10), ("CIFAR-10", 44), ("ImageNet32", 113), ("ImageNet64", 44)]
)
def test_sizes_of_the_models(model, millions):
    size = published.MODELS[model].size
    with torch.device("meta"):
        flow = nflows_kconv.nflows.finc_flow(*size[:3], hidden_channels=size.hidden_channels)
    assert round(sum(parameter.numel() for parameter in flow.parameters()) / 1e6) == millions


def test_calls_beyond_the_limit_are_stopped_and_have_no_time():
    def endless():
        while True:
            pass

    handler, calls = signal.getsignal(signal.SIGALRM), []
    times = timing.wall_within(1, {"endless": endless, "quick": lambda: calls.append(None)}, 0)
    assert list(times) == ["quick"]
    assert len(calls) == 2
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert timing.wall_within(0.01, {"endless": endless}, 0) == {}


@pytest.fixture
def no_clock(monkeypatch):
    """Every contestant but MaCow is called once and takes a second."""

    def wall_within(limit, contestants, seconds):
        for call in contestants.values():
            call()
        return {name: 1e6 for name in contestants if name != "MaCow"}

    monkeypatch.setattr(timing, "wall_within", wall_within)


def test_all_tables_run_and_are_written(no_clock, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"
    arguments = [
        "--tiny",
        "--models",
        "MNIST",
        "CIFAR-10",
        "--images",
        "1",
        "3",
        "--limit",
        "5",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["published.py", *arguments])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with torch.random.fork_rng():
        published.main()
    results = json.loads(output.read_text())
    rows = {(row["model"], row["convolution"], row.get("images")): row for row in results["models"]}
    unit, of_sides, periodic = (rows["MNIST", name, 3] for name in ("FInC unit", "MaCow", "periodic"))
    assert unit["seconds"] == {"forward": 1.0, "sampling": 1.0}
    assert unit["published"] == ["0.14 s (A)", "0.09 s (A, B)", "1.05"]
    assert of_sides["seconds"] == {}
    assert of_sides["skipped"] == dict.fromkeys(("forward", "sampling"), "more than 5 s")
    assert list(periodic["skipped"]) == ["forward", "sampling"]
    assert "got 3 x 3" in periodic["skipped"]["forward"]
    unmeasured = rows["CIFAR-10", "CInC Flow", None]
    assert unmeasured["seconds"] == unmeasured["skipped"] == {}
    assert [row["shape"][1] for row in results["image side"]] == [16, 32, 64, 128]
    assert [row["batch"] for row in results["batch"]] == [1, 4, 16, 64]
    assert results["batch"][0]["skipped"]["MaCow"] == "more than 5 s"
    printed = capsys.readouterr().out
    assert "skipped: more than 5 s\n" in printed
    assert "other hardware" in printed


def test_each_convolution_has_a_line_in_the_plot():
    assert {(None, name) for name in published.CONVOLUTIONS} <= plots.LINES.keys()
    assert set(published.PUBLISHED) <= set(published.MODELS)


def test_the_site_shows_times_and_what_was_skipped(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    results = importlib.import_module("results")
    measured = {"convolution": "MaCow", "images": 100, "parameters": 44268876, "model": "CIFAR-10"}
    measured |= {"seconds": {"forward": 0.1234}, "skipped": {"sampling": "more than 5 s"}}
    published = ("1.49 s (A)", "3.23 s (A)", "3.16")
    unmeasured = {"convolution": "MintNet", "model": "CIFAR-10", "seconds": {}, "skipped": {}}
    rows = [{**row, "published": published} for row in (measured, unmeasured)]
    shown = "\n".join(results._measurements("models", rows))
    assert "### CIFAR-10" in shown
    assert "| MaCow, 44.3 M | 100 | 0.123 s | skipped | 1.49 s (A); 3.23 s (A) | 3.16 |" in shown
    assert "| MintNet |  |  |  | 1.49 s (A); 3.23 s (A) | 3.16 |" in shown
    assert "Skipped: more than 5 s." in shown
