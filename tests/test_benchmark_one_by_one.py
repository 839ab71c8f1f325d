"""The benchmark beside the 1 x 1 convolutions of nflows and normflows: directions, and that its tables run."""

import json
import sys

import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("normflows")

from benchmarks import one_by_one

pytestmark = pytest.mark.filterwarnings("ignore:torch.(lu|triangular_solve) is deprecated")  # of the libraries


def test_forward_is_from_data_to_latent():
    x = torch.randn(2, 4, 3, 5)
    module = one_by_one.YARDSTICKS["normflows"](4)
    expected = torch.nn.functional.conv2d(x, module._assemble_W()[..., None, None])
    for other in (one_by_one.YARDSTICKS | one_by_one.OURS).values():
        ways = one_by_one.directions(other(4))
        torch.testing.assert_close(ways["inverse"](ways["forward"](x)[0])[0], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_by_one.directions(module)["forward"](x)[0], expected)


def test_tables_of_all_operations_run_and_are_written(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["one_by_one.py", "--tiny", "--seconds", "0", "--output", str(output)])
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        one_by_one.main()
    assert torch.get_num_threads() == threads
    rows = json.loads(output.read_text())["1x1"]
    assert [(row["threads"], row["operation"]) for row in rows] == [
        (threads, operation) for threads in (1, 2) for operation in one_by_one.OPERATIONS
    ]
    for row in rows:
        assert list(row["microseconds"]) == ["nflows", "normflows", "1x1", "3x3, four groups", "3x3, one group"]
        assert min(row["microseconds"].values()) > 0
    assert capsys.readouterr().out.count("forward with backward") == 2


def test_ratios_are_to_each_yardstick():
    times = {"nflows": 40.0, "normflows": 20.0, "1x1": 10.0, "3x3, four groups": 5.0, "3x3, one group": 30.0}
    line = one_by_one.describe({"batch": 100, "shape": (12, 16, 16), "microseconds": times})
    assert line.split()[-6:] == ["0.25x", "0.50x", "0.12x", "0.25x", "0.75x", "1.50x"]
