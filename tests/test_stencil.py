"""Stencils: names, padding, pivots, masks, and the order in which pixels can be solved."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import STENCILS, Case, over_cases

from nflows_kconv import stencil

KERNEL_SIZES = {1: ((1,), (2,), (5,)), 2: ((1, 1), (2, 2), (3, 3), (1, 4), (5, 2)), 3: ((1, 1, 1), (2, 3, 1))}
every_stencil = pytest.mark.parametrize(
    ("name", "kernel_size"),
    [(name, size) for n, names in STENCILS.items() for name in names for size in KERNEL_SIZES[n]],
    ids=str,
)


@pytest.mark.parametrize("dimensions", STENCILS)
def test_names_are_parsed_in_order(dimensions: int):
    for names in (STENCILS[dimensions], list(reversed(STENCILS[dimensions])), STENCILS[dimensions][:1] * 3):
        codes = stencil.parse(names, dimensions)
        assert codes == tuple(stencil.STENCILS[dimensions][name] for name in names)
        assert stencil.parse(names[0], dimensions) == codes[:1]  # one string is one stencil
    assert tuple(stencil.STENCILS[dimensions]) == STENCILS[dimensions]


@every_stencil
def test_pivot_and_padding_are_those_of_the_definition(name: str, kernel_size: tuple[int, ...]):
    (code,) = stencil.parse(name, len(kernel_size))
    assert stencil.pivot(code, kernel_size) == oracles.pivot(name, kernel_size)
    image, dilation = torch.randn(1, 1, *(4, 5, 3)[: len(kernel_size)]), (2, 1, 3)[: len(kernel_size)]
    for steps in ((), dilation):
        expected = F.pad(image, oracles.padding(name, kernel_size, steps or 1))
        assert torch.equal(stencil.pad(image, code, kernel_size, steps), expected)


@every_stencil
def test_pivot_reads_the_pixel_itself(name: str, kernel_size: tuple[int, ...]):
    n = len(kernel_size)
    kernel, image = torch.zeros(1, 1, *kernel_size), torch.randn(1, 1, *(4, 5, 3)[:n])
    kernel[(..., *oracles.pivot(name, kernel_size))] = 1
    convolution = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    torch.testing.assert_close(convolution(F.pad(image, oracles.padding(name, kernel_size)), kernel), image)


@every_stencil
def test_the_schedule_solves_what_is_read_before_what_reads(name: str, kernel_size: tuple[int, ...]):
    """Its numbers are minimal: with any of them one smaller, a pixel would not wait for one that it reads."""
    (code,) = stencil.parse(name, len(kernel_size))
    lags = stencil.lags(code, kernel_size)
    assert len(lags) == (~oracles.masked((1, 1, *kernel_size), [name])).sum()
    assert not any(lags[-1])
    tau = stencil.schedule(lags)

    def waits(tau: tuple[int, ...]) -> bool:
        return all(sum(t * step for t, step in zip(tau, lag, strict=True)) > 0 for lag in lags[:-1])

    assert waits(tau)
    for axis in range(len(tau)):
        assert tau[axis] == 1 or not waits((*tau[:axis], tau[axis] - 1, *tau[axis + 1 :]))
    assert stencil.is_corner(code) != oracles.is_side(name, len(kernel_size))
    if stencil.is_corner(code):
        assert set(tau) <= {1}  # empty if there is nothing to wait for
    # Mirrored and transposed back, the canonical frame reads the same pixels as the kernel.
    marked = torch.zeros(kernel_size)
    marked[oracles.pivot(name, kernel_size)] = 1
    canonical = stencil.canonical(marked, code, len(kernel_size))
    assert torch.equal(stencil.from_canonical(canonical, code, len(kernel_size)), marked)


@over_cases()
def test_masks_and_diagonal_are_those_of_the_definition(case: Case):
    weight, stencils = case.weight(), case.stencils
    masked, on_diagonal = (f(weight.shape, stencils) for f in (stencil.masked_entries, stencil.diagonal_entries))
    diagonal = oracles.diagonal(weight, case.corners)
    assert torch.equal(masked, oracles.masked(weight.shape, case.corners))
    assert torch.equal(stencil.pivot_diagonal(weight, stencils), diagonal)
    assert torch.equal(weight[on_diagonal], diagonal)
    assert torch.equal(stencil.masked_entries(weight.shape, stencils, diagonal=True), masked | on_diagonal)
