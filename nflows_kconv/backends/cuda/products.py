"""Plans of the matrix products of products.cu: the convolution and the blocked solver for many channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nflows_kconv.backends.cuda.plan import Device, Launch, Plan, Problem, aligned, arguments, ceil_div, kernel

# The parts of products.cu.
_OUTSIDE, _INSIDE, _ALL = range(3)

# (BLOCK_M, BLOCK_N, THREAD_M) of a thread block, the most efficient first: its reads are shared by the most products.
_BLOCKS = ((64, 64, 8), (64, 32, 4), (32, 32, 4))
_SMALLEST_BLOCK = _BLOCKS[-1]
_SLAB = 16  # kSlab of products.cu

_THREADS = 256
_TRANSPOSED_SIDE = 32  # kSide of layout.cu


def plan_convolution(problem: Problem, device: Device) -> Plan:
    """y = A x + b as one product over all lags."""
    build = _Builder(problem)
    weights = build.pack()
    inputs = build.gather(biased=False)
    outputs = build.image_region(problem.shape[0], *problem.shape[2:])
    block = _block(problem, device, problem.typical.shape[0] * problem.shape[2] * problem.shape[3], 1)
    build.multiply(_ALL, 1, block, problem, weights, inputs, outputs)
    build.scatter(outputs, biased=problem.bias)
    return build.plan()


def plan_solve(problem: Problem, device: Device) -> Plan:
    """x = A^-1 (y - b), tile by tile, an anti-diagonal of tiles a step; see products.cu.

    The impulse response inside a tile is itself such a solution, with a pixel for a tile and an image for every input
    channel. That of a pixel is the inverse of the pivot.
    """
    build = _Builder(problem)
    weights = build.pack()
    response = build.invert(weights)
    batch, _, height, width = problem.shape
    tile = _tile(problem)
    if tile > 1:
        impulses = replace(problem, shape=(build.padded, problem.shape[1], tile, tile))
        images = build.impulses(impulses)
        responses = build.image_region(*impulses.shape[:1], tile, tile)
        build.solve(impulses, 1, _SMALLEST_BLOCK, weights, response, images, responses)
        response = _Weights(responses, 1, tile * tile, tile * tile * build.padded)
    known = build.gather(biased=problem.bias)
    solved = build.image_region(batch, height, width)
    steps = ceil_div(height, tile) + ceil_div(width, tile) - 1
    columns = ceil_div(problem.typical.shape[0] * height * width, tile * tile * steps)
    block = _block(problem, device, columns, tile * tile)
    build.solve(problem, tile, block, weights, response, known, solved)
    build.scatter(solved, biased=False)
    return build.plan()


def _tile(problem: Problem) -> int:
    """Side of a tile: the larger, the fewer steps; but the response inside it costs some C^3 side^2 operations."""
    side = 4 if problem.channels <= 256 else 2
    while side >= 2 * max(problem.shape[2:]):
        side //= 2
    return side


def _block(problem: Problem, device: Device, columns: int, pixels: int) -> tuple[int, int, int]:
    """The most efficient thread block that still leaves enough of them to fill the device."""
    for m, n, thread_m in _BLOCKS:
        blocks = pixels * len(problem.stencils) * ceil_div(problem.channels, m) * ceil_div(columns, n)
        if 2 * blocks >= 3 * device.multiprocessors:
            return m, n, thread_m
    return _SMALLEST_BLOCK


@dataclass(frozen=True)
class _Weights:
    """Weights [...][PADDED] in the scratch: where, and the distances that products.cu takes, in units of PADDED."""

    offset: int
    to_next_lag: int
    to_next_input: int
    to_next_group: int


class _Builder:
    """Collects the launches of a plan, and hands out the regions of its scratch."""

    def __init__(self, problem: Problem) -> None:
        self.padded = 4 * ceil_div(problem.channels, 4)
        self._problem = problem
        self._launches: list[Launch] = []
        self._scratch = 0

    def plan(self) -> Plan:
        return Plan(tuple(self._launches), self._scratch)

    def pack(self) -> _Weights:
        taps = self._problem.taps[0] * self._problem.taps[1]
        size = self._groups * taps * self.padded**2
        offset = self._region(size)
        self._launch("prepare.cu", "pack", ceil_div(size, _THREADS), offsets=(offset,), THREADS=_THREADS)
        return _Weights(offset, self.padded, 1, taps * self.padded)

    def invert(self, weights: _Weights) -> _Weights:
        offset = self._region(self._groups * self.padded**2)
        blocks = self._groups * ceil_div(self.padded, _THREADS // 32)
        self._launch("prepare.cu", "invert", blocks, offsets=(offset, weights.offset), THREADS=_THREADS)
        return _Weights(offset, self.padded, 1, self.padded)

    def impulses(self, problem: Problem) -> int:
        offset = self.image_region(problem.shape[0], *problem.shape[2:])
        size = self._groups * problem.shape[0] * self.padded * problem.shape[2] * problem.shape[3]
        self._launch("layout.cu", "impulses", ceil_div(size, _THREADS), problem, offsets=(offset,))
        return offset

    def gather(self, *, biased: bool) -> int:
        batch, _, height, width = self._problem.shape
        offset = self.image_region(batch, height, width)
        self._transpose("gather", offset, biased)
        return offset

    def scatter(self, offset: int, *, biased: bool) -> None:
        self._transpose("scatter", offset, biased)

    def image_region(self, images: int, height: int, width: int) -> int:
        return self._region(self._groups * images * height * width * self.padded)

    def solve(
        self,
        problem: Problem,
        tile: int,
        block: tuple[int, int, int],
        weights: _Weights,
        response: _Weights,
        known: int,
        solved: int,
    ) -> None:
        rows, columns = ceil_div(problem.shape[2], tile), ceil_div(problem.shape[3], tile)
        for diagonal in range(rows + columns - 1):
            first = max(0, diagonal - columns + 1)
            tiles = (first, min(rows - 1, diagonal) - first + 1, diagonal)
            if diagonal > 0:
                self.multiply(_OUTSIDE, tile, block, problem, weights, solved, known, tiles)
            self.multiply(_INSIDE, tile, block, problem, response, known, solved, tiles)

    def multiply(
        self,
        part: int,
        tile: int,
        block: tuple[int, int, int],
        problem: Problem,
        weights: _Weights,
        read: int,
        written: int,
        tiles: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        block_m, block_n, thread_m = block
        batch, _, height, width = problem.shape
        columns = batch * (height * width if part == _ALL else tiles[1])
        blocks = tile * tile * self._groups * ceil_div(self.padded, block_m) * ceil_div(columns, block_n)
        shared = 2 * _SLAB * (block_m + block_n + 4) * self._problem.accumulator_bytes
        self._launch(
            "products.cu",
            "products",
            blocks,
            problem,
            threads=block_m // thread_m * (block_n // 4),
            shared=shared,
            parameters=(part, tile, *tiles, weights.to_next_lag, weights.to_next_input, weights.to_next_group),
            offsets=(weights.offset, read, written),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            THREAD_M=thread_m,
        )

    @property
    def _groups(self) -> int:
        return len(self._problem.stencils)

    def _transpose(self, name: str, offset: int, biased: bool) -> None:
        batch, _, height, width = self._problem.shape
        tiles = ceil_div(height * width, _TRANSPOSED_SIDE) * ceil_div(self.padded, _TRANSPOSED_SIDE)
        shared = _TRANSPOSED_SIDE * (_TRANSPOSED_SIDE + 1) * self._problem.accumulator_bytes
        blocks = self._groups * batch * tiles
        self._launch("layout.cu", name, blocks, shared=shared, parameters=(int(biased),), offsets=(offset,))

    def _region(self, size: int) -> int:
        offset = self._scratch
        self._scratch = aligned(offset + size * self._problem.accumulator_bytes)
        return offset

    def _launch(
        self,
        source: str,
        name: str,
        blocks: int,
        problem: Problem | None = None,
        *,
        threads: int = _THREADS,
        shared: int = 0,
        parameters: tuple[int, ...] = (),
        offsets: tuple[int, ...] = (),
        **constants: int,
    ) -> None:
        self._launches.append(
            Launch(
                kernel(self._problem, source, name, PADDED=self.padded, **constants),
                (blocks, 1, 1),
                threads,
                shared,
                arguments(problem or self._problem, parameters, offsets),
            )
        )
