"""Checks that the numbers are right: small problems for every family of kernels, against float64 on a CPU.

    python -m benchmarks.smoke --device cuda                            a minute at most
    compute-sanitizer --tool memcheck python -m benchmarks.smoke ...    checks reads and writes; also racecheck
    --output FILE.json                                                  writes properties of the GPU and errors

Each problem is the forward, the inverse and their gradients; see accuracy.py. The exit status is 1 if one is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import accuracy, command_line, layer
from benchmarks.workloads import ONE, Case

# Another order of summation cannot explain errors this many times those of a CPU.
MOST = 16
# By solver: kernels, or `backends/products.py`. All except those of sides have a weight gradient.
CASES = {
    "solve_rows": [
        Case(3, (12, 7, 6)),
        Case(7, (6, 5, 9), ("BR", "TL")),
        Case(1, (8, 70, 5)),  # in bands of rows
        Case(2, (6, 6, 11), ("T", "B")),
    ],
    "solve_channels": [
        Case(2, (24, 6, 5), ONE),
        Case(3, (96, 4, 4)),
        Case(1, (34, 40, 6), ("TR", "BL")),
        Case(2, (48, 3, 8), ("BR",)),
    ],
    "solve_tiles": [
        Case(300, (70, 6, 5), ONE),
        Case(5, (140, 5, 7), ("BL", "TR")),
        Case(1, (96, 9, 9), ONE),
        Case(3, (80, 3, 4), ("BR",)),
    ],
    "products": [Case(2, (34, 6, 5), ("T", "B")), Case(1, (516, 3, 4), ONE)],
}


def sections(device: str) -> Iterator[tuple[str, Any]]:
    """Runs the problems and prints; yields the name and the results of each section."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties("cuda")
        yield "properties", {name: str(getattr(properties, name)) for name in dir(properties) if name[0] != "_"}
    print("\nkernel          batch  (C, H, W)        corners                largest error, times that of a CPU")
    rows: list[dict[str, Any]] = []
    for kernel, cases in CASES.items():
        for case in cases:
            ratios = {name: accuracy.ratio(error) for name, error in accuracy.errors(case, device).items()}
            worst = max(ratios, key=lambda name: (not ratios[name] <= MOST, ratios[name]))  # NaN counts as the worst
            right = ratios[worst] <= MOST
            rows.append({"kernel": kernel, **case._asdict(), "ratios": ratios, "right": right})
            print(
                f"{kernel:15s} {case.batch:5d}  {case.shape!s:15s}  {'/'.join(case.corners):20s}  {ratios[worst]:7.2f}"
                f" {worst}{'' if right else '  WRONG'}",
                flush=True,
            )
            yield "cases", rows


def main() -> None:
    """Parses the arguments and runs the problems."""
    arguments = command_line.parse(__doc__, seconds=0.0)
    torch.manual_seed(0)
    results = layer.run(arguments, lambda _: sections(arguments.device))
    wrong = [row for row in results["cases"] if not row["right"]]
    print(f"\n{len(results['cases']) - len(wrong)} of {len(results['cases'])} problems are right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
