"""Plans csrc/cuda/weight_gradient.cu: how thread blocks share the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from nflows_kconv.backends.cuda.plan import Device, Launch, LaunchPlan, ProblemSpec, arguments, ceil_div, kernel
from nflows_kconv.backends.cuda.tiling import MAX_THREADS, SHARED_MEMORY, evenly

_SCRATCH = 32 * 2**20
_PIXELS = 4  # pixels that a thread processes at a time
_MAX_SEGMENTS = 8  # segments of this many pixels in a row of a tile
_SUMS = 75  # 32-bit registers for a thread's sums: with their operands, 512 threads fit a multiprocessor
_CHANNELS = 64  # channels of x, and of g, in a block, which leaves shared memory for pixels
_UNITS = 128  # threads of a block with different sums
_REDUCTION_THREADS = 256

# Blocks per multiprocessor if each then has enough tiles to copy one while it sums another.
_MOST_BLOCKS = 4
_TILES_OF_A_CHUNK = 1.5


def plan_weight_gradient(problem: ProblemSpec, device: Device) -> LaunchPlan:
    """Plans the launches of the weight gradient: sums over chunks of pixels, then over the chunks."""
    chosen = _choose(problem.typical, device)
    tiles = replace(chosen, sums=_Sums(problem))
    # None empty, and the sums of the real number of groups fit.
    tiles = replace(tiles, chunks=min(chosen.chunks, tiles.count, max(1, _SCRATCH // tiles.sums.bytes)))
    return LaunchPlan(tiles.launches(parts=8 if chosen.chunks >= 16 else 1), tiles.chunks * tiles.sums.bytes)


def _choose(problem: ProblemSpec, device: Device) -> _Tiles:
    """Chooses as many sums as registers hold, as many pixels per tile as fit, and tiles for all multiprocessors.

    The numbers above are predictions from a model of a multiprocessor, not measurements.
    """
    sums = _Sums(problem)
    batch, _, height, width = problem.shape
    columns = _PIXELS * evenly(ceil_div(width, _PIXELS), _MAX_SEGMENTS)

    def too_large(tiles: _Tiles) -> bool:
        return tiles.shared > SHARED_MEMORY or tiles.count * sums.blocks < device.multiprocessors

    tiles = _Tiles(sums, splits=1, images=2 ** (batch.bit_length() - 1), rows=height, columns=columns, chunks=1)
    while tiles.images > 1 and too_large(tiles):
        tiles = replace(tiles, images=tiles.images // 2)
    while tiles.rows > 1 and too_large(tiles):
        tiles = replace(tiles, rows=ceil_div(tiles.rows, 2))
    while tiles.shared > SHARED_MEMORY:
        tiles = replace(tiles, columns=_PIXELS * ceil_div(tiles.columns // _PIXELS, 2))

    blocks = _MOST_BLOCKS
    while blocks > 1 and blocks * device.multiprocessors * _TILES_OF_A_CHUNK > tiles.count * sums.blocks:
        blocks //= 2
    chunks = min(blocks * device.multiprocessors // sums.blocks, _SCRATCH // sums.bytes, tiles.count)
    threads = min(MAX_THREADS, 2 * MAX_THREADS // blocks)
    segments = tiles.images * tiles.rows * tiles.columns // _PIXELS
    splits = 2 ** (min(max(1, threads // sums.units), segments).bit_length() - 1)
    tiles = replace(tiles, chunks=max(1, chunks), splits=splits)
    while not tiles.round_outputs:
        tiles = replace(tiles, splits=tiles.splits // 2)
    return tiles


@dataclass(frozen=True)
class _Sums:
    """The sums of a thread and of a block."""

    problem: ProblemSpec

    @cached_property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the kernel in one thread."""
        rows, columns = self.problem.taps
        return evenly(rows, 5), evenly(columns, 5)

    @cached_property
    def outputs(self) -> int:
        """Output channels of one thread; one load of x serves all of them."""
        most = self._most_sums // (self.taps[0] * self.taps[1])
        return evenly(self.problem.channels, max(1, min(8, most)))

    @cached_property
    def inputs(self) -> int:
        """Input channels of one thread: several if the kernel is small."""
        most = self._most_sums // (self.outputs * self.taps[0] * self.taps[1])
        return next(inputs for inputs in (4, 2, 1) if inputs <= max(1, most) and self.problem.channels % inputs == 0)

    @property
    def _most_sums(self) -> int:
        return _SUMS * 4 // self.problem.accumulator_bytes

    @cached_property
    def input_slots(self) -> int:
        """Neighbouring threads along the input channels."""
        most = min(16, _CHANNELS // self.inputs)
        return evenly(ceil_div(self.problem.channels, self.inputs), most)

    @cached_property
    def output_slots(self) -> int:
        """Neighbouring threads along the output channels."""
        most = min(_UNITS // self.input_slots, _CHANNELS // self.outputs)
        return evenly(ceil_div(self.problem.channels, self.outputs), most)

    @cached_property
    def units(self) -> int:
        """Threads of a block that share no partial sum."""
        return self.input_slots * self.output_slots

    @cached_property
    def blocks(self) -> int:
        """Blocks that share no partial sum."""
        channels, (rows, columns) = self.problem.channels, self.problem.taps
        channel_tiles = ceil_div(channels, self.inputs * self.input_slots) * ceil_div(
            channels, self.outputs * self.output_slots
        )
        tap_tiles = ceil_div(rows, self.taps[0]) * ceil_div(columns, self.taps[1])
        return len(self.problem.stencils) * channel_tiles * tap_tiles

    @cached_property
    def terms(self) -> int:
        """Sums of a thread for each of its outputs."""
        return self.inputs * self.taps[0] * self.taps[1]

    @cached_property
    def bytes(self) -> int:
        """Bytes of all partial sums of one chunk."""
        channels, (rows, columns) = self.problem.channels, self.problem.taps
        return len(self.problem.stencils) * channels**2 * rows * columns * self.problem.accumulator_bytes


@dataclass(frozen=True)
class _Tiles:
    """One way to divide the pixels: into chunks, tiles of a chunk, and threads that split a tile."""

    sums: _Sums
    splits: int
    images: int
    rows: int
    columns: int
    chunks: int

    @cached_property
    def threads(self) -> int:
        """Threads of one block."""
        return self.sums.units * self.splits

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Tiles down and across an image."""
        _, _, height, width = self.sums.problem.shape
        return ceil_div(height, self.rows), ceil_div(width, self.columns)

    @cached_property
    def count(self) -> int:
        """Tiles of the batch."""
        return ceil_div(self.sums.problem.shape[0], self.images) * self.grid[0] * self.grid[1]

    @cached_property
    def layout(self) -> dict[str, int]:
        """The constants of the kernel for one tile in shared memory."""
        rows, columns = self.sums.taps
        pitch = ceil_div(columns - 1, _PIXELS) * _PIXELS + self.columns  # whole vectors left of the tile
        x = self._channel_pitch(self.images * (self.rows + rows - 1) * pitch)
        g = self._channel_pitch(self.images * self.rows * self.columns)
        stage = self.sums.inputs * self.sums.input_slots * x + self.sums.outputs * self.sums.output_slots * g
        return dict(PITCH=pitch, INPUT_PITCH=x, OUTPUT_PITCH=g, STAGE=stage)

    def _channel_pitch(self, values: int) -> int:
        """Returns an odd number of vectors: neighbouring threads read neighbouring channels from different banks."""
        vector = 16 // self.sums.problem.accumulator_bytes
        return (values // vector | 1) * vector

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory for a tile and the next one."""
        return 2 * self.layout["STAGE"] * self.sums.problem.accumulator_bytes

    @cached_property
    def round_outputs(self) -> int:
        """Outputs whose sums the splits add up at a time; 0 if not even one fits."""
        return min(self.sums.outputs, SHARED_MEMORY // self._round_bytes) if self.splits > 1 else self.sums.outputs

    @property
    def _round_bytes(self) -> int:
        return self.threads * self.sums.terms * self.sums.problem.accumulator_bytes

    def launches(self, parts: int) -> tuple[Launch, ...]:
        """Returns the launches that sum over each chunk and over the chunks, with `parts` threads per entry."""
        problem, sums = self.sums.problem, self.sums
        split_bytes = self.round_outputs * self._round_bytes if self.splits > 1 else 0
        thread = dict(OUTPUTS=sums.outputs, INPUTS=sums.inputs, TAPS_H=sums.taps[0], TAPS_W=sums.taps[1])
        block = dict(OUTPUT_SLOTS=sums.output_slots, INPUT_SLOTS=sums.input_slots, SPLITS=self.splits)
        tile = dict(
            IMAGES=self.images, ROWS=self.rows, COLUMNS=self.columns, WIDTH_REMAINDER=problem.shape[3] % _PIXELS
        )
        grid = dict(ROW_TILES=self.grid[0], COLUMN_TILES=self.grid[1])
        end = dict(ROUND_OUTPUTS=self.round_outputs, PARTS=parts, REDUCTION_THREADS=_REDUCTION_THREADS)
        constants = thread | block | tile | grid | end | self.layout
        packed = arguments(problem, [self.chunks])
        entries = problem.shape[1] * problem.channels * problem.kernel_size[0] * problem.kernel_size[1]
        return (
            Launch(
                kernel(problem, "weight_gradient.cu", "weight_gradient_parts", **constants),
                (sums.blocks * self.chunks, 1, 1),
                self.threads,
                max(self.shared, split_bytes),
                packed,
            ),
            Launch(
                kernel(problem, "weight_gradient.cu", "weight_gradient", **constants),
                (ceil_div(entries * parts, _REDUCTION_THREADS), 1, 1),
                _REDUCTION_THREADS,
                _REDUCTION_THREADS * problem.accumulator_bytes,
                packed,
            ),
        )
