"""The examples at a tiny size, as a user runs them."""

import difflib
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SWAPS = sorted(path.name for path in (EXAMPLES / "swap").iterdir())
NUMBER = re.compile(r"(?<![\w.])-?(?:nan|inf|\d+\.\d+)")


def check_numbers(output: str) -> None:
    numbers = NUMBER.findall(output)
    assert numbers
    assert not {"nan", "inf", "-inf"} & set(numbers), output


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a script in this process, to save imports, and returns its output, whose numbers must be finite."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        output = capsys.readouterr().out
        check_numbers(output)
        return output

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Requires that a script uses one thread when two are available."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    taken = torch.get_num_threads()
    torch.set_num_threads(before)
    assert taken == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_train_digits(run_here, library: str, tmp_path: Path):
    output = run_here("train_digits.py", "--library", library, "--steps", "3", "--output", str(tmp_path))
    for name in ("3x3 + 1x1", "1x1 (Glow)"):
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert 1 < float(re.search(r"bits per dimension (\S+)", line)[1]) < 8
        assert float(re.search(r"round-trip error (\S+),", line)[1]) < 1e-3
    for picture in ("samples.png", "learning_curve.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_thread")
def test_inverse_direction(run_here):
    output = run_here("inverse_direction.py", "--steps", "3")
    before, after = (float(value) for value in re.findall(r"training: +(\S+) \+-", output))
    assert after < before
    assert float(re.search(r"round-trip error: (\S+)", output)[1]) < 1e-3


@pytest.mark.usefixtures("one_thread")
def test_conditional_kernels(run_here):
    output = run_here("conditional_kernels.py", "--steps", "10", "--seeds", "1")
    *flows, true = (float(value) for value in re.findall(r" (-\d+\.\d+)", output))
    assert len(flows) == 3
    assert true > max(flows) > min(flows) > true - 1  # which untrained flows do not reach


@pytest.mark.usefixtures("one_thread")
def test_two_dimensions(run_here):
    output = run_here("two_dimensions.py", "--steps", "30")
    gaussian, channels, pixels, *_ = (float(value) for value in re.findall(r"(\S+) nats", output))
    assert channels == pytest.approx(gaussian, abs=0.02)
    assert pixels > gaussian + 0.1
    rows = [[float(entry) for entry in line.split()] for line in output.splitlines() if line.startswith("    ")]
    assert rows[0][1] == rows[2][1] == 0
    assert rows[2][0] == rows[3][1] and rows[0][0] != rows[1][1]


def test_bounded_inverse(run_here):
    """One step of Adam at this rate makes the unbounded flow's inverse explode."""
    heading, *rows = run_here("bounded_inverse.py", "--steps", "1", "--learning-rates", "0.01").splitlines()
    assert heading.endswith("bits per dimension  largest gain  error of images  error of samples")
    unbounded, bounded = ([float(value) for value in row.split()[2:]] for row in rows[:2])
    assert all(0 < bits < 100 for bits in (unbounded[0], bounded[0]))
    assert min(unbounded[1:]) > 1
    assert bounded[1] <= 4
    assert max(bounded[2:]) < 1e-4
    assert "max_inverse_gain" in rows[3]  # the remedy
    assert "nothing is lost" in rows[4]


@pytest.mark.usefixtures("one_thread")
def test_lattice_field(run_here):
    heading, *rows = run_here("lattice_field.py", "--steps", "3", "--seeds", "0").splitlines()
    assert heading.endswith("effective sample size  mean of phi^2  seconds")
    sizes = [float(row.split()[-3]) for row in rows]
    assert len(sizes) == 2
    assert all(0 < size <= 1 for size in sizes)


def test_image_flow(run_here, tmp_path: Path):
    output = run_here("image_flow.py", "--steps", "3", "--output", str(tmp_path / "new" / "samples.png"))
    assert 1 < float(re.search(r"other photograph: (\S+) bits", output)[1]) < 16
    assert (tmp_path / "new" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_graph_sampling(run_here):
    output = run_here("graph_sampling.py", "--calls", "1")
    assert ("no GPU here" in output) != torch.cuda.is_available()
    assert float(re.search(r"10 images, changed by (\S+)", output)[1]) > 0


@pytest.mark.usefixtures("one_thread")
def test_torch_distributions(run_here):
    output = run_here("torch_distributions.py", "--steps", "200")
    true, fitted = (float(value) for value in re.findall(r"(\S+) nats", output))
    assert true < fitted < true + 1


def test_test_your_transform(impatient: None):
    names = runpy.run_path(str(EXAMPLES / "test_your_transform.py"))
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.filterwarnings("ignore:torch.(triangular_solve|lu) is deprecated")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("swap", SWAPS)
def test_swap_runs(run_here, swap: str, which: str):
    output = run_here(f"swap/{swap}/{which}.py", "--steps", "2")
    assert 1 < float(re.search(r"test bits per dimension: (\d+\.\d+)", output)[1]) < 20


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("swap", SWAPS)
def test_swap_brings_the_layer_alone(swap: str):
    texts, flows = [], []
    for which in ("before", "after"):
        path = EXAMPLES / "swap" / swap / f"{which}.py"
        texts.append(path.read_text().splitlines())
        flows.append(runpy.run_path(str(path))["build_flow"]())
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-" and line[2:].strip()]
    assert sum(line[0] == "+" for line in changes) <= 3  # the import, and the pair of layers or the block with it
    before, after = (Counter(type(module).__name__ for module in flow.modules()) for flow in flows)
    assert set((after - before).keys()) == {"InvertibleConv2d"}
    assert not before - after
