"""Times first calls: `python -m benchmarks.first_use cuda 100 12 16 16` prints milliseconds in its process as JSON.

A CUDA kernel is compiled when first needed, then kept on disk for later processes and in memory for later calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import FOUR, Case
from nflows_kconv import InvertibleConv2d, functional


def measure_first_use(case: Case, device: str) -> dict[str, dict[str, list[float]]]:
    """Returns milliseconds of the first and the second call, in a process without and in one with kernels on disk."""
    with tempfile.TemporaryDirectory() as cache:
        return {process: _in_new_process(case, device, cache) for process in ("empty cache", "filled cache")}


def _in_new_process(case: Case, device: str, cache: str) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.first_use", device, str(case.batch), *map(str, case.shape)]
    environment = os.environ | {"NFLOWS_KCONV_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _milliseconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    float(run().flatten()[0])  # waits for the device
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Times two calls of each function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device")
    parser.add_argument("sizes", type=int, nargs=4, metavar="SIZE", help="B, C, H, W")
    arguments = parser.parse_args()
    x = torch.randn(arguments.sizes, device=arguments.device)
    weight = InvertibleConv2d(x.shape[1]).to(x.device).weight.detach()
    leaf = weight.clone().requires_grad_()
    # Must not count torch's own first call of these.
    _milliseconds(lambda: torch.autograd.grad((leaf + weight).clone(), leaf, weight)[0] + x.new_zeros(()))
    calls: dict[str, Callable[[], Tensor]] = {
        "inverse": lambda: functional.conv2d_inverse(x, weight, corners=FOUR),
        "forward": lambda: functional.conv2d(x, weight, corners=FOUR),
        "forward and weight gradient": lambda: torch.autograd.grad(functional.conv2d(x, leaf, corners=FOUR), leaf, x)[
            0
        ],
    }
    print(json.dumps({name: [_milliseconds(run), _milliseconds(run)] for name, run in calls.items()}))


if __name__ == "__main__":
    main()
