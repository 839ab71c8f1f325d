"""Tables and plots of the measurements in benchmarks/results."""

from __future__ import annotations

import io
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.plots import Row

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE = RESULTS / "cpu-epyc-2-threads.json"

HOSTS = ("nflows", "normflows")
RATIOS = {"inverse": plots.INVERSE, "forward": plots.FORWARD}  # ratios to conv2d
# A placeholder for the text colour of the page, which plots do not know.
_TEXT = "#010203"
_STYLE = {
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 10,
    "font.size": 9,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "svg.hashsalt": "nflows-kconv",
}


def all_results() -> str:
    """Returns a section for each file except those of `published`."""
    return "\n\n".join(_section(path) for path in sorted(RESULTS.glob("*.json")) if not path.match("published-*"))


def published() -> str:
    """Returns a section for each file of benchmarks/published.py."""
    sections = [_section(path) for path in sorted(RESULTS.glob("published-*.json"))]
    return "\n\n".join(sections) or "No such measurement is in the repository yet."


def headline() -> str:
    """Returns the batches of the CPU's table of four groups."""
    results = json.loads(HEADLINE.read_text())
    rows = [row for row in results["four groups"] if row["batch"] > 1]
    return f"{_ratio_table(rows, None)}\n\n{_machine(results)} {_source(HEADLINE)}"


def evidence() -> str:
    """Returns bits per dimension of each form of the layer, at the main size of benchmarks/evidence.py."""
    columns, cells = [], defaultdict(dict)
    for path in sorted(RESULTS.glob("evidence-*/runs.json")):
        results = json.loads(path.read_text())
        columns.append(f"{results['settings']['data']}, {results['settings']['seconds']:g} s")
        runs = [run for run in results["runs"] if _size(run) == _size(results["runs"][0])]
        for run in runs:
            of_form = [other for other in runs if _form(other) == _form(run)]
            cells[_form(run)][columns[-1]] = _bits(of_form)
    rows = [[form, *(found.get(column, "") for column in columns)] for form, found in cells.items()]
    return _table(["form, kernel", *columns], rows)


def reports() -> str:
    """Returns links to the reports of benchmarks/evidence.py."""
    found = sorted(RESULTS.glob("*/report.md"))
    if not found:
        return "No such report is in the repository yet."
    lines = []
    for path in found:
        title = path.read_text().partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}](results/{path.parent.name}/report.md)")
    return "\n".join(lines)


def _section(path: Path) -> str:
    results = json.loads(path.read_text())
    parts = [f"## {path.stem}", f"{_machine(results)} {_source(path)}"]
    for name, rows in results.items():
        if isinstance(rows, list) and rows:
            parts += _measurements(name, rows)
    return "\n\n".join(parts)


def _measurements(name: str, rows: list[Row]) -> Iterator[str]:
    first = rows[0]
    if name in plots.AXES:
        yield f"### Growing {name}"
        yield _svg(lambda: plots.draw({name: rows}), f"time against {name}")
    elif "corners" in first and "microseconds" in first and "conv2d" in plots.times_of(first, plots.modes_of(first)[0]):
        yield f"### {name.capitalize()}"
        for mode in plots.modes_of(first):
            yield from ([f"In mode {mode}:"] if mode else [])
            yield _ratio_table(rows, mode)
            yield _svg(lambda mode=mode: _bars(rows, mode), f"{name}: ratio to F.conv2d")
    elif "kernel_size" in first:
        yield f"### {name.capitalize()}"
        yield _inverse_table(rows)
    elif "published" in first:
        yield from _published_tables(rows)
    elif "operation" in first:
        yield "### Against the 1 × 1 convolutions of nflows and normflows"
        yield from _host_tables(rows)
    elif "bytes" in first and "seconds" in first:
        yield "### Memory and time of a training step"
        yield _memory_table(rows)
    elif {"images", "microseconds"} <= first.keys():
        yield f"### {name.capitalize()}"
        yield _time_table(rows)


def _size(run: Row) -> tuple[int, ...]:
    return run["levels"], run["steps"], run["width"]


def _form(run: Row) -> str:
    return f"{run['method']}, {run['kernel']} × {run['kernel']}" if run["kernel"] else run["method"]


def _bits(runs: list[Row]) -> str:
    """Returns mean and standard deviation over the seeds; for one seed, the standard error over the test images."""
    values = [run["bits_per_dim"] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else runs[0]["standard_error"]
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def _ratio_table(rows: list[Row], mode: str | None) -> str:
    """Returns times of F.conv2d, and the others as multiples of it."""
    lines = []
    for row in rows:
        times = plots.times_of(row, mode)
        line = [_shape(row), f"{times['conv2d'] / 1000:.3g} ms"]
        line += [f"{times[name] / times['conv2d']:.2f} ×" for name in RATIOS]
        line += [
            f"{times[f'{name}_backward'] / times['conv2d_backward']:.2f} ×" if f"{name}_backward" in times else ""
            for name in RATIOS
        ]
        lines.append(line)
    head = ["batch, channels, image", "F.conv2d", *RATIOS, *(f"{name}, with backward" for name in RATIOS)]
    return _table(head, lines)


def _inverse_table(rows: list[Row]) -> str:
    """Returns times of torch's convolution for the same layer, and the inverse as a multiple of it."""
    return _table(
        ["batch, channels, size", "corners", "kernel", "dilation", "convolution", "inverse"],
        [
            [
                _shape(row),
                ", ".join(dict.fromkeys(row["corners"])),
                _sides(row["kernel_size"]),
                str(row["dilation"]),
                f"{row['microseconds']['conv'] / 1000:.3g} ms",
                f"{row['microseconds']['inverse'] / row['microseconds']['conv']:.2f} ×",
            ]
            for row in rows
        ],
    )


def _host_tables(rows: list[Row]) -> Iterator[str]:
    """Returns the ranges of ratios to each library's 1 x 1 convolution, over the shapes."""
    ours = [name for name in rows[0]["microseconds"] if name not in HOSTS]
    keys = ("operation", "threads", "batch")
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row["microseconds"])
    for host in HOSTS:
        lines = []
        for group, times in groups.items():
            ratios = [[each[name] / each[host] for each in times] for name in ours]
            lines.append([*map(str, group), *(f"{min(values):.2f} to {max(values):.2f} ×" for values in ratios)])
        yield f"As multiples of the 1 × 1 convolution of {host}, the smallest and the largest over the shapes:"
        yield _table([*keys, *ours], lines)


def _published_tables(rows: list[Row]) -> Iterator[str]:
    """Returns, for each model, the measured and the published times of each convolution."""
    head = [
        "convolution",
        "images",
        "forward",
        "sampling",
        "other hardware: forward; sampling",
        "published bits per dim",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        lines = []
        for row in of_model:
            name = row["convolution"] + (f", {row['parameters'] / 1e6:.1f} M" if "parameters" in row else "")
            skipped = dict.fromkeys(row["skipped"], "skipped")
            times = {call: f"{seconds:.3g} s" for call, seconds in row["seconds"].items()} | skipped
            *seconds, bits = row["published"]
            cells = [times.get("forward", ""), times.get("sampling", ""), "; ".join(filter(None, seconds)), bits]
            lines.append([name, str(row.get("images", "")), *cells])
        yield f"### {model}"
        yield _table(head, lines)
        reasons = sorted({reason for row in of_model for reason in row["skipped"].values()})
        yield from (f"Skipped: {reason}." for reason in reasons)


def _memory_table(rows: list[Row]) -> str:
    kinds = list(rows[0]["bytes"])
    head = ["steps", *(f"{kind}, MiB" for kind in kinds), *(f"{kind}, s" for kind in kinds)]
    return _table(
        head,
        [
            [
                str(row["steps"]),
                *(f"{row['bytes'][kind] / 2**20:.1f}" for kind in kinds),
                *(f"{row['seconds'][kind]:.2f}" for kind in kinds),
            ]
            for row in rows
        ],
    )


def _time_table(rows: list[Row]) -> str:
    contestants = list(rows[0]["microseconds"])
    labels = [name for name in ("library", "variant", "images") if name in rows[0]]
    return _table(
        [*labels, *(f"{name}, ms" for name in contestants)],
        [
            [str(row[label]) for label in labels] + [f"{row['microseconds'][name] / 1000:.2f}" for name in contestants]
            for row in rows
        ],
    )


def _bars(rows: list[Row], mode: str | None) -> Figure:
    """Draws times as multiples of F.conv2d's; a tick on a bar is its floor."""
    figure = Figure(figsize=(5.2, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, (name, color) in enumerate(RATIOS.items()):
        for position, row in enumerate(rows):
            times = plots.times_of(row, mode)
            place = position + 0.38 * (index - 0.5)
            label = f"{name} / F.conv2d" if position == 0 else None
            axes.barh(place, times[name] / times["conv2d"], 0.36, color=color, label=label)
            if "floors" in row:
                floor = max(row["floors"][name].values()) / times["conv2d"]
                axes.plot([floor, floor], [place - 0.2, place + 0.2], color=_TEXT)
    axes.axvline(1, color=_TEXT, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [_shape(row) for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(RATIOS))
    return figure


def _svg(draw: Callable[[], Figure], title: str) -> str:
    file = io.StringIO()
    with rc_context(_STYLE):
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentcolor").replace("\n", " ")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f'<figure class="drawing plot" markdown="0">{svg}</figure>'


def _shape(row: Row) -> str:
    channels, *sides = row["shape"]
    return f"{row['batch']}, {channels}, {_sides(sides)}"


def _sides(sides: Sequence[int]) -> str:
    return " × ".join(map(str, sides))


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    facts = [machine["device"], f"torch {machine['torch']}", machine["date"]]
    if "cpu" not in machine:  # otherwise the device is a GPU
        facts.insert(1, f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}")
    return ", ".join(facts) + "."


def _source(path: Path) -> str:
    return f"[{path.relative_to(ROOT)}](results/{path.relative_to(RESULTS)})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
