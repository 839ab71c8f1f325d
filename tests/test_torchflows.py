"""The adapter for torchflows, inside its compositions and flows."""

import math
import re

import pytest
import torch
from adapters import (
    check_deep_copy,
    check_directions,
    check_missing_library,
    check_saved_state,
    check_training,
    scatter,
)
from torch.testing import assert_close
from torchflows.bijections.base import Bijection, BijectiveComposition, invert
from torchflows.bijections.finite.autoregressive.layers import ElementwiseAffine
from torchflows.flows import Flow

import nflows_kconv
from nflows_kconv.torchflows import InvertibleConv2d

# torchflows indexes with lists.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")

SHAPE = (4, 4, 2)  # of an image

BIJECTIONS = {
    "four corners": lambda: InvertibleConv2d(SHAPE),
    "learned, bias": lambda: InvertibleConv2d(SHAPE, corners=("BR", "TL"), diagonal="learned", bias=True),
    "rectangular": lambda: InvertibleConv2d(SHAPE, kernel_size=(2, 5), corners="TR"),
    "inverted": lambda: invert(InvertibleConv2d(SHAPE, diagonal="learned", bias=True)),
    "composition": lambda: BijectiveComposition(
        [InvertibleConv2d(SHAPE, corners="TL", diagonal="learned"), ElementwiseAffine(SHAPE), InvertibleConv2d(SHAPE)]
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=BIJECTIONS.values(), ids=BIJECTIONS.keys())
def bijection(request):
    return scatter(request.param())


def test_is_a_bijection_and_the_core_layer():
    bijection = InvertibleConv2d(SHAPE, context_shape=(3,))
    assert isinstance(bijection, Bijection)
    assert isinstance(bijection, nflows_kconv.InvertibleConv2d)
    # Attributes that the constructor of Bijection sets.
    expected = Bijection(SHAPE, (3,))
    for name in ("event_shape", "context_shape", "n_dim"):
        assert getattr(bijection, name) == getattr(expected, name)


def test_both_directions(bijection):
    bijection = bijection.double()
    check_directions(bijection, bijection.inverse, torch.randn(2, 1, *SHAPE, dtype=torch.float64))


def test_a_flow_has_the_density_of_the_change_of_variables(bijection):
    flow = Flow(bijection)
    x = flow.sample((5,))
    z, log_abs_det = bijection(x)
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum((-3, -2, -1))
    assert_close(flow.log_prob(x), normal + log_abs_det, rtol=1e-4, atol=1e-4)
    assert flow.sample((5, 2)).shape == (5, 2, *SHAPE)


def test_training_lowers_the_loss():
    layers = [InvertibleConv2d(SHAPE, corners=corner, diagonal="learned", bias=True) for corner in ("TL", "BR")]
    flow = Flow(BijectiveComposition(layers))
    data = torch.randn(64, *SHAPE).cumsum(2) + 1
    check_training(flow, lambda: -flow.log_prob(data).mean())


def test_a_checkpoint_comes_from_the_core_layer():
    core = scatter(nflows_kconv.InvertibleConv2d(4, diagonal="learned", bias=True))
    bijection = InvertibleConv2d(SHAPE, diagonal="learned", bias=True)
    bijection.load_state_dict(core.state_dict())
    x = torch.randn(2, *SHAPE)
    assert torch.equal(bijection(x, context=torch.zeros(2, 3))[0], core(x)[0])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (1, 4, 4, 2)], ids=str)
def test_rejects_what_is_no_image(shape):
    with pytest.raises(ValueError, match=re.escape(f"event_shape must be (C, H, W), got {shape}")):
        InvertibleConv2d(shape)
    if len(shape) < 3:
        with pytest.raises(ValueError, match=re.escape(f"[..., C, H, W], got shape {shape}")):
            InvertibleConv2d(SHAPE)(torch.zeros(shape))


def test_a_deep_copy_is_equal_and_independent():
    check_deep_copy(scatter(BIJECTIONS["composition"]()), torch.randn(8, *SHAPE))


@pytest.mark.parametrize("name", ["learned, bias", "composition"])
def test_a_saved_state_gives_the_same_results(name):
    check_saved_state(BIJECTIONS[name], torch.randn(8, *SHAPE))


def test_without_torchflows_the_error_names_the_extra(monkeypatch):
    check_missing_library(monkeypatch, "torchflows", "torchflows.bijections.base")
