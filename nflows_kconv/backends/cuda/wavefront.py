"""Plans of the two wavefront solvers: one thread block a band of rows, one anti-diagonal a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nflows_kconv.backends.cuda.plan import Device, Launch, Plan, Problem, aligned, arguments, ceil_div, kernel

# Registers of 32 bits full of weights that a thread may hold in each kernel. It has 255 at most, and a multiprocessor
# 65536; with more weights, sums and addresses spill to memory.
_ROW_WEIGHTS = 112
_CHANNEL_WEIGHTS = 144
_ROW_CHANNELS = 16
_OTHER_REGISTERS = 36  # and 20 words of the type of the sums
_REGISTERS = 65536

# Steps whose y is copied into shared memory at a time, the best first: all, or chunks that leave room for other blocks.
_WHOLE = 32
_CHUNKS = (16, 8)

# Rows of a band where several bands of an image should run at once, because the device has room for them.
_NARROW_BAND = 32

_PLACE_BYTES = 80  # sizeof(Place) in band.cuh
_RESERVED_SHARED_MEMORY = 1024  # that a thread block takes beside its own


def plan_rows(problem: Problem, device: Device) -> Plan | None:
    """solve_rows.cu: one thread a row and block of output channels. None where its weights do not fit registers."""
    words = problem.accumulator_bytes // 4
    column = problem.taps[0] * problem.taps[1] * problem.channels * words  # registers an output
    if column > _ROW_WEIGHTS or problem.channels > _ROW_CHANNELS:
        return None
    # As many parts as registers ask for, and more where lanes of a warp would be idle.
    parts = max(ceil_div(problem.channels, _ROW_WEIGHTS // column), 32 // problem.shape[2])
    parts = min(parts, problem.channels)
    outputs = ceil_div(problem.channels, parts)
    parts = ceil_div(problem.channels, outputs)
    most_threads = _most_threads(column * outputs, problem)
    rows = _narrowed(min(problem.shape[2], most_threads // parts), problem.typical, device)
    band = _fitted_band(problem.typical, device, rows, _premultiplied_bytes(problem))
    if band is None:
        return None
    threads = 32 * ceil_div(band.rows * parts, 32)
    blocks = max(1, min(ceil_div(band.count, device.multiprocessors), most_threads // threads))
    band = replace(band, problem=problem)
    constants = band.constants | {"THREADS": threads, "OUTPUTS": outputs, "PARTS": parts, "BLOCKS": blocks}
    launch = Launch(
        kernel(problem, "solve_rows.cu", "solve_rows", **constants),
        (band.count, 1, 1),
        threads,
        band.shared,
        arguments(problem, offsets=band.offsets),
    )
    return Plan((launch,), band.scratch, band.counters)


def plan_channels(problem: Problem, device: Device) -> Plan | None:
    """solve_channels.cu: the weights spread over a block's registers. None where they do not fit."""
    vector = 16 // problem.accumulator_bytes
    reads = problem.taps[0] * problem.taps[1] * ceil_div(problem.channels, vector)
    padded = 4 * ceil_div(problem.channels, 4)
    best: tuple[int, int, int, int] | None = None
    for slices in (4, 8, 16, 32):
        each = ceil_div(reads, slices)
        threads = 32 * ceil_div(slices * padded // 4, 32)
        if 16 * each > _CHANNEL_WEIGHTS or threads > _most_threads(16 * each, problem):
            continue
        # Instructions of a replica for one pixel: multiply-adds, reads, shuffles with their additions, the rest.
        cost = threads * (16 * each + each + 2 * slices.bit_length() + 10)
        best = min(best or (cost, slices, each, threads), (cost, slices, each, threads))
    if best is None:
        return None
    _, slices, each, threads = best
    band = _fitted_band(problem.typical, device, _narrowed(problem.shape[2], problem.typical, device), 0)
    if band is None or problem.channels**2 * problem.accumulator_bytes > device.shared_memory:
        return None
    # Replicas in blocks of their own do as much, and leave no multiprocessor waiting for the last blocks.
    replicas = min(_most_threads(16 * each, problem) // threads, band.rows)
    blocks = min(ceil_div(band.count, device.multiprocessors), band.most_resident(device), replicas)
    replicas //= blocks
    band = replace(band, problem=problem)
    offset = aligned(band.scratch)
    preparation, size = plan_premultiply(problem, offset)
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
    return Plan((preparation, launch), offset + size, band.counters)


def plan_premultiply(problem: Problem, offset: int) -> tuple[Launch, int]:
    """The launch that writes the premultiplied weights at this offset of the scratch, and their size in bytes."""
    threads = 256
    padded = 4 * ceil_div(problem.channels, 4)
    columns = problem.taps[0] * problem.taps[1] * problem.channels
    launch = Launch(
        kernel(problem, "prepare.cu", "premultiply", PADDED=padded, THREADS=threads),
        (len(problem.stencils) * ceil_div(columns, threads // 32), 1, 1),
        threads,
        problem.channels**2 * problem.accumulator_bytes,
        arguments(problem, offsets=(offset,)),
    )
    return launch, len(problem.stencils) * columns * padded * problem.accumulator_bytes


@dataclass(frozen=True)
class _Band:
    """How band.cuh cuts the image: bands of `rows` rows, chunks of `steps` steps, `shared` bytes of shared memory."""

    problem: Problem
    rows: int
    steps: int
    shared: int

    @property
    def count(self) -> int:
        """Bands of all images and groups."""
        return self._bands * self.problem.shape[0] * len(self.problem.stencils)

    @property
    def constants(self) -> dict[str, int | str]:
        chunked = self.steps < _times(self.problem, self.rows)
        return {
            "ROWS": self.rows,
            "STEPS": self.steps,
            "CHUNKED": int(chunked),
            "BANDED": int(self._bands > 1),
            "BIAS": int(self.problem.bias),
        }

    @property
    def counters(self) -> int:
        """Bytes of the ticket and of one counter for each band; none where a band waits for no other."""
        return aligned(4 * (1 + self.count)) if self._bands > 1 else 0

    @property
    def scratch(self) -> int:
        """Bytes of the counters and of the rows that bands hand down."""
        if self._bands == 1:
            return 0
        halo = self.problem.taps[0] - 1
        values = self.count * halo * self.problem.channels * self.problem.shape[3]
        return self.counters + values * self.problem.accumulator_bytes

    def most_resident(self, device: Device) -> int:
        """Thread blocks that a multiprocessor has shared memory for."""
        return max(1, device.shared_memory // (self.shared + _RESERVED_SHARED_MEMORY))

    @property
    def offsets(self) -> tuple[int, int]:
        return 0, self.counters

    @property
    def _bands(self) -> int:
        return ceil_div(self.problem.shape[2], self.rows)


def _fitted_band(problem: Problem, device: Device, rows: int, more_shared: int) -> _Band | None:
    """The band of at most `rows` rows that fits shared memory beside `more_shared` bytes; None where none does."""
    halo, height = problem.taps[0] - 1, problem.shape[2]
    history = problem.tau * halo + problem.taps[1] - 1 - problem.right
    if rows > 0:
        rows = ceil_div(height, ceil_div(height, rows))  # of equal height
    while rows > 0 and (rows == height or rows >= halo):
        all_steps = _times(problem, rows)
        chunks = [chunk for chunk in (max(chunk, history) for chunk in _CHUNKS) if chunk < all_steps]
        fitting = None
        for steps in [all_steps, *chunks] if all_steps <= _WHOLE or not chunks else chunks:
            buffers = 1 if steps == all_steps else 2
            shared = (halo + rows + buffers * rows) * ((history + steps) | 1) * _pixel_bytes(problem) + _PLACE_BYTES
            if shared + more_shared > device.shared_memory:
                continue
            fitting = _Band(problem, rows, steps, shared + more_shared)
            if fitting.most_resident(device) * device.multiprocessors >= fitting.count:
                break  # all at once: a second round for the last few would take as long as the first
        if fitting is not None:
            return fitting
        rows //= 2
    return None


def _times(problem: Problem, rows: int) -> int:
    """Steps of a band, with kLead of band.cuh."""
    lead = problem.right if rows < problem.shape[2] else 0
    return lead + problem.tau * (rows - 1) + problem.shape[3]


def _narrowed(rows: int, problem: Problem, device: Device) -> int:
    """Rows of a band, fewer where the device would otherwise have multiprocessors without one."""
    problems = problem.shape[0] * len(problem.stencils)
    while rows > _NARROW_BAND and problems * ceil_div(problem.shape[2], rows) < device.multiprocessors:
        rows = max(_NARROW_BAND, ceil_div(rows, 2))
    return rows


def _most_threads(weight_registers: int, problem: Problem) -> int:
    """Threads a block may have with this many registers of weights each, a multiple of 128 as registers are given."""
    registers = weight_registers + _OTHER_REGISTERS + 20 * problem.accumulator_bytes // 4
    return min(1024, _REGISTERS // registers // 128 * 128)


def _premultiplied_bytes(problem: Problem) -> int:
    columns = problem.taps[0] * problem.taps[1] * problem.channels
    return (columns + problem.channels) * problem.channels * problem.accumulator_bytes


def _pixel_bytes(problem: Problem) -> int:
    """kPitch of band.cuh, in bytes."""
    vector = 16 // problem.accumulator_bytes
    return 16 * (ceil_div(problem.channels, vector) | 1)
