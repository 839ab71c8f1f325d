"""Two processes that train together have equal parameters, the same as one process, and never deadlock."""

import sys

import pytest
import torch
import two_processes
from torch import distributed, multiprocessing


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, str | None]]:
    """Returns the report of each scenario from each process; one pair of processes runs them all."""
    path = str(tmp_path_factory.mktemp("two") / "store")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=two_processes.run, args=(rank, path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [torch.load(f"{path}.{rank}") for rank in range(2)]


@pytest.mark.skipif(
    sys.platform == "win32" or not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs gloo",
)
@pytest.mark.parametrize("name", two_processes.SCENARIOS)
def test_two_processes(name: str, found: list[dict[str, str | None]]):
    assert [said[name] for said in found] == [None, None]
