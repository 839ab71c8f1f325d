"""Tables for a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import contestants, timing
from benchmarks.workloads import Case, InverseCase, Workload


def sections(workload: Workload, seconds: float) -> Iterator[tuple[str, list[dict]]]:
    """Measures and prints; yields the name and the rows of each table."""
    for name, cases in workload.tables.items():
        title = f"{name}, k = 3, float32; the ratios are to F.conv2d (with its backward where there is one)"
        yield name, _table(title, cases, seconds)
    titles = {"image side": "one image, growing", "batch": "16 x 16, growing batch"}
    for name, cases in workload.curves.items():
        yield name, _curve(titles[name], cases, seconds)
    for name, inverse_cases in workload.inverses.items():
        yield name, _inverses(name, inverse_cases, seconds)


def _table(title: str, cases: list[Case], seconds: float) -> list[dict]:
    print(f"\n{title}\n")
    print("batch  (C, H, W)                  F.conv2d       inverse  inverse  forward  inverse+backw.  forward+backw.")
    rows = []
    for case in cases:
        t = timing.wall(contestants.for_table(case, "cpu"), seconds)
        groups = len(case.corners)
        print(
            f"{case.batch:5d}  {case.shape!s:15s} {groups} group{'s' if groups > 1 else ' '}"
            f" {t['conv2d']:10.0f} us {t['inverse']:10.0f} us"
            f"  {t['inverse'] / t['conv2d']:6.2f}x {t['forward'] / t['conv2d']:6.2f}x"
            f" {t['inverse_backward'] / t['conv2d_backward']:13.2f}x"
            f" {t['forward_backward'] / t['conv2d_backward']:13.2f}x",
            flush=True,
        )
        rows.append({**case._asdict(), "microseconds": t})
    return rows


def _curve(title: str, cases: list[Case], seconds: float) -> list[dict]:
    """Prints the time per pixel, which is constant if the cost is linear."""
    print(f"\n{title}\n")
    print("batch  (C, H, W)           inverse       a pixel   F.conv2d")
    rows = []
    for case in cases:
        t = timing.wall(contestants.for_curve(case, "cpu")[0], seconds)
        pixels = case.batch * case.shape[1] * case.shape[2]
        print(
            f"{case.batch:5d}  {case.shape!s:15s} {t['inverse']:10.0f} us {1e3 * t['inverse'] / pixels:9.1f} ns"
            f" {1e3 * t['conv2d'] / pixels:7.1f} ns",
            flush=True,
        )
        rows.append({**case._asdict(), "microseconds": t})
    return rows


def _inverses(title: str, cases: list[InverseCase], seconds: float) -> list[dict]:
    """Also prints times per multiply-add, to compare stencils with different numbers of taps."""
    print(f"\n{title}, float32; the ratio is to torch's own convolution of the same layer\n")
    print("batch  (C, ...)             corners                    conv     inverse         a multiply-add")
    rows = []
    for case in cases:
        t = timing.wall(contestants.for_inverse(case), seconds)
        picoseconds = 1e6 * t["inverse"] / contestants.multiply_adds(case)
        names = ",".join(case.corners[:4]) + ",..." * (len(case.corners) > 4)
        print(
            f"{case.batch:5d}  {case.shape!s:20s} {names:18s} {t['conv']:10.0f} us {t['inverse']:10.0f} us"
            f" {t['inverse'] / t['conv']:5.2f}x {picoseconds:6.1f} ps",
            flush=True,
        )
        rows.append({**case._asdict(), "microseconds": t})
    return rows
