"""Tables and plots of the evidence."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence_training import BATCH

Run = dict[str, Any]
COLORS = {
    "Glow": "#3a6ea5",
    "FInC unit": "#e07b39",
    "pair": "#b5342b",
    "pair of sides": "#4c9e8f",
    "FInC unit, inverse": "#6f9e4c",
    "pair, inverse": "#7a5195",
    "pair, dilated": "#8a6d3b",
}


def write(folder: Path) -> None:
    """Writes report.md, learning_curves.png and pareto.png next to runs.json."""
    results = json.loads((folder / "runs.json").read_text())
    (folder / "report.md").write_text(report(results))
    for name, figure in (("learning_curves", draw_curves(results)), ("pareto", draw_pareto(results))):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    print(f"written to {folder}")


def report(results: dict[str, Any]) -> str:
    """Returns all tables, in Markdown."""
    machine, settings, runs = results["machine"], results["settings"], results["runs"]
    sizes = _by_size(runs)
    return "\n\n".join(
        [
            f"# {settings['data']}: bits per dimension after {settings['seconds']:g} s of training",
            f"{machine['device']}, torch {machine['torch']}, {machine['date']}. "
            + ("Times are those that one thread had a core. " if settings["device"] == "cpu" else "")
            + "A flow is trained for as many steps as fit into the time; the time of a step was measured before, those "
            "of all flows in turns. A size is L, K, width of the couplings, k. After ± stands the standard deviation "
            "over the seeds, or of one seed the standard error over the test images."
            + (f" Note: {results['note']}." if results["note"] else ""),
            "## Equal training time",
            _training_table(sizes),
            "## Equal parameters",
            "Glow with wider couplings, so that it has at least as many parameters as the pair.",
            _training_table(_of_equal_parameters(sizes)),
            "## Equal sampling time",
            "Bits per dimension of Glow at the sampling time of the other method, on the line between the two sizes on "
            "both sides on the front of Glow; means over the seeds.",
            _sampling_table(runs),
            "![bits per dimension against sampling time](pareto.png)",
            "![bits per dimension while training](learning_curves.png)",
            "",
        ]
    )


def draw_curves(results: dict[str, Any]) -> Figure:
    """Draws bits per dimension of the validation images against time and steps, at the main size."""
    figure = Figure(figsize=(9, 3.6), dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    ends = []
    for run in _main(results["runs"]):
        label = None if run["seed"] != results["runs"][0]["seed"] else run["method"]
        values = [point["bits_per_dim"] for point in run["curve"]]
        ends.append(min(values))
        for panel, scale in zip(panels, (run["step_seconds"], 1), strict=True):
            positions = [scale * point["step"] for point in run["curve"]]
            panel.plot(positions, values, color=COLORS[run["method"]], linewidth=1, label=label)
    panels[0].set_xlabel("training time, s")
    panels[1].set_xlabel("training steps")
    panels[0].set_ylabel("validation bits per dimension")
    # Without the first values, which are so high that they would hide the differences of the others.
    panels[0].set_ylim(min(ends) - 0.05, min(ends) + 0.6)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def draw_pareto(results: dict[str, Any]) -> Figure:
    """Draws bits per dimension against sampling time: the mean of each size and the front of each method."""
    figure = Figure(figsize=(6, 4), dpi=150)
    axes = figure.subplots()
    for method, color in COLORS.items():
        runs = [run for run in _means(results["runs"]) if run["method"] == method]
        if runs:
            axes.errorbar(*_coordinates(runs), fmt="o", markersize=3, elinewidth=0.5, color=color, label=method)
            times, bits, _ = _coordinates(_front(runs))
            axes.plot(times, bits, color=color, linewidth=1)
    axes.set_xscale("log")
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.set_xlabel("time to sample 100 images, ms")
    axes.set_ylabel("test bits per dimension")
    axes.legend(fontsize=8, title="method, with its front as a line", title_fontsize=8)
    figure.tight_layout()
    return figure


def _training_table(sizes: dict[tuple, list[Run]]) -> str:
    rows = []
    for (method, levels, steps, width, kernel), runs in sizes.items():
        rows.append(
            [
                method,
                f"{levels}, {steps}, {width}, {kernel or '-'}",
                f"{runs[0]['parameters']:,}",
                f"{len(runs)}",
                f"{statistics.mean(run['bits_per_dim'] for run in runs):.3f} ± {_spread(runs):.3f}",
                f"{runs[0]['training_steps']}",
                f"{BATCH / runs[0]['step_seconds']:.0f}",
                f"{1e3 * runs[0]['sampling_seconds']:.1f}",
                f"{max(run['round_trip_error'] for run in runs):.0e}",
            ]
        )
    head = (
        "method",
        "size",
        "parameters",
        "seeds",
        "test bits per dimension",
        "steps",
        "images/s",
        "100 samples, ms",
        "round-trip error",
    )
    return _table(head, rows)


def _sampling_table(runs: list[Run]) -> str:
    means = _means(runs)
    times, bits, _ = _coordinates(_front([run for run in means if run["method"] == "Glow"]))
    rows = []
    for run in means:
        (time,), (value,), _ = _coordinates([run])
        if run["method"] != "Glow" and times and times[0] <= time:
            beyond = " (the slowest size)" if time > times[-1] else ""
            glow = float(np.interp(time, times, bits))
            size = f"{run['levels']}, {run['steps']}, {run['width']}, {run['kernel']}"
            rows.append(
                [run["method"], size, f"{time:.1f}", f"{value:.3f}", f"{glow:.3f}{beyond}", f"{value - glow:+.3f}"]
            )
    head = ("method", "size", "100 samples, ms", "bits per dimension", "Glow at this time", "difference")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_size(runs: Iterable[Run]) -> dict[tuple, list[Run]]:
    sizes = defaultdict(list)
    for run in runs:
        sizes[tuple(run[name] for name in ("method", "levels", "steps", "width", "kernel"))].append(run)
    return dict(sizes)


def _of_equal_parameters(sizes: dict[tuple, list[Run]]) -> dict[tuple, list[Run]]:
    """Returns the pair at the main size, and the Glow with as many parameters."""
    pair = next((size for size in sizes if size[0] == "pair"), None)
    if pair is None:
        return {}
    parameters = sizes[pair][0]["parameters"]
    glow = [size for size in sizes if size[0] == "Glow" and sizes[size][0]["parameters"] >= parameters]
    nearest = min(glow, key=lambda size: sizes[size][0]["parameters"], default=None)
    return {size: sizes[size] for size in (nearest, pair) if size is not None}


def _main(runs: list[Run]) -> list[Run]:
    size: Callable[[Run], tuple] = lambda run: (run["levels"], run["steps"], run["width"])  # noqa: E731
    return [run for run in runs if size(run) == size(runs[0]) and run["kernel"] in (0, 3)]


def _front(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs that no faster run matches in bits per dimension, the fastest first."""
    front: list[Run] = []
    for run in sorted(runs, key=lambda run: run["sampling_seconds"]):
        if not front or run["bits_per_dim"] < front[-1]["bits_per_dim"]:
            front.append(run)
    return front


def _means(runs: Iterable[Run]) -> list[Run]:
    """Returns one run per size, the mean of its seeds."""
    means = []
    for seeds in _by_size(runs).values():
        mean = statistics.mean(run["bits_per_dim"] for run in seeds)
        means.append({**seeds[0], "bits_per_dim": mean, "standard_error": _spread(seeds)})
    return means


def _coordinates(runs: Sequence[Run]) -> tuple[list[float], list[float], list[float]]:
    """Returns sampling times in milliseconds, bits per dimension and their errors."""
    times = [1e3 * run["sampling_seconds"] for run in runs]
    return times, [run["bits_per_dim"] for run in runs], [run["standard_error"] for run in runs]


def _spread(runs: Sequence[Run]) -> float:
    if len(runs) == 1:
        return runs[0]["standard_error"]
    return statistics.stdev(run["bits_per_dim"] for run in runs)
