"""Draws the curves of a result: `python -m benchmarks.plots FILE.json` writes FILE.png.

Time against image side, channels and batch, whichever the file has: the inverse, F.conv2d's forward and a dense
triangular solve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

AXES = {
    "image side": lambda row: row["shape"][1],
    "channels": lambda row: row["shape"][0],
    "batch": lambda row: row["batch"],
}
# Mode (None where a file has only one), contestant: label, color, line.
LINES = {
    (None, "inverse"): ("inverse", "#e07b39", "-"),
    (None, "conv2d"): ("F.conv2d, forward", "#3a6ea5", "-"),
    ("graph", "inverse"): ("inverse, CUDA graph", "#e07b39", "-"),
    ("eager", "inverse"): ("inverse, eager", "#e07b39", "--"),
    ("graph", "conv2d"): ("F.conv2d forward, CUDA graph", "#3a6ea5", "-"),
    ("eager", "conv2d"): ("F.conv2d forward, eager", "#3a6ea5", "--"),
    ("eager", "dense_solve"): ("dense triangular solve, eager", "#7a7a7a", "--"),
    (None, "Glow"): ("Glow", "#7a7a7a", "--"),
    (None, "FInC unit"): ("FInC unit", "#e07b39", "-"),
    (None, "pair of corners"): ("pair of corners", "#b03a2e", "-"),
    (None, "Emerging"): ("Emerging", "#3a6ea5", "-"),
    (None, "MaCow"): ("MaCow", "#3d8b5f", "-"),
    (None, "inverse direction"): ("inverse direction", "#e07b39", "--"),
    (None, "periodic"): ("periodic", "#8e5ea2", "-"),
}


def draw(results: dict) -> Figure:
    """Returns one panel for each curve of a result."""
    names = [name for name in AXES if name in results]
    if not names:
        raise ValueError(f"the results must have at least one of the curves {tuple(AXES)}, got {tuple(results)}")
    figure = Figure(figsize=(4 * len(names), 3.6), dpi=150)
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw_curve(panel, name, results[name])
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, {machine['date']}", fontsize=9)
    figure.tight_layout()
    return figure


def write(results: dict, path: Path) -> None:
    """Writes the picture of a result."""
    draw(results).savefig(path, metadata={"Software": None})


def _draw_curve(panel: Axes, name: str, rows: list[dict]) -> None:
    for (mode, contestant), (label, color, style) in LINES.items():
        points = [
            (AXES[name](row), times[contestant])
            for row in rows
            if contestant in (times := _times_of(row["microseconds"], mode))
        ]
        if points:
            panel.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(name)
    panel.set_ylabel("microseconds")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=6)


def _times_of(microseconds: dict, mode: str | None) -> dict[str, float]:
    if mode is not None:
        return microseconds.get(mode, {})
    return {name: value for name, value in microseconds.items() if not isinstance(value, dict)}


def main() -> None:
    """Reads the JSON and writes the picture next to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file that layer.py has written")
    path = parser.parse_args().results
    try:
        write(json.loads(path.read_text()), path.with_suffix(".png"))
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    print(f"written to {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
