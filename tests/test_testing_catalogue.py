"""The toolkit catches every broken transform of the catalogue."""

from __future__ import annotations

import pytest
import torch
from broken_transforms import CATALOGUE, Broken
from hypothesis import find, settings

from nflows_kconv import testing
from nflows_kconv.testing import strategies

pytestmark = pytest.mark.filterwarnings("ignore:log-determinants were not compared")
every_fault = pytest.mark.parametrize("broken", CATALOGUE, ids=lambda broken: broken.fault)


@every_fault
def test_every_fault_is_caught(broken: Broken):
    assert broken.is_caught()


@every_fault
def test_the_named_assertion_catches_it(broken: Broken):
    assert broken.is_caught(by=broken.caught_by)


@pytest.mark.parametrize(
    ("fault", "smallest"),
    [
        ("inverse wrong at H > W only", (1, 4, 2, 1)),
        ("inverse wrong at batch > 1 only", (2, 4, 1, 1)),
        ("inverse wrong at odd sizes only", (2, 4, 1, 1)),
    ],
)
def test_faults_of_some_sizes_are_found_and_shrunk(fault: str, smallest: tuple[int, ...]):
    broken = next(broken for broken in CATALOGUE if broken.fault == fault)

    def is_wrong(images: torch.Tensor) -> bool:
        try:
            testing.assert_invertible(broken.build(), images)
        except AssertionError:
            return True
        return False

    found = find(strategies.images(channels=4), is_wrong, settings=settings(database=None, deadline=None))
    assert tuple(found.shape) == smallest
