"""Command-line arguments shared by the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nflows_kconv


def parse(description: str, seconds: float, options: Mapping[str, Mapping[str, Any]] = {}) -> argparse.Namespace:
    """Parses and checks the command line, and makes the folder of the results.

    Args:
        description: What the benchmark measures.
        seconds: Default time to measure each row.
        options: Options of this benchmark by name, as arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")
    parser.add_argument("--seconds", type=float, default=seconds, help="of measurement for each row")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that this works, tells nothing of speed")
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    arguments = parser.parse_args()
    backend = nflows_kconv.available_backends()["cuda"]
    if arguments.device == "cuda" and not backend.selected:
        parser.error(f"--device cuda needs a GPU on which the CUDA kernels run, got: {backend}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    return arguments
