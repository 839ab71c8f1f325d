"""Tables for a GPU, with lower bounds and targets.

Times are medians in three modes: "eager", calls queued back to back; "graph", calls captured into one CUDA graph, with
their inputs in the L2 cache if they fit; and "cold", the same with a cold L2 cache. In the tables, "plain ..." is the
layer on `plain_backend`, a rival of its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import accuracy, contestants, dense, timing
from benchmarks.first_use import measure_first_use
from benchmarks.floors import Speeds, floors, measure_speeds
from benchmarks.targets import BASELINES, ERROR, HOST, describe, judge_row
from benchmarks.workloads import Case, Workload

MODES = ("eager", "graph", "cold")


def sections(workload: Workload, seconds: float, device: str, device_name: str) -> Iterator[tuple[str, Any]]:
    """Measures and prints; yields the name and the results of each section."""
    speeds = measure_speeds(workload, device, seconds)
    print(
        f"\nspeeds: copy {1e-12 * speeds.bytes_per_second:.2f} TB/s, float32 products"
        f" {1e-12 * speeds.operations_per_second:.1f} TFLOP/s, step {1e9 * speeds.seconds_per_step:.0f} ns"
    )
    yield "speeds", asdict(speeds)
    first = next(iter(workload.tables.values()))[0]
    yield "host", _host(first, seconds, device, workload.tiny)  # quick, so before a time limit can end the tables
    for name, cases in workload.tables.items():
        for rows in _table(name, cases, seconds, device, device_name, speeds):
            yield name, rows
    yield "accuracy", _accuracy([case for cases in workload.tables.values() for case in cases], device, workload.tiny)
    yield "first use", _first_use(first, device)
    for name, cases in workload.curves.items():
        yield name, _curve(name, cases, seconds, device, speeds)


def _times(compared: contestants.Contestants, seconds: float) -> dict[str, dict[str, float]]:
    """Returns times by mode and contestant; the modes share the seconds."""
    return {mode: getattr(timing, mode)(compared, seconds / len(MODES)) for mode in MODES}


def _largest(floor: dict[str, float]) -> str:
    name = max(floor, key=lambda name: floor[name])
    return f"{floor[name]:.2f} us ({name})"


def _table(
    name: str, cases: list[Case], seconds: float, device: str, device_name: str, speeds: Speeds
) -> Iterator[list[dict]]:
    """Yields the rows so far after each row."""
    print(f"\n{name}, k = 3, float32; F.conv2d has its backward where the layer has\n")
    print(
        "batch  (C, H, W)        corners  mode   measured                        time      F.conv2d    ratio"
        "  floor                 target"
    )
    rows: list[dict] = []
    for case in cases:
        compared = contestants.for_race(case, device)
        times, floor = _times(compared, seconds), floors(case, speeds)
        records = judge_row(case, times, device_name)
        described = {(record["quantity"], record["mode"]): describe(record) for record in records}
        for mode in MODES:
            for quantity, baseline in BASELINES.items():
                ours, theirs = times[mode][quantity], times[mode][baseline]
                shown = quantity.replace("_backward", " + backward").replace("_", " ")
                bound = _largest(floor[quantity]) if quantity in floor else ""
                print(
                    f"{case.batch:5d}  {case.shape!s:15s} {len(case.corners):7d}  {mode:6s} {shown:24s}"
                    f" {ours:8.1f} us  {theirs:8.1f} us {ours / theirs:7.2f}x  {bound:20s}"
                    f"  {described.get((quantity, mode), '')}".rstrip(),
                    flush=True,
                )
        rows.append({**case._asdict(), "microseconds": times, "floors": floor, "targets": records})
        yield rows


def _host(case: Case, seconds: float, device: str, tiny: bool) -> list[dict]:
    with torch.no_grad():
        times = timing.host(contestants.for_host(case, device), seconds)
    print(f"\nhost time of one eager call, batch {case.batch}, {case.shape}, no_grad\n")
    print(f"{'torch.add into a given output':30s} {times['torch.add']:8.2f} us")
    records = []
    for quantity, name in {
        "forward": "functional.conv2d",
        "inverse": "functional.conv2d_inverse",
        "module_forward": "InvertibleConv2d.forward",
        "module_inverse": "InvertibleConv2d.inverse",
    }.items():
        ratio = times[quantity] / times["torch.add"]
        verdict = ""
        if quantity in ("forward", "inverse") and not tiny:
            records.append(HOST.judge(quantity, "host", ratio))
            verdict = describe(records[-1])
        print(f"{name:30s} {times[quantity]:8.2f} us {ratio:7.2f}x  {verdict}".rstrip(), flush=True)
    return [{**case._asdict(), "microseconds": {"host": times}, "targets": records}]


def _accuracy(cases: list[Case], device: str, tiny: bool) -> list[dict]:
    print("\nlargest error of float32 against float64, relative to the largest entry\n")
    print("batch  (C, H, W)        corners  quantity                      CPU       GPU    ratio  target")
    rows = []
    for case in cases:
        records = []
        measured = accuracy.errors(case, device)
        for quantity, error in measured.items():
            ratio, verdict = accuracy.ratio(error), ""
            if not tiny:
                records.append(ERROR.judge(quantity, "error", ratio))
                verdict = describe(records[-1])
            print(
                f"{case.batch:5d}  {case.shape!s:15s} {len(case.corners):7d}  {quantity:24s} {error['cpu']:8.1e}"
                f"  {error['device']:8.1e} {ratio:7.2f}x  {verdict}".rstrip(),
                flush=True,
            )
        rows.append({**case._asdict(), "errors": measured, "targets": records})
    return rows


def _first_use(case: Case, device: str) -> dict[str, dict[str, list[float]]]:
    measured = measure_first_use(case, device)
    print(f"\nfirst and second call in a process, batch {case.batch}, {case.shape}, milliseconds\n")
    for process, calls in measured.items():
        for name, (first, second) in calls.items():
            print(f"{process:14s} {name:28s} {first:10.1f} {second:8.2f}", flush=True)
    return measured


def _curve(name: str, cases: list[Case], seconds: float, device: str, speeds: Speeds) -> list[dict]:
    print(f"\ngrowing {name}, four groups; the dense triangular solve is eager, without the making of its matrix\n")
    print(
        "batch  (C, H, W)        inverse: eager      graph     F.conv2d: eager      graph  floor"
        "                 dense triangular solve"
    )
    rows = []
    for case in cases:
        compared, images, weight = contestants.for_curve(case, device)
        times, floor = _times(compared, seconds), floors(case, speeds)
        size = dense.matrix_bytes(case)
        if size <= dense.MOST_BYTES:
            jacobian, columns = dense.matrices(weight, case), dense.right_hand_sides(images, case)
            solving: contestants.Contestants = {"dense_solve": partial(dense.solve, jacobian, columns)}
            times["eager"] |= timing.eager(solving, seconds / len(MODES))
            solved = f"{times['eager']['dense_solve']:10.1f} us"
            del jacobian, columns, solving
        else:
            solved = f"not measured: its matrix has {size / 2**30:.1f} GiB"
        eager, graph = times["eager"], times["graph"]
        print(
            f"{case.batch:5d}  {case.shape!s:15s} {eager['inverse']:13.1f} us {graph['inverse']:8.1f} us"
            f" {eager['conv2d']:13.1f} us {graph['conv2d']:8.1f} us"
            f"  {_largest(floor['inverse']):20s} {solved}",
            flush=True,
        )
        rows.append({**case._asdict(), "microseconds": times, "floors": floor, "dense_matrix_bytes": size})
    return rows
