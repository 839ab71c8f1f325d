"""Draws the curves of a result: `python -m benchmarks.plots FILE.json` writes FILE.png, as in the documentation.

Draws time against image side, channels and batch, as far as the file has them: the inverse, F.conv2d's forward, a dense
triangular solve, and the inverse's floor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
AXES = {
    "image side": lambda row: row["shape"][1],
    "channels": lambda row: row["shape"][0],
    "batch": lambda row: row["batch"],
}
INVERSE, FORWARD = "#e07b39", "#3a6ea5"
# Mode (None if a file has only one), contestant: label, color, line.
LINES = {
    (None, "inverse"): ("inverse", INVERSE, "-"),
    (None, "conv2d"): ("F.conv2d, forward", FORWARD, "-"),
    ("graph", "inverse"): ("inverse, CUDA graph", INVERSE, "-"),
    ("eager", "inverse"): ("inverse, eager", INVERSE, "--"),
    ("graph", "conv2d"): ("F.conv2d forward, CUDA graph", FORWARD, "-"),
    ("eager", "conv2d"): ("F.conv2d forward, eager", FORWARD, "--"),
    ("eager", "dense_solve"): ("dense triangular solve, eager", "#7a7a7a", "--"),
    (None, "Glow"): ("Glow", "#7a7a7a", "--"),
    (None, "FInC unit"): ("FInC unit", "#e07b39", "-"),
    (None, "pair of corners"): ("pair of corners", "#b03a2e", "-"),
    (None, "Emerging"): ("Emerging", "#3a6ea5", "-"),
    (None, "MaCow"): ("MaCow", "#3d8b5f", "-"),
    (None, "inverse direction"): ("inverse direction", "#e07b39", "--"),
    (None, "periodic"): ("periodic", "#8e5ea2", "-"),
}


def draw(results: dict[str, Any]) -> Figure:
    """Returns one panel per curve of a result."""
    names = [name for name in AXES if name in results]
    if not names:
        raise ValueError(f"the results must have at least one of the curves {tuple(AXES)}, got {tuple(results)}")
    figure = Figure(figsize=(5.2 * len(names), 3.4), dpi=150, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw_curve(panel, name, results[name])
    return figure


def modes_of(row: Row) -> list[str | None]:
    """Returns the modes of a row: several for a GPU, one unnamed mode for a CPU."""
    found: list[str | None] = [name for name, value in row["microseconds"].items() if isinstance(value, dict)]
    return found or [None]


def times_of(row: Row, mode: str | None) -> dict[str, float]:
    """Returns microseconds by contestant."""
    return row["microseconds"] if mode is None else row["microseconds"][mode]


def _draw_curve(panel: Axes, name: str, rows: list[Row]) -> None:
    positions = [AXES[name](row) for row in rows]
    for (mode, contestant), (label, color, style) in LINES.items():
        points = [
            (position, times_of(row, mode)[contestant])
            for position, row in zip(positions, rows, strict=True)
            if mode in modes_of(row) and contestant in times_of(row, mode)
        ]
        if points:
            panel.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
    if "floors" in rows[0]:
        floors = [max(row["floors"]["inverse"].values()) for row in rows]
        panel.plot(positions, floors, ":", color=rcParams["text.color"], label="floor of the inverse")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(positions, [str(position) for position in positions])
    panel.set_xlabel(name)
    panel.set_ylabel("microseconds")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize="x-small")


def main() -> None:
    """Reads the JSON and writes the picture next to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file that benchmarks.layer has written")
    path = parser.parse_args().results
    try:
        results = json.loads(path.read_text())
        figure = draw(results)
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, {machine['date']}")
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    print(f"written to {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
