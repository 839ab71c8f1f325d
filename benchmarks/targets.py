"""Targets of measured values.

Ratios are to a baseline of the same run and apply to every GPU; microseconds apply only to an H100 or H200.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.workloads import CUDA, PAPER_SHAPES, Case

# The contestants of a row and their baselines.
BASELINES = {
    "inverse": "conv2d",
    "forward": "conv2d",
    "inverse_backward": "conv2d_backward",
    "forward_backward": "conv2d_backward",
}
BASELINES |= {f"plain_{name}": baseline for name, baseline in BASELINES.items()}  # on the plain backend


@dataclass(frozen=True)
class Target:
    """A limit for a value.

    Attributes:
        limit: The largest allowed value.
        unit: "x", times the baseline, or "us", microseconds.
        aim: A more ambitious value, if any.
    """

    limit: float
    unit: str = "x"
    aim: float | None = None

    def judge(self, quantity: str, mode: str, value: float) -> dict[str, object]:
        """Returns the record of a measured value with its target and whether it was met."""
        verdict = "missed" if not value <= self.limit else "met" if self.aim is None or value > self.aim else "aim met"
        return {"quantity": quantity, "mode": mode, "value": value, **asdict(self), "verdict": verdict}


HOST = Target(3, aim=1.5)
ERROR = Target(2)
_FIVE_TIMES_FASTER = Target(1 / 5, aim=1 / 10)
_HALF = Target(1 / 2)
_NO_SLOWER = Target(1, aim=1 / 2)

_MICROSECONDS = {Case(100, shape): Target(10, "us", aim=5) for shape in PAPER_SHAPES} | {
    Case(100, (12, 32, 32)): Target(12, "us", aim=5),
    Case(100, (12, 64, 64)): Target(40, "us"),
    Case(1, (12, 16, 16)): Target(6, "us"),
    Case(1, (12, 64, 64)): Target(25, "us"),
    Case(1, (12, 256, 256)): Target(150, "us"),
}


def counts_microseconds(device_name: str) -> bool:
    """Returns whether the targets in microseconds apply to this GPU."""
    return "H100" in device_name or "H200" in device_name


def of_case(case: Case, device_name: str) -> dict[tuple[str, str], Target]:
    """Returns the targets of a table's row, by contestant and mode ("eager" or "graph")."""
    if case in _MICROSECONDS:
        found = {
            ("forward", "eager"): _FIVE_TIMES_FASTER,
            ("forward", "graph"): _FIVE_TIMES_FASTER,
            ("forward_backward", "eager"): _HALF,
            ("forward_backward", "graph"): _HALF,
        }
        if counts_microseconds(device_name):
            found["inverse", "graph"] = _MICROSECONDS[case]
        return found
    if case in CUDA.tables["one group"]:
        return {("inverse", "graph"): _NO_SLOWER}
    if case in CUDA.tables["many channels"]:
        return {("inverse", "eager"): _NO_SLOWER, ("inverse", "graph"): _NO_SLOWER}
    return {}


def judge_row(case: Case, microseconds: dict[str, dict[str, float]], device_name: str) -> list[dict[str, object]]:
    """Returns the records of all values of a row with a target; times are by mode and contestant."""
    records = []
    for (quantity, mode), target in of_case(case, device_name).items():
        times = microseconds[mode]
        value = times[quantity] if target.unit == "us" else times[quantity] / times[BASELINES[quantity]]
        records.append(target.judge(quantity, mode, value))
    return records


def describe(record: dict) -> str:
    """Returns a record as text for a table: `<= 10 us: met (aim 5 us)`."""
    aim = "" if record["aim"] is None else f" (aim {record['aim']:g} {record['unit']})"
    return f"<= {record['limit']:g} {record['unit']}: {record['verdict']}{aim}"
