"""Times the layer against its own forward written with F.conv2d, as ratios in one run.

    python benchmarks/layer.py                      prints the tables
    python benchmarks/layer.py --output FILE.json   and writes them, with machine, versions and date

The yardstick is what one would write without this package: for each group F.pad and F.conv2d, then torch.cat. Every
row's contestants take turns, so that whatever else the machine does slows all of them; the table shows their medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import nflows_kconv
from nflows_kconv import InvertibleConv2d, functional

FOUR = ("TL", "TR", "BL", "BR")
# (left, right, top, bottom), for a 3 x 3 kernel
PADDING = {"TL": (2, 0, 2, 0), "TR": (0, 2, 2, 0), "BL": (2, 0, 0, 2), "BR": (0, 2, 0, 2)}
PAPER_SHAPES = [(12, 16, 16), (24, 8, 8), (48, 4, 4), (12, 32, 32), (24, 16, 16), (48, 8, 8)]
WIDE_SHAPES = [(128, 16, 16), (64, 32, 32)]
SIDES = [8, 16, 32, 64, 128, 256, 512]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def pad_conv_cat(x: Tensor, weight: Tensor, corners: Sequence[str]) -> Tensor:
    """The layer's forward without this package."""
    groups = zip(x.chunk(len(corners), 1), weight.chunk(len(corners)), corners, strict=True)
    return torch.cat([F.conv2d(F.pad(group, PADDING[corner]), w) for group, w, corner in groups], 1)


def medians(contestants: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median time of each in microseconds, taking turns for about this long."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * sorted(taken)[len(taken) // 2] for name, taken in times.items()}


def measure(batch: int, shape: tuple[int, int, int], corners: Sequence[str], seconds: float) -> dict[str, object]:
    """One row of the tables."""
    layer = InvertibleConv2d(shape[0], corners=corners)
    weight = layer.weight.detach()
    x = torch.randn(batch, *shape)
    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def without_grad(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return function(x, weight, corners)

        return run

    def with_grad(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(leaf_x, leaf_weight, corners), (leaf_x, leaf_weight), x)

    times = medians(
        {
            "conv2d": without_grad(pad_conv_cat),
            "inverse": without_grad(functional.conv2d_inverse),
            "forward": without_grad(functional.conv2d),
            "conv2d_backward": with_grad(pad_conv_cat),
            "inverse_backward": with_grad(functional.conv2d_inverse),
            "forward_backward": with_grad(functional.conv2d),
        },
        seconds,
    )
    return {"batch": batch, "shape": shape, "corners": corners, "microseconds": times}


def print_row(row: dict) -> None:
    """Prints a row with its ratios to the yardstick."""
    t = row["microseconds"]
    print(
        f"{row['batch']:5d}  {row['shape']!s:15s} {len(row['corners'])} group{'s' if len(row['corners']) > 1 else ' '}"
        f" {t['conv2d']:10.0f} us {t['inverse']:10.0f} us"
        f"  {t['inverse'] / t['conv2d']:6.2f}x {t['forward'] / t['conv2d']:6.2f}x"
        f" {t['inverse_backward'] / t['conv2d_backward']:13.2f}x {t['forward_backward'] / t['conv2d_backward']:13.2f}x",
        flush=True,
    )


def table(title: str, rows: list[tuple[int, tuple[int, int, int], Sequence[str]]], seconds: float) -> list[dict]:
    """Measures and prints rows."""
    print(f"\n{title}\n")
    print("batch  (C, H, W)                  F.conv2d       inverse  inverse  forward  inverse+backw.  forward+backw.")
    measured = []
    for batch, shape, corners in rows:
        row = measure(batch, shape, corners, seconds)
        print_row(row)
        measured.append(row)
    return measured


def scaling(title: str, rows: list[tuple[int, tuple[int, int, int]]], seconds: float) -> list[dict]:
    """The time of a pixel, which is constant where the cost is linear."""
    print(f"\n{title}\n")
    print("batch  (C, H, W)           inverse       a pixel   F.conv2d")
    measured = []
    for batch, shape in rows:
        layer = InvertibleConv2d(shape[0])
        weight, x = layer.weight.detach(), torch.randn(batch, *shape)
        with torch.no_grad():
            times = medians(
                {
                    "conv2d": lambda x=x, w=weight: pad_conv_cat(x, w, FOUR),
                    "inverse": lambda x=x, w=weight: functional.conv2d_inverse(x, w, FOUR),
                },
                seconds,
            )
        pixels = batch * shape[1] * shape[2]
        print(
            f"{batch:5d}  {shape!s:15s} {times['inverse']:10.0f} us {1e3 * times['inverse'] / pixels:9.1f} ns"
            f" {1e3 * times['conv2d'] / pixels:7.1f} ns",
            flush=True,
        )
        measured.append({"batch": batch, "shape": shape, "corners": FOUR, "microseconds": times})
    return measured


def machine() -> dict[str, object]:
    """Where and with what this was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(": ")[1] for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), model)
    return {
        "device": model,
        "threads": torch.get_num_threads(),
        "backends": {name: str(backend) for name, backend in nflows_kconv.backends().items()},
        "nflows_kconv": nflows_kconv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Parses the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurement for each row")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, object] = {"machine": machine()}
    for key, value in machine().items():
        print(f"{key}: {value}")
    for name, corners in (("four groups", FOUR), ("one group", ("TL",))):
        results[name] = table(
            f"{name}, k = 3, float32; the ratios are to F.conv2d (with its backward where there is one)",
            [(100, shape, corners) for shape in PAPER_SHAPES]
            + [(32, shape, corners) for shape in WIDE_SHAPES]
            + [(1, shape, corners) for shape in PAPER_SHAPES + WIDE_SHAPES],
            arguments.seconds,
        )
    results["image side"] = scaling("one image, growing", [(1, (12, s, s)) for s in SIDES], arguments.seconds)
    results["batch"] = scaling("16 x 16, growing batch", [(b, (12, 16, 16)) for b in BATCHES], arguments.seconds)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
