"""The benchmark of whole models: that its tables run, what they judge, and that the variants do what they say."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("nflows")
pytest.importorskip("normflows")

from benchmarks import layer, sampling, timing
from benchmarks.sampling import COMPARED, MODELS, SIZES, TINY, VARIANTS

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls every contestant once, which takes a millisecond."""

    def wall(contestants, seconds):
        for call in contestants.values():
            call()
        return dict.fromkeys(contestants, 1000.0)

    monkeypatch.setattr(timing, "wall", wall)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_all_tables_run_and_are_written(no_clock, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "results.json"
    layer.run({"machine": {}}, sampling.sections(TINY, "cpu", 0, "a CPU"), output)
    results = json.loads(output.read_text())
    assert [(row["library"], row["images"]) for row in results["sampling"]] == [
        (library, number) for library in ("nflows", "normflows") for number in (2, 1)
    ]
    assert results["sampling"][0]["microseconds"].keys() == {
        f"{model}, {mode}" for model in MODELS for mode in ("flow", "sampler")
    }
    assert [row["variant"] for row in results["variants"]] == [name for name in VARIANTS for _ in range(2)]
    assert [row["variant"] for row in results["training"]] == list(VARIANTS)
    assert results["model"]["parameters"]["Glow"] < results["model"]["parameters"]["FInC"]
    assert "targets" not in capsys.readouterr().out


def test_targets_of_the_big_model():
    times = {"FInC, flow": 66.0, "Glow, flow": 60.0, "FInC, sampler": 26.0, "Glow, sampler": 25.0}
    records = sampling.judge_sampling(times, 100, SIZES["cuda"], H100)
    assert [(record["mode"], record["verdict"]) for record in records] == [
        ("flow", "missed"),
        ("sampler", "met"),
        ("sampler", "met"),
    ]
    assert records[2]["value"] == pytest.approx(26 / 60)
    (single,) = sampling.judge_sampling({"FInC, sampler": 9100.0}, 1, SIZES["cuda"], H100)
    assert single["verdict"] == "missed"
    assert not sampling.judge_sampling({"FInC, sampler": 9100.0}, 1, SIZES["cuda"], "another GPU")
    assert not sampling.judge_sampling(times, 16, SIZES["cpu"], "a CPU")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compute_the_same_to_their_rounding(name: str, no_clock):
    variant = VARIANTS[name]
    batch = sampling.images(TINY, "cpu")
    values = []
    for prepared in (VARIANTS["as it is"], variant):
        flow = sampling.prepared("FInC", prepared, TINY, "cpu").eval()
        torch.manual_seed(0)  # dequantisation draws noise
        with torch.no_grad(), variant.context("cpu"):
            values.append(flow.log_prob(batch))
    torch.testing.assert_close(values[1], values[0], rtol=0.05 if "bfloat16" in name else 1e-5, atol=0)


@pytest.mark.parametrize("model", COMPARED)
def test_float32_loses_no_pixel_value(model: str):
    flow = sampling.build("normflows", model, TINY, "cpu").eval()
    assert sampling.values_lost(flow, sampling.images(TINY, "cpu")) == 0


def test_lost_values_are_counted():
    class Rounding(nn.Module):
        def inverse_and_log_det(self, images):
            return images, 0

        def forward_and_log_det(self, latents):
            return latents.index_fill(3, torch.tensor([0, 1]), -1), 0

    assert sampling.values_lost(Rounding(), sampling.images(TINY, "cpu")) == 2 / 8
