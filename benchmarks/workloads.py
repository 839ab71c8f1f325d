"""The measured workloads: batches of images, in tables and curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Shape = tuple[int, int, int]  # (C, H, W)
FOUR, ONE = ("TL", "TR", "BL", "BR"), ("TL",)
EIGHT = ("NTL", "NTR", "NBL", "NBR", "FTL", "FTR", "FBL", "FBR")
PAPER_SHAPES: list[Shape] = [(12, 16, 16), (24, 8, 8), (48, 4, 4), (12, 32, 32), (24, 16, 16), (48, 8, 8)]


class Case(NamedTuple):
    """A batch of images and the corners of a 3 x 3 layer for it."""

    batch: int
    shape: Shape
    corners: tuple[str, ...] = FOUR


class InverseCase(NamedTuple):
    """A batch of images of one to three dimensions, and the layer whose inverse is measured.

    Attributes:
        batch: Number of images.
        shape: (C, ...) of an image.
        corners: Corners of the layer.
        kernel_size: Kernel size of the layer, one number per axis.
        dilation: Dilation of all axes.
    """

    batch: int
    shape: tuple[int, ...]
    corners: tuple[str, ...]
    kernel_size: tuple[int, ...] = (3, 3)
    dilation: int = 1


@dataclass(frozen=True)
class Workload:
    """Everything that one run measures.

    Attributes:
        tables: Cases by table; each row has all contestants.
        curves: Cases along one axis by the name of the axis; each point has few contestants.
        inverses: Cases of any stencil, dimension and dilation by table.
        copied_bytes: Size of the tensor whose copy measures the bandwidth.
        matrix_size: Size of the product that measures the float32 rate.
        chain_lengths: Widths of the two images whose difference in time measures the latency of a step.
        tiny: Whether the sizes are too small for meaningful times.
    """

    tables: dict[str, list[Case]]
    curves: dict[str, list[Case]]
    inverses: dict[str, list[InverseCase]] = field(default_factory=dict)
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
    inverses={
        # About as many taps: 12 for the corners, 13 for the sides.
        "corners and sides": [
            InverseCase(100, shape, corners, kernel_size)
            for shape in PAPER_SHAPES
            for corners, kernel_size in ((FOUR, (3, 4)), (("T", "B") * 2, (3, 5)), (("L", "R") * 2, (5, 3)))
        ],
        "one and three dimensions": [
            InverseCase(16, (16, 16384), ("L", "R"), (3,)),
            InverseCase(1, (16, 16384), ("L", "R"), (3,)),
            InverseCase(8, (16, 16, 16, 16), EIGHT, (3, 3, 3)),
        ],
        "dilation 2": [InverseCase(100, shape, FOUR, dilation=2) for shape in PAPER_SHAPES],
        "one image, one group": [
            InverseCase(1, shape, ONE) for shape in ((48, 4, 4), (48, 8, 8), (64, 32, 32), (128, 16, 16))
        ],
        "many channels, one group": [
            InverseCase(batch, (channels, side, side), ONE)
            for channels in (512, 1024)
            for side in (8, 16)
            for batch in (8, 100)
        ],
    },
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
    """Returns the same tables and curves at sizes that only test whether the benchmark works."""
    return Workload(
        tables={name: [Case(2, (4, 3, 5), cases[-1].corners)] for name, cases in workload.tables.items()},
        curves={name: [Case(2, (4, side, side)) for side in (2, 3)] for name in workload.curves},
        inverses={
            name: [case._replace(batch=2, shape=(2 * len(case.corners), 4, 5, 3)[: len(case.shape)]) for case in cases]
            for name, cases in workload.inverses.items()
        },
        copied_bytes=2**20,
        matrix_size=64,
        chain_lengths=(8, 64),
        tiny=True,
    )
