"""The peak of what PyTorch allocates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile


def peak_growth(run: Callable[[], object], device: str) -> int:
    """Bytes of tensors by which a call raises what is allocated, at its peak.

    Args:
        run: What to call, which only uses the device.
        device: "cpu", where the profiler tells of each allocation, or "cuda".
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    total = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most
