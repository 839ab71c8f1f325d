"""The page "Test your own transform" runs: its code, its tests, and the output it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", PAGE, re.DOTALL | re.MULTILINE)


def rounded(text: str) -> str:
    return re.sub(r"(\d\.\d{5})\d+", r"\1", text)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_the_page_runs_as_it_says(capsys: pytest.CaptureFixture, impatient: None):
    names: dict = {"__name__": "test_flows"}
    for code, output in BLOCKS:
        exec(compile(code, "testing.md", "exec"), names)
        assert rounded(capsys.readouterr().out) == rounded(output)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()
