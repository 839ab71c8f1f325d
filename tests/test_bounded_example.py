"""The example that shows the bound, at a tiny size, as a user runs it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "examples" / "bounded_inverse.py"


def test_bounded_flows_return_where_others_do_not():
    """One step of Adam at this rate makes the unbounded flow's inverse explode."""
    command = [sys.executable, str(SCRIPT), "--steps", "1", "--learning-rates", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heading, *rows = done.stdout.splitlines()
    assert heading.endswith("bits per dimension  largest gain  error of images  error of samples")
    unbounded, bounded = ([float(value) for value in row.split()[2:]] for row in rows[:2])
    assert all(0 < bits < 100 for bits in (unbounded[0], bounded[0]))
    assert min(unbounded[1:]) > 1
    assert bounded[1] <= 4
    assert max(bounded[2:]) < 1e-4
    assert "max_inverse_gain" in rows[3]  # what helps
    assert "nothing is lost" in rows[4]
