"""Plans csrc/cuda/convolution.cu: how thread blocks share the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from nflows_kconv.backends.cuda.plan import Device, Launch, LaunchPlan, ProblemSpec, arguments, ceil_div, kernel
from nflows_kconv.backends.cuda.tiling import MAX_THREADS, SHARED_MEMORY, evenly

_MAX_COLUMNS = 32
_MAX_TAPS = 8  # kernel rows or columns per stage

# Channels and pixels that a thread sums, and how many such threads a multiprocessor should have. With fewer threads,
# the latency of each one's work counts, so less work per thread is better.
_SUMS = ((8, 4, 256), (4, 4, 256), (4, 2, 64), (2, 1, 0))
_SUM_BYTES = 128
# Threads that share input channels, to fill a multiprocessor; each should have some.
_SPLIT_THREADS = 384
_MAX_SPLITS = 4
_SPLIT_CHANNELS = 3
_PIXEL_THREADS = 128  # 8 to this many per block: x is copied once for all output channels of a block


def plan_convolution(problem: ProblemSpec, device: Device) -> LaunchPlan:
    """Plans the launch for y = A x or y = A^T x."""
    return LaunchPlan((replace(_choose(problem.typical, device), problem=problem).launch(),))


def _choose(problem: ProblemSpec, device: Device) -> _Tiles:
    """Chooses the tile of a thread. Larger tiles need fewer loads; more threads hide latency better.

    The numbers above are predictions from a model of a multiprocessor, not measurements.
    """
    channels, (batch, _, height, width) = problem.channels, problem.shape
    columns = evenly(width, _MAX_COLUMNS)
    across = ceil_div(width, columns) * columns
    splits = min(_MAX_SPLITS, 1 << max(1, channels // _SPLIT_CHANNELS).bit_length() - 1)
    for most_outputs, most_pixels, needed in _SUMS:
        outputs, pixels = evenly(channels, most_outputs), min(most_pixels, height)
        threads = batch * len(problem.stencils) * ceil_div(channels, outputs) * ceil_div(height, pixels) * across
        fits = most_outputs * most_pixels * problem.accumulator_bytes <= _SUM_BYTES
        if fits and threads * splits >= needed * device.multiprocessors:
            break
    while splits > 1 and threads * splits // 2 >= _SPLIT_THREADS * device.multiprocessors:
        splits //= 2
    block = MAX_THREADS
    while block > 32 and block * device.multiprocessors > threads * splits:
        block //= 2
    while not (tiles := _cut(problem, outputs, pixels, splits, block)).chunk:
        block //= 2
    return tiles


def _cut(problem: ProblemSpec, outputs: int, pixels: int, splits: int, threads: int) -> _Tiles:
    """Returns blocks of about `threads` threads: first all output channels, then part of an image or whole images."""
    columns, lines = evenly(problem.shape[3], _MAX_COLUMNS), ceil_div(problem.shape[2], pixels)
    slots = evenly(ceil_div(problem.channels, outputs), max(1, threads // (splits * max(8, columns))))
    pixel_threads = min(_PIXEL_THREADS, threads // (splits * slots))
    row_slots = evenly(lines, max(1, pixel_threads // columns))
    images = min(problem.shape[0], max(1, pixel_threads // (columns * row_slots))) if row_slots == lines else 1
    return _Tiles(problem, outputs, pixels, slots, splits, images, row_slots, columns)


@dataclass(frozen=True)
class _Tiles:
    """One way to divide a problem; the fields are the constants of the kernel."""

    problem: ProblemSpec
    outputs: int
    pixels: int
    output_slots: int
    splits: int
    images: int
    row_slots: int
    columns: int

    @cached_property
    def rows(self) -> int:
        """Rows of pixels in a block."""
        return self.row_slots * self.pixels

    @cached_property
    def threads(self) -> int:
        """Threads of one block."""
        return self.images * self.row_slots * self.columns * self.output_slots * self.splits

    @cached_property
    def blocks(self) -> int:
        """Thread blocks of the launch."""
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
    def tap_weights(self) -> int:
        """Values for the weights of one tap: an odd number of vectors, to spread writes over the banks."""
        return (self.output_slots * ceil_div(self.outputs, self.vector) | 1) * self.vector

    @cached_property
    def vector(self) -> int:
        """Values of these that one instruction loads."""
        return self.outputs if self.outputs <= 2 else 16 // self.problem.accumulator_bytes

    @cached_property
    def pitch(self) -> int:
        """Values from one row of the tile to the next, chosen for few bank conflicts in shared memory."""
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
        """Returns the values of one input channel in one stage's shared memory."""
        return self.taps[0] * self.taps[1] * self.tap_weights + self._plane(pitch)

    def _plane(self, pitch: int) -> int:
        return self.images * (self.rows + self.taps[0] - 1) * pitch

    @cached_property
    def chunk(self) -> int:
        """Input channels of a stage: all if they fit, else as many as fit twice, for two buffers; 0 if none fits."""
        values = self._channel_values(self._least_pitch + 7)
        fitting = (SHARED_MEMORY // self.problem.accumulator_bytes - 8) // values
        if self.tap_tiles > 1 or fitting < self.problem.channels:
            fitting //= 2
        return evenly(self.problem.channels, fitting) if fitting else 0

    @cached_property
    def stages(self) -> int:
        """Stages of a block, each of which waits for memory once."""
        return ceil_div(self.problem.channels, self.chunk) * self.tap_tiles

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return max(self.stage * min(2, self.stages), self._split_values) * self.problem.accumulator_bytes

    @cached_property
    def stage(self) -> int:
        """Values of a stage in shared memory."""
        weights = self.chunk * self.taps[0] * self.taps[1] * self.tap_weights
        return weights + ceil_div(self.chunk * self._plane(self.pitch), 4) * 4

    @property
    def _split_values(self) -> int:
        return self.threads * self.outputs * self.pixels if self.splits > 1 else 0

    def launch(self) -> Launch:
        """Returns the launch of this division."""
        tile = dict(
            TILE_OUTPUTS=self.outputs * self.output_slots, IMAGES=self.images, ROWS=self.rows, COLUMNS=self.columns
        )
        grid = dict(ROW_TILES=self.pixel_tiles[0], COLUMN_TILES=self.pixel_tiles[1])
        stage = dict(PITCH=self.pitch, CHUNK=self.chunk, TAPS_H=self.taps[0], TAPS_W=self.taps[1], STAGE=self.stage)
        thread = dict(
            VECTOR=self.vector,
            TAP_WEIGHTS=self.tap_weights,
            OUTPUTS=self.outputs,
            PIXELS=self.pixels,
            SPLITS=self.splits,
            BIAS=int(self.problem.bias),
        )
        return Launch(
            kernel(self.problem, "convolution.cu", "convolution", **tile, **grid, **stage, **thread),
            (self.blocks, 1, 1),
            self.threads,
            self.shared,
            arguments(self.problem),
        )
