"""How csrc/cuda/convolution.cu is cut into thread blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from nflows_kconv.backends.cuda.plan import Device, Launch, Plan, Problem, arguments, ceil_div, kernel
from nflows_kconv.backends.cuda.tiling import MAX_THREADS, SHARED_MEMORY, evenly

_MAX_COLUMNS = 32
_MAX_TAPS = 8  # kernel rows, or columns, of a stage

# Rough costs in cycles, to compare plans with each other; estimates, not measured.
_STAGE = 800  # a trip to memory and a barrier
_STEP = 15  # the latency of shared memory that one input channel and kernel column leave open
_COPY = 15  # instructions to copy one value to shared memory


def plan_convolution(problem: Problem, device: Device) -> Plan:
    """The launch for y = A x or y = A^T x: of the ways to cut it that fit, the one that should take least time."""
    return Plan((replace(_best(problem.typical, device), problem=problem).launch(),))


@lru_cache(1024)
def _best(problem: Problem, device: Device) -> _Tiles:
    return min(_candidates(problem), key=lambda tiles: tiles.cycles(device))


@dataclass(frozen=True)
class _Tiles:
    """One way to cut a problem; the fields are the constants of the kernel."""

    problem: Problem
    outputs: int
    pixels: int
    output_slots: int
    splits: int
    images: int
    row_slots: int
    columns: int

    @cached_property
    def rows(self) -> int:
        """Of pixels in a block."""
        return self.row_slots * self.pixels

    @cached_property
    def threads(self) -> int:
        """Of a block."""
        return self.images * self.row_slots * self.columns * self.output_slots * self.splits

    @cached_property
    def blocks(self) -> int:
        """Of the launch."""
        output_tiles = ceil_div(self.problem.channels, self.outputs * self.output_slots)
        image_tiles = ceil_div(self.problem.shape[0], self.images)
        return len(self.problem.stencils) * output_tiles * image_tiles * self.pixel_tiles[0] * self.pixel_tiles[1]

    @cached_property
    def pixel_tiles(self) -> tuple[int, int]:
        """Tiles down and across an image."""
        _, _, height, width = self.problem.shape
        return ceil_div(height, self.rows), ceil_div(width, self.columns)

    @cached_property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the kernel in one stage."""
        rows, columns = self.problem.taps
        return evenly(rows, _MAX_TAPS), evenly(columns, _MAX_TAPS)

    @cached_property
    def tap_tiles(self) -> int:
        """Stages that one input channel takes part in."""
        rows, columns = self.problem.taps
        return ceil_div(rows, self.taps[0]) * ceil_div(columns, self.taps[1])

    @cached_property
    def slot_weights(self) -> int:
        """Values that hold a thread's weights of one tap, in whole vectors."""
        return ceil_div(self.outputs, self.vector) * self.vector

    @cached_property
    def vector(self) -> int:
        """Values that one instruction loads of these."""
        return self.outputs if self.outputs <= 2 else 16 // self.problem.accumulator_bytes

    @cached_property
    def pitch(self) -> int:
        """Values from one row of the tile to the next: few lanes of a warp may meet in a bank of shared memory."""
        lanes = range(min(32, self.images * self.row_slots * self.columns))
        tile_rows = self.rows + self.taps[0] - 1

        def most_lanes_in_a_bank(pitch: int) -> int:
            banks = []
            for lane in lanes:
                line, column = divmod(lane, self.columns)
                image, slot = divmod(line, self.row_slots)
                banks.append(((image * tile_rows + slot * self.pixels) * pitch + column) % 32)
            return max(map(banks.count, banks))

        return min(range(self._least_pitch, self._least_pitch + 8), key=most_lanes_in_a_bank)

    @cached_property
    def _least_pitch(self) -> int:
        return self.columns + self.taps[1] - 1

    def _channel_values(self, pitch: int) -> int:
        """In shared memory, for one input channel of one stage."""
        tap_weights = (self.output_slots * self.slot_weights // self.vector | 1) * self.vector
        return self.taps[0] * self.taps[1] * tap_weights + self.images * (self.rows + self.taps[0] - 1) * pitch

    @cached_property
    def chunk(self) -> int:
        """Input channels of a stage: all, or two stages at a time, as many as fit; 0 where none fits."""
        values = self._channel_values(self._least_pitch + 7)
        fitting = (SHARED_MEMORY // self.problem.accumulator_bytes - 8) // values
        if self.tap_tiles > 1 or fitting < self.problem.channels:
            fitting //= 2
        return evenly(self.problem.channels, fitting) if fitting else 0

    @cached_property
    def stages(self) -> int:
        """How often a block waits for memory."""
        return ceil_div(self.problem.channels, self.chunk) * self.tap_tiles

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        stage = ceil_div(self.chunk * self._channel_values(self.pitch), 4) * 4 + 4
        return max(stage * min(2, self.stages), self._split_values) * self.problem.accumulator_bytes

    @property
    def _split_values(self) -> int:
        return self.threads * self.outputs * self.pixels if self.splits > 1 else 0

    @property
    def fits(self) -> bool:
        """Whether a block has the shared memory that it needs."""
        return self.chunk > 0 and self._split_values * self.problem.accumulator_bytes <= SHARED_MEMORY

    def cycles(self, device: Device) -> float:
        """The estimated time: of a block alone on a multiprocessor, and of all that a multiprocessor must do.

        A multiprocessor issues four instructions a cycle, of which one may go to shared memory; each is 32 lanes wide
        for float32, half as wide for float64.
        """
        words = self.problem.accumulator_bytes // 4
        steps = self.stages * ceil_div(self.chunk, self.splits) * self.taps[1]  # of one thread
        products = steps * self.taps[0] * self.outputs * self.pixels
        weight_loads = self.taps[0] * ceil_div(self.slot_weights, self.vector)
        loads = steps * (self.pixels + self.taps[0] - 1 + weight_loads)
        copies = self.stages * self.chunk * self._channel_values(self._least_pitch)
        block = ceil_div(self.threads, 32) * max(products * words / 4, loads * words) + copies * _COPY / 128
        alone = self.stages * _STAGE + copies * _COPY / self.threads + steps * _STEP + (products + loads) * words
        if self.splits > 1:
            alone += _STAGE / 2 + 2 * self.outputs * self.pixels * words
        return alone + ceil_div(self.blocks, device.multiprocessors) * block

    def launch(self) -> Launch:
        """The launch that cuts the problem so."""
        constants = {
            "OUTPUTS": self.outputs,
            "PIXELS": self.pixels,
            "TILE_OUTPUTS": self.outputs * self.output_slots,
            "SPLITS": self.splits,
            "IMAGES": self.images,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "ROW_TILES": self.pixel_tiles[0],
            "COLUMN_TILES": self.pixel_tiles[1],
            "PITCH": self.pitch,
            "CHUNK": self.chunk,
            "TAPS_H": self.taps[0],
            "TAPS_W": self.taps[1],
            "BIAS": int(self.problem.bias),
        }
        return Launch(
            kernel(self.problem, "convolution.cu", "convolution", **constants),
            (self.blocks, 1, 1),
            self.threads,
            self.shared,
            arguments(self.problem),
        )


def _candidates(problem: Problem) -> Iterator[_Tiles]:
    batch, _, height, width = problem.shape
    columns = evenly(width, _MAX_COLUMNS)
    registers = 128 // problem.accumulator_bytes
    for pixels in (1, 2, 4):
        lines = ceil_div(height, pixels)
        for pixel_threads in (8, 16, 32, 64, 128, 256):
            row_slots = evenly(lines, max(1, pixel_threads // columns))
            # A block has a part of an image, or whole ones.
            images = min(batch, max(1, pixel_threads // (columns * row_slots))) if row_slots == lines else 1
            for outputs in (1, 2, 3, 4, 6, 8, 12, 16):
                if outputs > problem.channels or outputs * pixels > registers:
                    break
                for output_slots in (1, 2, 3, 4, 6, 8, 12, 16):
                    if (output_slots - 1) * outputs >= problem.channels:
                        break
                    for splits in (1, 2, 4, 8):
                        tiles = _Tiles(problem, outputs, pixels, output_slots, splits, images, row_slots, columns)
                        if splits > problem.channels or tiles.threads > MAX_THREADS:
                            break
                        if tiles.fits:
                            yield tiles
