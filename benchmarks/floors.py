"""Floors, lower bounds of times: to move the bytes, to compute, and to take the dependent steps.

A floor is an amount divided by a speed measured on the device itself.

    bytes        images read and written once and the weight read once, over the bandwidth of a large copy
    operations   the layer's multiplications and additions, without those on padding and masked entries, over the rate
                 of a large float32 matrix product without TF32
    steps        H + W - 1 anti-diagonals of the inverse, times the latency of a step

The latency is that of the smallest step: the inverse of a 1 x 2 kernel on one row of one channel, where a pixel waits
for one multiply-add with the previous pixel. It is the slope of the time between two widths, in a CUDA graph. No other
kernel solves this recurrence pixel by pixel, so the step is our own kernel's.

Only the operations bound every kernel: small images may stay in the GPU's cache, which is faster than a large copy, and
an inverse that solves tiles of several pixels at once takes fewer than H + W - 1 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.workloads import Case, Workload
from nflows_kconv import InvertibleConv2d, functional

KERNEL_SIZE = (3, 3)
BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class Speeds:
    """Measured speeds of a device.

    Attributes:
        bytes_per_second: Bytes read and written by a large copy.
        operations_per_second: Operations of a large float32 matrix product without TF32.
        seconds_per_step: Latency of the smallest dependent step.
    """

    bytes_per_second: float
    operations_per_second: float
    seconds_per_step: float


def measure_speeds(workload: Workload, device: str, seconds: float) -> Speeds:
    """Measures the three speeds; TF32 must be off."""
    source = torch.empty(workload.copied_bytes, dtype=torch.uint8, device=device)
    a, b = torch.randn(2, workload.matrix_size, workload.matrix_size, device=device)
    large = timing.eager({"copy": source.clone, "product": lambda: a @ b}, seconds)
    layer = InvertibleConv2d(1, (1, 2), corners="TL").to(device)
    weight = layer.weight.detach()
    short, long = (torch.randn(1, 1, 1, width, device=device) for width in workload.chain_lengths)
    chains = timing.graph(
        {
            "short": lambda: functional.conv2d_inverse(short, weight, corners="TL"),
            "long": lambda: functional.conv2d_inverse(long, weight, corners="TL"),
        },
        seconds,
    )
    return Speeds(
        bytes_per_second=2 * workload.copied_bytes / (1e-6 * large["copy"]),
        operations_per_second=2 * workload.matrix_size**3 / (1e-6 * large["product"]),
        seconds_per_step=1e-6 * (chains["long"] - chains["short"]) / (long.shape[3] - short.shape[3]),
    )


def count_bytes(case: Case) -> int:
    """Returns the bytes of input, output and weight."""
    channels, height, width = case.shape
    weights = channels * channels // len(case.corners) * KERNEL_SIZE[0] * KERNEL_SIZE[1]
    return BYTES_PER_VALUE * (2 * case.batch * channels * height * width + weights)


def count_operations(case: Case) -> int:
    """Counts multiplications and additions, two for each unmasked weight at a pixel inside the image."""
    channels, height, width = case.shape
    per_group = channels // len(case.corners)
    rows, columns = (
        sum(max(0, size - shift) for shift in range(taps))
        for size, taps in zip((height, width), KERNEL_SIZE, strict=True)
    )
    masked = per_group * (per_group - 1) // 2 * height * width
    return 2 * case.batch * len(case.corners) * (per_group**2 * rows * columns - masked)


def count_steps(case: Case) -> int:
    """Counts the anti-diagonals of an image."""
    return case.shape[1] + case.shape[2] - 1


def floors(case: Case, speeds: Speeds) -> dict[str, dict[str, float]]:
    """Returns microseconds of the inverse and the forward for bytes, operations and steps; the forward has no steps."""
    shared = {
        "bytes": 1e6 * count_bytes(case) / speeds.bytes_per_second,
        "operations": 1e6 * count_operations(case) / speeds.operations_per_second,
    }
    return {"inverse": shared | {"steps": 1e6 * count_steps(case) * speeds.seconds_per_step}, "forward": shared}
