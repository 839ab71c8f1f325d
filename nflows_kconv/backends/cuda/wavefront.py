"""Plans of the solvers: two of one thread block a band of rows, one anti-diagonal a step, and one of tiles of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nflows_kconv.backends.cuda.plan import (
    Device,
    Launch,
    LaunchPlan,
    ProblemSpec,
    aligned,
    arguments,
    ceil_div,
    kernel,
)

# 32-bit registers of weights per thread in each kernel. A thread has at most 255, a multiprocessor 65536; with more
# weights, sums and addresses spill to memory.
_ROW_WEIGHTS = 112
_CHANNEL_WEIGHTS = 144
_ROW_CHANNELS = 16
_OTHER_REGISTERS = 36  # plus 20 words of the type of the sums
_BANDED_REGISTERS = 40  # more if an image has several bands of rows, whose addresses are not constant in a block
_REGISTERS = 65536

# Steps of y to copy into shared memory at a time if an image does not fit, the best first; multiples of 4.
_CHUNKS = (32, 16, 12, 8)

# Rows per band in each kernel if the device has room for several bands at once. With few channels more rows do not
# lengthen a step, but lengthen the wait for the band above.
_ROW_BAND, _CHANNEL_BAND = 128, 32

# Of a tile of solve_tiles.cu. With more pixels fewer tiles run at once, and each is longer on its way.
_TILE_THREADS, _TILE_PIXELS, _TILE_OUTPUTS = 128, 32, 64

_PLACE_BYTES = _TICKET_BYTES = _PIXEL_BYTES = 16  # of structures in shared memory
_RESERVED_SHARED_MEMORY = 1024  # that the system reserves per thread block


def plan_rows(problem: ProblemSpec, device: Device) -> LaunchPlan | None:
    """Plans solve_rows.cu, one thread per row and output channel; None if the weights do not fit in registers."""
    columns, pivot = problem.taps[0] * problem.taps[1] * problem.channels, problem.channels**2
    column = columns * problem.accumulator_bytes // 4  # registers per output
    if column > _ROW_WEIGHTS or problem.channels > _ROW_CHANNELS:
        return None
    most_threads = _most_threads(column, problem)
    rows = problem.shape[2]
    if rows > most_threads // problem.channels:
        rows = _most_threads(column + _BANDED_REGISTERS, problem) // problem.channels
    rows = _narrowed(rows, _ROW_BAND, problem.typical, device)
    most_blocks = max(1, most_threads // _row_threads(problem, rows))
    premultiplied = (pivot + columns * problem.channels) * problem.accumulator_bytes
    band = _fitted_band(problem.typical, device, rows, premultiplied, most_blocks)
    if band is None:
        return None
    threads = _row_threads(problem, band.rows)
    blocks = max(1, min(ceil_div(band.count, device.multiprocessors), most_threads // threads))
    band = replace(band, problem=problem)
    constants = band.constants | {"THREADS": threads, "BLOCKS": blocks, "PIVOT": pivot}
    launch = Launch(
        kernel(problem, "solve_rows.cu", "solve_rows", **constants),
        (band.count, 1, 1),
        threads,
        band.shared,
        arguments(problem, offsets=band.offsets),
    )
    return LaunchPlan((launch,), band.scratch, band.counters)


def plan_channels(problem: ProblemSpec, device: Device) -> LaunchPlan | None:
    """Plans solve_channels.cu, with the weights spread over a block's registers; None if they do not fit."""
    vector = 16 // problem.accumulator_bytes
    reads = problem.taps[0] * problem.taps[1] * ceil_div(problem.channels, vector)
    padded = 4 * ceil_div(problem.channels, 4)
    fitting = []
    for slices in (4, 8, 16, 32):
        each = ceil_div(reads, slices)  # vectors per thread
        threads = 32 * ceil_div(slices * padded // 4, 32)  # per replica
        if 16 * each <= _CHANNEL_WEIGHTS and threads <= _most_threads(16 * each, problem):
            # Work per pixel: adding up the lanes' sums takes as long as a vector.
            fitting.append((threads * (each + 1), slices, each, threads))
    if not fitting:
        return None
    _, slices, each, threads = min(fitting)
    most_blocks = _most_threads(16 * each, problem) // threads
    rows = _narrowed(problem.shape[2], _CHANNEL_BAND, problem.typical, device)
    band = _fitted_band(problem.typical, device, rows, 0, most_blocks)
    if band is None:
        return None
    # Replicas in separate blocks do as much and leave no multiprocessor waiting for the last blocks.
    replicas = min(_most_threads(16 * each, problem) // threads, band.rows)
    blocks = min(ceil_div(band.count, device.multiprocessors), band.most_resident(device), replicas)
    # With more replicas than this, each would have as many pairs of rows.
    replicas = ceil_div(band.rows, 2 * ceil_div(band.rows, 2 * (replicas // blocks)))
    band = replace(band, problem=problem)
    offset = aligned(band.scratch)
    preparation, size = _premultiplication(problem, offset, padded, ceil_div(problem.channels, vector))
    constants = band.constants | {
        "THREADS": threads * replicas,
        "SLICES": slices,
        "VECTORS_EACH": each,
        "REPLICAS": replicas,
        "BLOCKS": blocks,
        "PADDED": padded,
    }
    launch = Launch(
        kernel(problem, "solve_channels.cu", "solve_channels", **constants),
        (band.count, 1, 1),
        threads * replicas,
        band.shared,
        arguments(problem, offsets=(*band.offsets, offset)),
    )
    return LaunchPlan((preparation, launch), offset + size, band.counters)


def plan_tiles(problem: ProblemSpec, device: Device) -> LaunchPlan | None:
    """Plans solve_tiles.cu, tiles of pixels and outputs. None where `products` has less to do or better units."""
    batch, height, width = problem.shape[0], *problem.shape[2:]
    # float64 has units for matrices, which cuBLAS uses; more channels than this premultiply would spill.
    if problem.accumulator_bytes != 4 or not 32 <= problem.channels <= 512:
        return None
    groups, slices = len(problem.stencils), ceil_div(problem.channels, _TILE_OUTPUTS)
    padded, longest = slices * _TILE_OUTPUTS, min(height, width)
    # Diagonals of so few rows would leave half of the multiprocessors without a tile, so theirs have half the pixels.
    narrow = device.multiprocessors // 2 // (groups * slices) * _TILE_PIXELS // batch
    tiles = ceil_div(batch * max(longest, 2 * min(longest, narrow)), _TILE_PIXELS)
    grid = (height + width - 1) * groups * tiles * slices
    counters = aligned(4 * (1 + grid))
    preparation, size = _premultiplication(problem, counters, padded, padded // 4)
    places = batch * groups * (height + problem.taps[0] - 1) * (width + problem.taps[1] - 1)
    given = counters + aligned(size)
    solved = given + aligned(places * padded * 4)
    pitch = _TILE_OUTPUTS + 4  # a vector more spreads rows over the banks
    stage = (_TILE_PIXELS + _TILE_OUTPUTS) * pitch
    before = _TICKET_BYTES + _TILE_PIXELS * _PIXEL_BYTES
    layout = dict(PITCH=pitch, STAGE=stage, TICKET_BYTES=_TICKET_BYTES, TILE_BYTES=before)
    tile = dict(THREADS=_TILE_THREADS, BLOCKS=3, PIXELS=_TILE_PIXELS, OUTPUTS=_TILE_OUTPUTS, PADDED=padded)
    constants = dict(GROUPS=_groups(problem), BIAS=int(problem.bias), **layout, **tile)
    packed = arguments(problem, (tiles, narrow), (0, counters, given, solved))
    shared = before + 2 * 4 * stage
    # A third block would only take time from those of a diagonal that others wait for.
    if groups * tiles * slices <= device.multiprocessors:
        shared = max(shared, device.shared_memory // 3)
    arranging = ceil_div(8 * ceil_div(places, 8) * padded // 4, _TILE_THREADS)
    arrange, solve = (kernel(problem, "solve_tiles.cu", name, **constants) for name in ("arrange", "solve_tiles"))
    first = Launch(arrange, (arranging, 1, 1), _TILE_THREADS, 0, packed)
    second = Launch(solve, (grid, 1, 1), _TILE_THREADS, shared, packed)
    return LaunchPlan((preparation, first, second), 2 * solved - given, counters)


def _premultiplication(problem: ProblemSpec, offset: int, padded: int, vectors: int) -> tuple[Launch, int]:
    """Returns the launch of prepare.cu, with `padded` outputs and `vectors` of inputs at `offset`, and their bytes."""
    channels = problem.channels
    # With 512 channels at 3 x 3 these are 128 blocks, one of which fills the registers of a multiprocessor.
    threads, columns, panel = (288, 4, 32) if channels > 64 else (256, 1, channels)
    products = problem.taps[0] * problem.taps[1] * vectors * 16 // problem.accumulator_bytes
    pitch = channels | 1  # odd, so neighbouring columns fall into different banks
    constants = dict(PADDED=padded, VECTORS=vectors, THREADS=threads, COLUMNS=columns, PANEL=panel, PITCH=pitch)
    launch = Launch(
        kernel(problem, "prepare.cu", "premultiply", **constants),
        (len(problem.stencils) * ceil_div(products, threads // 32 * columns), 1, 1),
        threads,
        pitch * panel * problem.accumulator_bytes,
        arguments(problem, offsets=(offset,)),
    )
    return launch, len(problem.stencils) * products * padded * problem.accumulator_bytes


@dataclass(frozen=True)
class _Band:
    """How band.cuh divides the image: bands of `rows` rows, chunks of `steps` steps, `shared` bytes of memory."""

    problem: ProblemSpec
    rows: int
    steps: int
    layout: dict[str, int]
    shared: int

    @property
    def count(self) -> int:
        """Bands of all images and groups."""
        return self._bands * self.problem.shape[0] * len(self.problem.stencils)

    @property
    def constants(self) -> dict[str, int | str]:
        chunked = self._bands > 1 or self.steps < _times(self.problem)
        return {
            "GROUPS": _groups(self.problem),
            "ROWS": self.rows,
            "STEPS": self.steps,
            "CHUNKED": int(chunked),
            "BANDED": int(self._bands > 1),
            "BIAS": int(self.problem.bias),
            **self.layout,
        }

    @property
    def counters(self) -> int:
        """Bytes of the ticket and of one counter per band; 0 if bands do not wait for each other."""
        return aligned(4 * (1 + self.count)) if self._bands > 1 else 0

    @property
    def scratch(self) -> int:
        """Bytes of the counters and of the rows that bands pass on."""
        if self._bands == 1:
            return 0
        halo = self.problem.taps[0] - 1
        values = self.count * halo * self.problem.channels * self.problem.shape[3]
        return self.counters + values * self.problem.accumulator_bytes

    def most_resident(self, device: Device) -> int:
        """Returns the number of thread blocks that fit in a multiprocessor's shared memory."""
        return max(1, device.shared_memory // (self.shared + _RESERVED_SHARED_MEMORY))

    @property
    def offsets(self) -> tuple[int, int]:
        return 0, self.counters

    @property
    def _bands(self) -> int:
        return ceil_div(self.problem.shape[2], self.rows)


def _fitted_band(problem: ProblemSpec, device: Device, rows: int, more_shared: int, most_blocks: int) -> _Band | None:
    """Returns the band of at most `rows` rows that fits in shared memory with `more_shared` bytes; None if none does.

    If possible, all blocks, up to `most_blocks` per multiprocessor, run at once.
    """
    halo, height = problem.taps[0] - 1, problem.shape[2]
    chunks = [4 * ceil_div(max(steps, _history(problem)), 4) for steps in _CHUNKS]
    if rows > 0:
        rows = ceil_div(height, ceil_div(height, rows))  # of equal height
    while rows > 0 and (rows == height or rows >= halo):
        times, fitting = _times(problem), None
        for steps in chunks if rows < height else (times, *(steps for steps in chunks if steps < times)):
            layout = _layout(problem, rows, steps)
            shared = layout["BAND_BYTES"] + more_shared
            if shared > device.shared_memory:
                continue
            fitting = _Band(problem, rows, steps, layout, shared)
            if fitting.most_resident(device) >= min(ceil_div(fitting.count, device.multiprocessors), most_blocks):
                break  # all at once, because a second round for the last few would take as long as the first
        if fitting is not None:
            return fitting
        rows //= 2
    return None


def _layout(problem: ProblemSpec, rows: int, steps: int) -> dict[str, int]:
    """Returns the constants of band.cuh for a band in shared memory: a whole image, or a chunk of `steps` steps."""
    halo, width, tau = problem.taps[0] - 1, problem.shape[3], problem.tau
    if rows == problem.shape[2] and steps == _times(problem):
        line = given_line = tau + (width + max(problem.taps[1] - 1 - problem.right, problem.right + 1) - tau | 1)
        gap, buffers, stretch = line - width, 1, 8
    else:
        line, given_line = _history(problem) + steps | 1, steps | 1
        gap, buffers, stretch = 0, 2, 4
    solved, given = (halo + rows) * line + gap, rows * given_line + stretch
    vector = 16 // problem.accumulator_bytes
    pitch = (ceil_div(problem.channels, vector) | 1) * vector
    size = _PLACE_BYTES + (solved + buffers * given) * pitch * problem.accumulator_bytes
    lines = dict(PITCH=pitch, LINE=line, GIVEN_LINE=given_line, SOLVED=solved, GIVEN=given, STRETCH=stretch)
    return lines | dict(PLACE_BYTES=_PLACE_BYTES, BAND_BYTES=size)


def _history(problem: ProblemSpec) -> int:
    """Returns the steps before a pixel from which it reads."""
    return problem.tau * (problem.taps[0] - 1) + problem.taps[1] - 1 - problem.right


def _groups(problem: ProblemSpec) -> int | str:
    """Returns the number of groups in the kernels: a constant or, for many, where they read it."""
    return problem.few_groups or "arguments.groups"


def _times(problem: ProblemSpec) -> int:
    """Returns the steps of a whole image."""
    return problem.tau * (problem.shape[2] - 1) + problem.shape[3]


def _narrowed(rows: int, least: int, problem: ProblemSpec, device: Device) -> int:
    """Returns the rows per band, reduced down to `least` if multiprocessors would otherwise be idle."""
    problems = problem.shape[0] * len(problem.stencils)
    while rows > least and problems * ceil_div(problem.shape[2], rows) < device.multiprocessors:
        rows = max(least, ceil_div(rows, 2))
    return rows


def _most_threads(weight_registers: int, problem: ProblemSpec) -> int:
    """Returns the largest block, a multiple of 128 threads, with this many registers of weights per thread."""
    registers = weight_registers + _OTHER_REGISTERS + 20 * problem.accumulator_bytes // 4
    return min(1024, _REGISTERS // registers // 128 * 128)


def _row_threads(problem: ProblemSpec, rows: int) -> int:
    return 32 * ceil_div(rows * problem.channels, 32)
