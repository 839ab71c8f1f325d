"""The examples, at a tiny size, as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = re.compile(r"(?<![\w.])-?(?:nan|inf|\d+\.\d+)")


def run(script: str, *arguments: str) -> str:
    """What the example prints; its numbers are finite."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = NUMBER.findall(done.stdout)
    assert numbers
    assert not {"nan", "inf", "-inf"} & set(numbers), done.stdout
    return done.stdout


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_train_digits(library: str, tmp_path: Path):
    output = run("train_digits.py", "--library", library, "--steps", "3", "--output", str(tmp_path))
    for name in ("3x3 + 1x1", "1x1 (Glow)"):
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert 1 < float(re.search(r"bits per dimension (\S+)", line)[1]) < 8
        assert float(re.search(r"round-trip error (\S+),", line)[1]) < 1e-3
    for picture in ("samples.png", "learning_curve.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_inverse_direction():
    output = run("inverse_direction.py", "--steps", "3")
    before, after = (float(value) for value in re.findall(r"training: +(\S+) \+-", output))
    assert after < before
    assert float(re.search(r"round-trip error: (\S+)", output)[1]) < 1e-3
