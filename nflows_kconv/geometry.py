"""Geometry of corners: which side is padded, where the pivot tap lies, which of its entries count.

A kernel of size kh x kw in corner TL ("top left") reads the pixel itself and the pixels above and to the left of it:
the image is padded by kh - 1 rows on the top and kw - 1 columns on the left, and the *pivot*, the tap that reads the
pixel itself, is the kernel's last entry. TR, BL and BR are its mirror images.

Inside the package a corner is an integer: bit 0 says right, bit 1 says bottom. Everything else that knows about corners
follows from the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CORNERS = ("TL", "TR", "BL", "BR")
_NUMBERS = {name: number for number, name in enumerate(CORNERS)}


def parse_corners(corners: str | Sequence[str]) -> list[int]:
    """Turns names of corners into integers, one a channel group.

    Raises:
        TypeError: If `corners` is neither a string nor a sequence of strings.
        ValueError: If there is no corner or an unknown one.
    """
    names = (corners,) if isinstance(corners, str) else corners
    if not isinstance(names, (tuple, list, Sequence)) or not all([isinstance(name, str) for name in names]):
        raise TypeError(f"corners must be a string or a sequence of strings out of {CORNERS}, got {corners!r}")
    groups = [_NUMBERS.get(name, -1) for name in names]
    if -1 in groups or not groups:
        raise ValueError(f"corners must name at least one corner, each out of {CORNERS}, got {corners!r}")
    return groups


def opposite(corner: int) -> int:
    """The corner mirrored both ways: where the transposed operator reads."""
    return 3 - corner


def flipped_dims(corner: int) -> list[int]:
    """Dimensions to flip so that an image or a kernel of this corner becomes one of corner TL."""
    return [dim for dim, bit in ((-1, 1), (-2, 2)) if corner & bit]


def padding(corner: int, kernel_size: Sequence[int]) -> tuple[int, int, int, int]:
    """What `F.pad` must add (left, right, top, bottom) before `F.conv2d`."""
    rows, columns = kernel_size[0] - 1, kernel_size[1] - 1
    left, right = (0, columns) if corner & 1 else (columns, 0)
    top, bottom = (0, rows) if corner & 2 else (rows, 0)
    return left, right, top, bottom


def pivot(corner: int, kernel_size: Sequence[int]) -> tuple[int, int]:
    """Row and column of the tap that reads the pixel itself."""
    left, _, top, _ = padding(corner, kernel_size)
    return top, left


def pivot_matrices(weight: Tensor, corners: Sequence[int]) -> Tensor:
    """The pivot taps [G, C/G, C/G] (output channel, input channel) of a weight [C, C/G, kh, kw]."""
    grouped = weight.unflatten(0, (len(corners), -1))
    taps = (pivot(corner, weight.shape[-2:]) for corner in corners)
    return torch.stack([grouped[group, :, :, row, column] for group, (row, column) in enumerate(taps)])


def pivot_diagonal(weight: Tensor, corners: Sequence[int]) -> Tensor:
    """The diagonal of the pivot taps, [C]: the diagonal of the Jacobian at every pixel."""
    return pivot_matrices(weight, corners).diagonal(dim1=-2, dim2=-1).flatten()


def _at_pivot(pattern: Tensor, shape: Sequence[int], corners: Sequence[int]) -> Tensor:
    mask = pattern.new_zeros(shape).unflatten(0, (len(corners), -1))
    for group, corner in enumerate(corners):
        row, column = pivot(corner, shape[-2:])
        mask[group, :, :, row, column] = pattern
    return mask.flatten(0, 1)


def masked_entries(shape: Sequence[int], corners: Sequence[int], device: torch.device | None = None) -> Tensor:
    """True where a weight of this shape counts as zero: the pivot's entries with c_in > c_out."""
    pattern = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).triu(1)
    return _at_pivot(pattern, shape, corners)


def diagonal_entries(shape: Sequence[int], corners: Sequence[int], device: torch.device | None = None) -> Tensor:
    """True on the pivot's diagonal."""
    pattern = torch.eye(shape[1], dtype=torch.bool, device=device)
    return _at_pivot(pattern, shape, corners)


def check_diagonal(diagonal: Tensor) -> None:
    """Raises a ValueError unless every entry and its reciprocal, in float32 at least, are finite and not zero."""
    diagonal = diagonal.to(torch.promote_types(diagonal.dtype, torch.float32))
    bad = ((diagonal * diagonal.reciprocal()).round() != 1).nonzero()  # NaN and infinity are not 1
    if len(bad):
        channel = int(bad[0, 0])
        raise ValueError(
            "the pivot's diagonal must be finite and not zero (and its reciprocal, too) for the convolution to have an "
            f"inverse, got {diagonal[channel].item():g} in channel {channel}"
        )
