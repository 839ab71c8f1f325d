"""The adapter for nflows: the contract of a transform, and use inside its containers and flows."""

import re

import pytest
import torch
from adapters import check_deep_copy, check_missing_library, check_saved_state, check_training, scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    CompositeTransform,
    InverseTransform,
    MultiscaleCompositeTransform,
    OneByOneConvolution,
    SqueezeTransform,
    Transform,
)
from torch import nn
from torch.testing import assert_close

import nflows_kconv
from nflows_kconv.nflows import InvertibleConv1x1, InvertibleConv2d
from nflows_kconv.testing import check_transform, strategies

# nflows' 1x1 convolution uses it to invert.
pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")

SHAPE = (4, 4, 2)  # of an image


class ContextNet(nn.Module):
    """A coupling's network that takes the context."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.linear = nn.Linear(3, out_channels)

    def forward(self, inputs, context=None):
        outputs = self.conv(inputs).tanh()
        return outputs if context is None else outputs + self.linear(context)[:, :, None, None]


def composite():
    coupling = AffineCouplingTransform([1, 0, 1, 0], ContextNet)
    return CompositeTransform([InvertibleConv2d(4), ActNorm(4), OneByOneConvolution(4), coupling])


def multiscale():
    transform = MultiscaleCompositeTransform(2)
    shape = transform.add_transform(composite(), SHAPE)
    level = CompositeTransform(
        [
            SqueezeTransform(),
            InvertibleConv2d(8, corners="TL", diagonal="learned"),
            InvertibleConv2d(8, corners="BR", bias=True),
        ]
    )
    transform.add_transform(level, (4 * shape[0], shape[1] // 2, shape[2] // 2))
    return transform


TRANSFORMS = {
    "four corners": lambda: InvertibleConv2d(4),
    "one group": lambda: InvertibleConv2d(4, corners="TL"),
    "learned, bias": lambda: InvertibleConv2d(4, corners=("BR", "TL"), diagonal="learned", bias=True),
    "rectangular": lambda: InvertibleConv2d(4, (2, 5), corners=("TR",), diagonal="learned"),
    "1x1": lambda: InvertibleConv1x1(4),
    "InverseTransform": lambda: InverseTransform(InvertibleConv2d(4, diagonal="learned", bias=True)),
    "CompositeTransform": composite,
    "MultiscaleCompositeTransform": multiscale,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=TRANSFORMS.values(), ids=TRANSFORMS.keys())
def transform(request):
    return scatter(request.param())


def images(batch, dtype=torch.float32):
    return torch.randn(batch, *SHAPE, dtype=dtype)


def test_is_a_transform_and_the_core_layer():
    layer = InvertibleConv2d(4)
    assert isinstance(layer, Transform)
    assert isinstance(layer, nflows_kconv.InvertibleConv2d)


def test_meets_the_contract_of_transforms(transform):
    check_transform(transform, images(3))


@settings(max_examples=10)
@given(data=st.data(), conditioning=st.sampled_from(("well", "ill")))
def test_any_layer_meets_the_contract_of_transforms(data, conditioning):
    layer = data.draw(strategies.layers(InvertibleConv2d, conditioning=conditioning))
    check_transform(layer, data.draw(strategies.images(layer.num_channels, height=3)))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (4, 3, 3), (1, 2, 4, 3, 3)], ids=str)
def test_rejects_a_wrong_rank(direction, shape):
    with pytest.raises(ValueError, match=re.escape(f"4 dimensions [B, C, H, W], got shape {shape}")):
        getattr(InvertibleConv2d(4), direction)(torch.zeros(shape))


@pytest.mark.parametrize("context", [None, torch.randn(2, 3)], ids=["no context", "context"])
def test_flow(transform, context):
    with torch.no_grad():
        shape = transform(images(8))[0].shape[1:]
        flow = Flow(transform, StandardNormal(shape)).eval()
        samples, log_prob = flow.sample_and_log_prob(5, context=context)
        leading = (5,) if context is None else (2, 5)
        assert flow.sample(5, context=context).shape == samples.shape == (*leading, *SHAPE)
        repeated = None if context is None else context.repeat_interleave(5, 0)
        expected = flow.log_prob(samples.reshape(-1, *SHAPE), context=repeated)
        assert_close(log_prob.flatten(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda t: t, InverseTransform], ids=["convolution", "solution"])
def test_training_lowers_the_loss_and_keeps_the_inverse(wrap):
    layers = [InvertibleConv2d(4, corners=corner, diagonal="learned", bias=True) for corner in ("TL", "BR")]
    flow = Flow(CompositeTransform([wrap(layer) for layer in layers]), StandardNormal(SHAPE))
    data = images(64).cumsum(2) + 1
    check_training(flow, lambda: -flow.log_prob(data).mean())
    noise = flow.transform_to_noise(data)
    assert_close(flow._transform.inverse(noise)[0], data, rtol=1e-4, atol=1e-4)


def test_a_deep_copy_is_equal_and_independent(transform):
    check_deep_copy(transform, images(8))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_saved_state_gives_the_same_results(name):
    check_saved_state(TRANSFORMS[name], images(8))


def test_without_nflows_the_error_names_the_extra(monkeypatch):
    check_missing_library(monkeypatch, "nflows", "nflows.transforms.base")
