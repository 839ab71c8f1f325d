"""What is measured: batches of images, tables and curves of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, int, int]  # (C, H, W)
FOUR, ONE = ("TL", "TR", "BL", "BR"), ("TL",)
PAPER_SHAPES: list[Shape] = [(12, 16, 16), (24, 8, 8), (48, 4, 4), (12, 32, 32), (24, 16, 16), (48, 8, 8)]


class Case(NamedTuple):
    """A batch of images and the corners of a 3 x 3 layer for it."""

    batch: int
    shape: Shape
    corners: tuple[str, ...] = FOUR


@dataclass(frozen=True)
class Workload:
    """All that one run measures.

    Attributes:
        tables: Cases by the name of their table; each row has all contestants.
        curves: Cases along one axis by the axis's name; each point has few contestants.
        copied_bytes: Size of the tensor whose copy gives the copy bandwidth.
        matrix_size: Of the product that gives the float32 rate.
        chain_lengths: Widths of the two images whose difference in time gives the latency of a step.
        tiny: Whether the sizes are too small for the times to mean anything.
    """

    tables: dict[str, list[Case]]
    curves: dict[str, list[Case]]
    copied_bytes: int = 2**29
    matrix_size: int = 8192
    chain_lengths: tuple[int, int] = (1024, 4096)
    tiny: bool = False


_WIDE_SHAPES: list[Shape] = [(128, 16, 16), (64, 32, 32)]
_SIDES = [Case(1, (12, side, side)) for side in (8, 16, 32, 64, 128, 256, 512)]
_BATCHES = [Case(2**power, (12, 16, 16)) for power in range(11)]
_CHANNELS = [Case(100, (channels, 16, 16)) for channels in (4, 8, 16, 32, 64, 128, 256, 512)]


def _cpu_table(corners: tuple[str, ...]) -> list[Case]:
    return (
        [Case(100, shape, corners) for shape in PAPER_SHAPES]
        + [Case(32, shape, corners) for shape in _WIDE_SHAPES]
        + [Case(1, shape, corners) for shape in PAPER_SHAPES + _WIDE_SHAPES]
    )


CPU = Workload(
    tables={"four groups": _cpu_table(FOUR), "one group": _cpu_table(ONE)},
    curves={"image side": _SIDES, "batch": _BATCHES},
)
CUDA = Workload(
    tables={
        "four groups": [Case(100, shape) for shape in [*PAPER_SHAPES, (12, 64, 64)]]
        + [Case(1, (12, side, side)) for side in (16, 64, 256)],
        "one group": [Case(100, shape, ONE) for shape in PAPER_SHAPES],
        "many channels": [
            Case(100, (channels, 16, 16), corners) for corners in (ONE, FOUR) for channels in (64, 128, 256, 512)
        ],
    },
    curves={"image side": _SIDES, "channels": _CHANNELS, "batch": _BATCHES},
)


def tiny(workload: Workload) -> Workload:
    """The same tables and curves at sizes that tell whether the benchmark works, and nothing about speed."""
    return Workload(
        tables={name: [Case(2, (4, 3, 5), cases[-1].corners)] for name, cases in workload.tables.items()},
        curves={name: [Case(2, (4, side, side)) for side in (2, 3)] for name in workload.curves},
        copied_bytes=2**20,
        matrix_size=64,
        chain_lengths=(8, 64),
        tiny=True,
    )
