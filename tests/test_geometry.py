"""Corners: paddings, pivots, masks and mirror images."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import CORNERS, Case, over_cases

from nflows_kconv import geometry

KERNEL_SIZES = ((1, 1), (2, 2), (3, 3), (1, 4), (5, 2))
every_kernel = pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
every_corner = pytest.mark.parametrize("corner", CORNERS)


@pytest.mark.parametrize("corners", [("TR",), ("TL", "TL"), CORNERS, ["BR", "TL", "BR"]], ids=str)
def test_corners_are_parsed_in_order(corners):
    assert [CORNERS[corner] for corner in geometry.parse_corners(corners)] == list(corners)


@every_corner
def test_one_string_is_one_corner(corner):
    assert geometry.parse_corners(corner) == geometry.parse_corners((corner,))


@every_corner
@every_kernel
def test_padding_is_the_papers(corner, kernel_size):
    (parsed,) = geometry.parse_corners(corner)
    assert geometry.padding(parsed, kernel_size) == oracles.padding(corner, kernel_size)


@every_corner
@every_kernel
def test_pivot_reads_the_pixel_itself(corner, kernel_size):
    (parsed,) = geometry.parse_corners(corner)
    row, column = geometry.pivot(parsed, kernel_size)
    kernel, image = torch.zeros(1, 1, *kernel_size), torch.randn(1, 1, 4, 5)
    kernel[..., row, column] = 1
    torch.testing.assert_close(F.conv2d(F.pad(image, geometry.padding(parsed, kernel_size)), kernel), image)


@every_corner
def test_opposite_corner_is_mirrored_both_ways(corner):
    (parsed,) = geometry.parse_corners(corner)
    assert CORNERS[geometry.opposite(parsed)] == oracles.MIRRORED["rows"][oracles.MIRRORED["columns"][corner]]


@every_corner
@every_kernel
def test_flips_lead_to_top_left(corner, kernel_size):
    (parsed,) = geometry.parse_corners(corner)
    kernel = torch.zeros(kernel_size)
    kernel[geometry.pivot(parsed, kernel_size)] = 1
    assert kernel.flip(geometry.flipped_dims(parsed))[-1, -1] == 1


@over_cases()
def test_masks_and_diagonal_are_the_papers(case: Case):
    corners, weight = geometry.parse_corners(case.corners), case.weight()
    masked = geometry.masked_entries(weight.shape, corners)
    on_diagonal = geometry.diagonal_entries(weight.shape, corners)
    assert torch.equal(masked, oracles.masked(weight.shape, case.corners))
    assert torch.equal(geometry.pivot_diagonal(weight, corners), oracles.diagonal(weight, case.corners))
    assert torch.equal(weight[on_diagonal], oracles.diagonal(weight, case.corners))
