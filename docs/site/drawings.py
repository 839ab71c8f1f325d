"""Draws the layer as SVG, with the text colour of the page.

`python docs/site/drawings.py` writes docs/images/layer.svg with fixed colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch

from nflows_kconv import functional

CELL = 20
STEP_SECONDS = 0.7
SIZE = 6  # side of the image whose inverse is drawn
KERNEL = 3
SHOWN_STEPS = (0, 3, 5, 8)
STYLE = (
    "text{font:11px sans-serif;text-anchor:middle}rect{stroke:#d9d9d9}"
    ".empty{fill:white}.tap{fill:#3a6ea5}.known{fill:#a9c4de}.pivot{fill:#e07b39}"
)
CORNERS, SIDES = ("TL", "TR", "BL", "BR"), ("T", "B", "L", "R")


def taps() -> str:
    """Draws the taps of a kernel in each corner around their pixel, and the mask of the pivot."""
    panels = [_panel(5, _around_a_pixel(name), name) for name in CORNERS]
    parts = []
    for row, column in _cells(5, 5):
        parts.append(_square(column, row, "pivot" if row == column else "tap" if column < row else "empty"))
        if column > row:
            parts.append(_text(column, row, "0"))
    panels.append(_panel(5, parts, "the pivot"))
    return _figure(
        panels,
        "The taps of a 3 x 3 kernel for each corner, and the pivot's mask: zero above the diagonal",
        "TL to BR: what a pixel (orange) reads in each corner. The pivot: its tap as a matrix, output channels down, "
        "input channels across. Only what is above the diagonal is masked; all other taps (blue) are full matrices.",
    )


def corners() -> str:
    """Draws what a pixel reads in each corner, and the order in which the inverse solves pixels."""
    return _stencils(
        CORNERS,
        "Corners: the taps of a 3 x 3 kernel, and the step in which the inverse finds each pixel",
        "Corners. Above: what a pixel (orange, the pivot) reads. Below: the step in which the inverse finds a pixel. "
        "Orange: those of one step. Blue: known by then.",
    )


def sides() -> str:
    """Draws the same for each side, with the masked taps."""
    return _stencils(
        SIDES,
        "Sides: the taps of a 3 x 3 kernel, and the step in which the inverse finds each pixel",
        "Sides, drawn alike. 0: a masked tap of the kernel.",
    )


def jacobian(channels: int = 2, side: int = 4) -> str:
    """Draws the nonzeros of the Jacobian of a layer with corner TL, in raster order, channels inside a pixel."""
    return _figure(
        [_jacobian(channels, side)],
        "The Jacobian is lower triangular",
        f"The Jacobian of a {KERNEL} × {KERNEL} layer with corner TL and {channels} channels on a {side} × {side} "
        "image: outputs down, inputs across, pixel by pixel from the top left. Nothing is above the diagonal (orange).",
        css="single",
    )


def _jacobian(channels: int, side: int) -> str:
    entries = side * side * channels
    parts = [f'<rect class="empty" x="0" y="0" width="{entries * CELL}" height="{entries * CELL}"/>']
    for output, input in _cells(entries, entries):
        (out_pixel, out_channel), (in_pixel, in_channel) = divmod(output, channels), divmod(input, channels)
        down, right = out_pixel // side - in_pixel // side, out_pixel % side - in_pixel % side
        if not (0 <= down < KERNEL and 0 <= right < KERNEL) or (down == right == 0 and in_channel > out_channel):
            continue
        parts.append(_square(input, output, "pivot" if input == output else "tap"))
    return _panel(entries, parts)


def wavefront() -> str:
    """Draws the inverse as an animation of the pixels that each step solves."""
    steps = 2 * SIZE - 1
    cycle = steps + 3  # shows the whole image for a while
    parts = [f"<style>{''.join(_keyframes(step, cycle) for step in range(steps))}</style>"]
    for row, column in _cells(SIZE, SIZE):
        step = row + column
        style = f"animation:step-{step} {STEP_SECONDS * cycle:.1f}s step-end infinite"
        parts.append(_square(column, row, "known", style))
        parts.append(_text(column, row, str(step)))
    return _figure(
        [_panel(SIZE, parts)],
        f"Animation: the inverse finds a {SIZE} x {SIZE} image in {steps} steps, an anti-diagonal at once",
        "The number is the step in which a pixel is found. Orange: found now. Blue: known. "
        "The animation stands still under the pointer.",
        css="single screen-only",
    )


def frames() -> str:
    """Draws some steps of the inverse, with the pixels that one pixel of each reads."""
    panels = []
    for step in SHOWN_STEPS:
        reader_column = min(step, SIZE // 2)
        reader_row = step - reader_column
        parts = []
        for row, column in _cells(SIZE, SIZE):
            known = row + column < step
            read = known and 0 <= reader_row - row < KERNEL and 0 <= reader_column - column < KERNEL
            kind = "pivot" if row + column == step else "tap" if read else "known" if known else "empty"
            parts.append(_square(column, row, kind))
        parts.append(_text(reader_column, reader_row, "x"))
        panels.append(_panel(SIZE, parts, f"step {step}"))
    return _figure(
        panels,
        "Four steps of the inverse: found now, read by one pixel, known",
        "Four of the eleven steps. Orange: found now, all at once. Dark blue: what the pixel x reads. Light blue: also "
        "known. Empty: not yet known, and not needed.",
    )


def layer() -> str:
    """Draws a standalone picture: what the layer reads, how its inverse runs, why its log-determinant is simple."""
    panels = [
        (_panel(5, _around_a_pixel(name), name), 5 + 110 * (place % 2), 34 + 110 * (place // 2), 100)
        for place, name in enumerate(CORNERS)
    ]
    panels += [(_panel(8, _order(_steps("TL", 8))), 245, 42, 200), (_jacobian(3, 4), 475, 42, 200)]
    drawn = [
        panel.replace("<svg", f'<svg x="{x}" y="{y}" width="{size}" height="{size}"', 1) for panel, x, y, size in panels
    ]
    for x, lines in (
        (110, ("one corner per channel group", "(orange: pivot, the pixel itself)")),
        (345, ("the inverse, H + W - 1 steps:", "an anti-diagonal at once")),
        (575, ("the Jacobian is triangular:", "log |det| = H W Σ log |diagonal|")),
    ):
        drawn += [f'<text x="{x}" y="{y}">{line}</text>' for y, line in zip((14, 28), lines, strict=True)]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 255" style="background:white">'
    return f"{head}<style>{STYLE}</style>{''.join(drawn)}</svg>\n"


def _stencils(names: Iterable[str], title: str, caption: str) -> str:
    panels = [_panel(5, _around_a_pixel(name) + _order(_steps(name, 5), 6), name, rows=11) for name in names]
    return _figure(panels, title, caption)


def _order(steps: dict[tuple[int, int], int], down: int = 0) -> list[str]:
    """Draws the step that solves each pixel, with the pixels of the middle step marked."""
    shown = max(steps.values()) // 2
    parts = []
    for (row, column), step in steps.items():
        kind = "pivot" if step == shown else "known" if step < shown else "empty"
        parts += _square(column, row + down, kind), _text(column, row + down, str(step))
    return parts


def _around_a_pixel(name: str) -> list[str]:
    """Draws the 5 x 5 pixels around one: those that it reads, and the masked taps."""
    reads = _reads(name)
    rows, columns = ({offset[axis] for offset in reads} for axis in (0, 1))
    parts = []
    for row, column in _cells(5, 5):
        offset = row - 2, column - 2
        parts.append(_square(column, row, "pivot" if offset == (0, 0) else "tap" if offset in reads else "empty"))
        if offset[0] in rows and offset[1] in columns and offset not in reads:
            parts.append(_text(column, row, "0"))
    return parts


def _reads(name: str) -> set[tuple[int, int]]:
    """Returns the offsets of the pixels that a pixel reads, including itself: rows down and columns to the right."""
    image = torch.zeros(1, 1, 2 * KERNEL + 1, 2 * KERNEL + 1, requires_grad=True)
    pixel = functional.conv2d(image, torch.ones(1, 1, KERNEL, KERNEL), corners=name)[0, 0, KERNEL, KERNEL]
    (read,) = torch.autograd.grad(pixel, image)
    return {(row - KERNEL, column - KERNEL) for row, column in read[0, 0].nonzero().tolist()}


def _steps(name: str, size: int) -> dict[tuple[int, int], int]:
    """Returns the step in which the inverse solves each pixel: the one after the last pixel that it waits for."""
    others = _reads(name) - {(0, 0)}

    @cache
    def step(row: int, column: int) -> int:
        read = ((row + down, column + right) for down, right in others)
        return max((step(*pixel) + 1 for pixel in read if all(0 <= place < size for place in pixel)), default=0)

    return {pixel: step(*pixel) for pixel in _cells(size, size)}


def _keyframes(step: int, cycle: int) -> str:
    found, known, end = (100 * moment / cycle for moment in (step, step + 1, cycle - 0.5))
    return (
        f"@keyframes step-{step}{{0%{{fill:transparent}}{found:.1f}%{{fill:var(--pivot)}}"
        f"{known:.1f}%{{fill:var(--known)}}{end:.1f}%{{fill:transparent}}}}"
    )


def _cells(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    return ((row, column) for row in range(rows) for column in range(columns))


def _square(x: float, y: float, kind: str, style: str = "") -> str:
    place = f'x="{CELL * x:g}" y="{CELL * y:g}" width="{CELL}" height="{CELL}"'
    return f'<rect class="{kind}" {place}' + (f' style="{style}"' if style else "") + "/>"


def _text(column: float, row: float, text: str) -> str:
    """Returns a text centred in a cell."""
    return f'<text x="{CELL * (column + 0.5):g}" y="{CELL * (row + 0.7):g}">{text}</text>'


def _panel(cells: int, parts: list[str], title: str = "", rows: int = 0) -> str:
    """Returns a drawing with a number of cells across, and by default as many down."""
    top = -CELL if title else 0
    box = f'viewBox="-1 {top - 1} {CELL * cells + 2} {CELL * (rows or cells) - top + 2}"'
    heading = _text(cells / 2 - 0.5, -1, title) if title else ""
    return f'<svg {box} aria-hidden="true">{heading}{"".join(parts)}</svg>'


def _figure(panels: list[str], title: str, caption: str, css: str = "") -> str:
    return (
        f'<figure class="drawing {css}" markdown="0"><div class="panels" role="img" aria-label="{title}">'
        f"{''.join(panels)}</div><figcaption>{caption}</figcaption></figure>"
    )


DRAWINGS: dict[str, Callable[[], str]] = {
    "taps": taps,
    "corners": corners,
    "sides": sides,
    "jacobian": jacobian,
    "wavefront": wavefront,
    "frames": frames,
}

if __name__ == "__main__":
    (Path(__file__).parent.parent / "images" / "layer.svg").write_text(layer())
