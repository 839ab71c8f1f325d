"""Two processes that train together have equal parameters, the same as one process, and never deadlock."""

import os
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from torch import distributed, multiprocessing


@pytest.mark.skipif(
    sys.platform == "win32" or not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs gloo",
)
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One pair of processes runs every scenario."""
    path = str(tmp_path / "store")
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    context.set_forkserver_preload(["two_processes", "torch._dynamo"])  # one import for both
    processes = [context.Process(target=two_processes.run, args=(rank, path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    for rank in range(2):
        wrong = {name: said for name, said in torch.load(f"{path}.{rank}").items() if said}
        assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
