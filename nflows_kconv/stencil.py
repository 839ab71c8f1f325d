"""Stencils: which pixels the convolution reads at a pixel, which taps are masked, in what order pixels can be solved.

A stencil is a symmetry of the image and a *pivot*, the tap that reads the pixel itself. The symmetry mirrors axes, and
for some stencils exchanges the two axes, which gives the *canonical* frame. There

    the taps before the pivot, in raster order, are free;
    the pivot's matrix counts as lower triangular;
    the taps after the pivot are masked,

so no pixel reads a later one in raster order, and the Jacobian is triangular. With the last tap as pivot the stencil is
a *corner* (a quarter plane): only the pivot's triangle is masked. With the middle of the last row as pivot it is a
*side* (a half plane), which reads the rows above and, in the pixel's own row, the pixels to the left.

The *lag* of a tap is how far back it reads along each canonical axis, in pixels. The *schedule* is a tuple of integers
tau with tau . lag > 0 for all free taps: pixels with equal tau . position can be solved at once (Lamport's hyperplane
method, 1974). The transposed operator has the same lags in the opposite stencil, with its channels exchanged.

Inside the package a stencil is an integer: bit i mirrors the i-th axis from the last; `_SIDE` and `_EXCHANGED` are
further bits, as in `csrc/cpu/stencil.h`. `PERIODIC` has no name and no solution: its pivot is the middle tap, nothing
is masked, and borders are circular.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE, _EXCHANGED, PERIODIC = 8, 16, 32
_MIRRORS = 7

STENCILS: dict[int, dict[str, int]] = {
    1: {"L": 0, "R": 1},
    2: {
        **{"TL": 0, "TR": 1, "BL": 2, "BR": 3},
        **{"T": _SIDE, "B": _SIDE | 3, "L": _SIDE | _EXCHANGED, "R": _SIDE | _EXCHANGED | 3},
    },
    3: {"".join(name): code for code, name in enumerate(itertools.product("NF", "TB", "LR"))},
}
AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}
CORNERS = {n: tuple(name for name, code in codes.items() if code <= _MIRRORS) for n, codes in STENCILS.items()}
# What `parse` gives for one or two names, and for the default: `functional` asks at every call.
_USUAL: dict[int, dict[Any, tuple[int, ...]]] = {
    n: {name: (code,) for name, code in codes.items()}
    | {(name,): (code,) for name, code in codes.items()}
    | {pair: (codes[pair[0]], codes[pair[1]]) for pair in itertools.product(codes, repeat=2)}
    | {CORNERS[n]: tuple(codes[name] for name in CORNERS[n])}
    for n, codes in STENCILS.items()
}


def parse(corners: str | Sequence[str], dimensions: int = 2) -> tuple[int, ...]:
    """Converts names to integers, one per channel group.

    Raises:
        TypeError: If `corners` is neither a string nor a sequence of strings.
        ValueError: If there is no name, or a name is unknown for this number of dimensions.
    """
    try:
        return _USUAL[dimensions][corners]
    except (KeyError, TypeError):
        pass
    known = STENCILS[dimensions]
    names = (corners,) if isinstance(corners, str) else corners
    is_sequence = isinstance(names, (tuple, list, Sequence))
    try:
        if is_sequence and names:
            return tuple([known[name] for name in names])
    except (KeyError, TypeError):
        pass
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(f"corners must be a string or a sequence of strings out of {tuple(known)}, got {corners!r}")
    side = any(name in STENCILS[2] and STENCILS[2][name] & _SIDE for name in names if name not in known)
    raise ValueError(
        f"corners must be one or more of {tuple(known)} in {dimensions} "
        f"dimension{'s' * (dimensions > 1)}, got {corners!r}{'; sides need two dimensions' * side}"
    )


def is_corner(code: int) -> bool:
    """Returns whether the pivot is the last tap, so that no other tap is masked."""
    return code <= _MIRRORS


def opposite(code: int, dimensions: int) -> int:
    """Returns the stencil mirrored along all axes, which the transposed operator has."""
    return code ^ ((1 << dimensions) - 1)


def family(code: int) -> int:
    """Returns the family of a stencil: its mirror images, which have equal lags."""
    return code & ~_MIRRORS


def canonical(tensor: Tensor, code: int, dimensions: int) -> Tensor:
    """Returns an image or a kernel, the last dimensions of a tensor, in the canonical frame."""
    if code & _EXCHANGED:
        tensor = tensor.transpose(-1, -2)
    return tensor.flip(mirrored(code, dimensions))


def from_canonical(tensor: Tensor, code: int, dimensions: int) -> Tensor:
    """Undoes `canonical`."""
    tensor = tensor.flip(mirrored(code, dimensions))
    return tensor.transpose(-1, -2) if code & _EXCHANGED else tensor


def lags(code: int, kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the lag of each free tap, in raster order, with the pivot last."""
    size, pivot_ = exchanged(code, kernel_size), _canonical_pivot(code, kernel_size)
    taps = itertools.product(*map(range, size))
    return [tuple(p - t for p, t in zip(pivot_, tap, strict=True)) for tap in taps if tap <= pivot_]


def schedule(lags: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Returns the smallest positive tau with tau . lag > 0 for every nonzero lag; an empty one if all are zero.

    The first nonzero number of each lag must be positive, because a tap before the pivot reads back.
    """
    others = [lag for lag in lags if any(lag)]
    tau: list[int] = []
    for axis in reversed(range(len(others[0]) if others else 0)):
        needed = 1
        for lag in others:
            if lag[axis] > 0 and not any(lag[:axis]):
                further = sum(t * step for t, step in zip(tau, lag[axis + 1 :], strict=True))
                needed = max(needed, -further // lag[axis] + 1)
        tau.insert(0, needed)
    return tuple(tau)


def pivot(code: int, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Returns the index of the pivot in the kernel."""
    size, place = exchanged(code, kernel_size), list(_canonical_pivot(code, kernel_size))
    for axis in mirrored(code, len(size)):
        place[axis] = size[axis] - 1 - place[axis]
    return tuple(exchanged(code, place))


def pad(images: Tensor, code: int, kernel_size: Sequence[int], dilation: Sequence[int] = ()) -> Tensor:
    """Pads images, [B, C, ...], for a convolution of torch."""
    amounts: list[int] = []
    dilation = dilation or [1] * len(kernel_size)
    for place, size, step in zip(pivot(code, kernel_size), kernel_size, dilation, strict=True):
        amounts[:0] = place * step, (size - 1 - place) * step  # F.pad takes the last axis first
    return F.pad(images, amounts, mode="circular" if code & PERIODIC else "constant")


def masked_entries(
    shape: Sequence[int], stencils: Sequence[int], device: torch.device | None = None, *, diagonal: bool = False
) -> Tensor:
    """Returns a mask of the entries that count as zero: the pivot's entries with c_in > c_out, and masked taps.

    With `diagonal` the mask includes the pivot's diagonal: the entries of a raw weight that are ignored.
    """
    above = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).triu(0 if diagonal else 1)
    return _of_groups(shape, stencils, above, after_pivot=True)


def diagonal_entries(shape: Sequence[int], stencils: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Returns a mask of the pivot's diagonal."""
    diagonal = torch.eye(shape[1], dtype=torch.bool, device=device)
    return _of_groups(shape, stencils, diagonal, after_pivot=False)


def pivot_diagonal(weight: Tensor, stencils: Sequence[int]) -> Tensor:
    """Returns the pivot's diagonal, [C], which is the diagonal of the Jacobian at every pixel."""
    diagonals = []
    for group, code in zip(weight.chunk(len(stencils)), stencils, strict=True):
        for index in pivot(code, weight.shape[2:]):
            group = group.select(2, index)
        diagonals.append(group.diagonal())
    return torch.cat(diagonals)


def on_weight(numbers: Tensor, weight: Tensor) -> Tensor:
    """Reshapes one number per output channel, [C], to broadcast over the weight."""
    return numbers.view(-1, *[1] * (weight.dim() - 1))


def effective(
    weight: Tensor, stencils: Sequence[int], log_diagonal: Tensor | None = None, unit_diagonal: bool = False
) -> Tensor:
    """Returns the effective weight: zero where masked, with its own diagonal, exp(log_diagonal) or ones."""
    device = weight.device
    weight = weight.masked_fill(masked_entries(weight.shape, stencils, device), 0)
    if not unit_diagonal and log_diagonal is None:
        return weight
    on_diagonal = diagonal_entries(weight.shape, stencils, device)
    if log_diagonal is None:
        return weight.masked_fill(on_diagonal, 1)
    return torch.where(on_diagonal, on_weight(log_diagonal.exp().to(weight.dtype), weight), weight)


def check_diagonal(diagonal: Tensor) -> None:
    """Raises a ValueError unless every entry and its reciprocal, in float32 at least, are finite and not zero.

    Args:
        diagonal: [C], or [B, C] with one per image.
    """
    diagonal = diagonal.to(torch.promote_types(diagonal.dtype, torch.float32))
    bad = ((diagonal * diagonal.reciprocal()).round() != 1).nonzero()  # NaN and infinity are not 1
    if len(bad):
        *image, channel = index = bad[0].tolist()
        place = f"channel {channel}" + "".join(f" of image {each}" for each in image)
        raise ValueError(
            "the pivot's diagonal and its reciprocal must be finite and nonzero for the convolution to have an "
            f"inverse, got {diagonal[tuple(index)].item():g} in {place}"
        )


def mirrored(code: int, dimensions: int) -> list[int]:
    """Returns the axes that the canonical frame mirrors, counted from the last, -1."""
    return [-1 - bit for bit in range(dimensions) if code >> bit & 1]


def exchanged(code: int, values: Sequence[int]) -> list[int]:
    """Reorders numbers, one per axis, from image axes to canonical axes, or back."""
    return list(values)[::-1] if code & _EXCHANGED else list(values)  # only for two axes


def _canonical_pivot(code: int, kernel_size: Sequence[int]) -> tuple[int, ...]:
    *rest, last = [size - 1 for size in exchanged(code, kernel_size)]
    if code & PERIODIC:
        return tuple(place // 2 for place in (*rest, last))
    return (*rest, last // 2 if code & _SIDE else last)


def _of_groups(shape: Sequence[int], stencils: Sequence[int], at_pivot: Tensor, after_pivot: bool) -> Tensor:
    """Returns a mask of a weight with this mask at the pivot and one value at all later taps, for each group."""
    masks = {code: _of_group(shape[2:], code, at_pivot, after_pivot) for code in set(stencils)}
    mask = torch.cat([masks[code] for code in stencils])
    return mask.expand(shape[0] // len(mask), *mask.shape).flatten(0, 1)


def _of_group(kernel_size: Sequence[int], code: int, at_pivot: Tensor, after_pivot: bool) -> Tensor:
    size = exchanged(code, kernel_size)
    place = 0  # index of the pivot in raster order
    for length, index in zip(size, _canonical_pivot(code, kernel_size), strict=True):
        place = place * length + index
    taps = at_pivot.new_zeros(*at_pivot.shape, math.prod(size))
    if after_pivot and code & PERIODIC:
        return taps.unflatten(-1, size)
    taps[..., place] = at_pivot
    taps[..., place + 1 :].fill_(after_pivot)  # assignment would put a constant into exported programs
    return from_canonical(taps.unflatten(-1, size), code, len(size))
