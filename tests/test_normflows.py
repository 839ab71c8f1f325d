"""The adapter for normflows: normflows' own test of a flow, use inside its models, and exchange with nflows."""

import inspect
import re

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows as nf
import pytest
import torch
from adapters import check_deep_copy, check_missing_library, check_saved_state, check_training, scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from normflows.flows import flow_test
from torch import nn
from torch.testing import assert_close

import nflows_kconv
import nflows_kconv.nflows
from nflows_kconv.flows import steps
from nflows_kconv.normflows import GlowBlock, InvertibleConv1x1, InvertibleConv2d
from nflows_kconv.testing import check_transform, strategies

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")  # from normflows' 1x1 convolution

SHAPE = (4, 4, 2)  # of an image


FLOWS = {
    "four corners": lambda: InvertibleConv2d(4),
    "one group": lambda: InvertibleConv2d(4, corners="TL"),
    "learned, bias": lambda: InvertibleConv2d(4, corners=("BR", "TL"), diagonal="learned", bias=True),
    "rectangular": lambda: InvertibleConv2d(4, (2, 5), corners=("TR",), diagonal="learned"),
    "1x1": lambda: InvertibleConv1x1(4),
    "Reverse": lambda: nf.flows.Reverse(InvertibleConv2d(4, diagonal="learned", bias=True)),
    "Composite": lambda: nf.flows.Composite([InvertibleConv2d(4, corners=c, diagonal="learned") for c in ("TL", "BR")]),
    "GlowBlock": lambda: GlowBlock(4, 8),
    "GlowBlock, all arguments": lambda: GlowBlock(
        *(4, 8, True, "exp", "channel_inv", 0.1, False, False, True),
        kernel_size=(2, 3),
        corners=("BR",),
        dilation=2,
        diagonal="learned",
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=FLOWS.values(), ids=FLOWS.keys())
def flow(request):
    flow = scatter(request.param())
    with torch.no_grad():
        flow(images(8))  # initialises ActNorm
    return flow


def images(batch, dtype=torch.float32):
    return torch.randn(batch, *SHAPE, dtype=dtype)


def test_is_a_flow_and_the_core_layer():
    layer = InvertibleConv2d(4)
    assert isinstance(layer, nf.flows.Flow)
    assert isinstance(layer, nflows_kconv.InvertibleConv2d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_passes_the_test_of_normflows(flow, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    flow_test.FlowTest().checkForwardInverse(flow.to(dtype), images(3, dtype), atol=tolerance, rtol=tolerance)


def test_is_a_sound_transform_with_a_log_det_for_each_image(flow):
    inputs = images(3)
    check_transform(flow, inputs)
    assert flow(inputs)[1].shape == flow.inverse(inputs)[1].shape == (3,)


@settings(max_examples=10)
@given(data=st.data(), conditioning=st.sampled_from(("well", "ill")))
def test_any_layer_is_a_flow(data, conditioning):
    layer = data.draw(strategies.layers(InvertibleConv2d, conditioning=conditioning))
    check_transform(layer, data.draw(strategies.images(layer.num_channels, height=3)))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_rejects_a_wrong_rank(direction):
    with pytest.raises(ValueError, match=re.escape("4 dimensions [B, C, H, W], got shape (4, 3, 3)")):
        getattr(InvertibleConv2d(4), direction)(torch.zeros(4, 3, 3))


def test_glow_block_is_the_one_of_normflows_with_the_layer_next_to_the_data():
    *others, second, first = GlowBlock(3, 8).flows
    assert [type(flow).__name__ for flow in others] == ["AffineCouplingBlock", "Invertible1x1Conv", "ActNorm"]
    assert (first.corners, second.corners) == (("TL",), ("BR",))
    ours = inspect.signature(GlowBlock).parameters.values()
    theirs = inspect.signature(nf.flows.GlowBlock).parameters.values()
    positional = [parameter for parameter in ours if parameter.kind is not parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def test_glow_block_rejects_channels_that_do_not_divide_before_any_work():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="num_channels must be a multiple of the number of corners, got 6"):
        GlowBlock(6, 8, corners=("TL", "TR", "BL", "BR"))
    assert torch.equal(torch.get_rng_state(), state)


def multiscale(num_classes=None):
    """Builds two levels with GlowBlocks on images [4, 4, 2], with a bare layer next to the data, before any squeeze."""
    bases = [nf.distributions.GlowBase(shape, num_classes) for shape in ((8, 2, 1), (2, 4, 2))]
    flows = [
        [GlowBlock(8, 8), GlowBlock(8, 8, corners="TL"), nf.flows.Squeeze()],
        [
            GlowBlock(4, 8, corners=(("TL",), "BR")),
            InvertibleConv2d(4, diagonal="learned"),
            InvertibleConv2d(4, corners="BR"),
        ],
    ]
    model = nf.MultiscaleFlow(bases, flows, [nf.flows.Merge()], class_cond=num_classes is not None)
    model.log_prob(images(16), torch.zeros(16, dtype=torch.long))
    return scatter(model)


def test_multiscale_flow():
    model = multiscale()
    samples, log_prob = model.sample(6)
    assert samples.shape == (6, *SHAPE)
    assert_close(model.log_prob(samples, None), log_prob, rtol=1e-4, atol=1e-4)
    assert_close(model.forward_kld(samples), -log_prob.mean(), rtol=1e-4, atol=1e-4)
    assert_close(model(samples), -log_prob, rtol=1e-4, atol=1e-4)
    latents, log_det = model.inverse_and_log_det(samples)
    restored, inverse_log_det = model.forward_and_log_det(latents)
    assert_close(restored, samples, rtol=1e-4, atol=1e-4)
    assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)


def test_multiscale_flow_of_classes():
    model = multiscale(num_classes=3)
    with torch.no_grad():
        for base in model.q0:
            base.loc_cc.normal_()
    classes = torch.tensor([0, 1, 2, 0])
    samples, log_prob = model.sample(y=classes)
    assert_close(model.log_prob(samples, classes), log_prob, rtol=1e-4, atol=1e-4)
    assert (model.log_prob(samples, classes) != model.log_prob(samples, classes.flip(0))).any()
    assert model.forward_kld(samples, classes).isfinite()


def test_normalizing_flow(flow):
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(SHAPE), [flow])
    samples, log_prob = model.sample(5)
    assert_close(model.log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)
    assert_close(model.forward_kld(samples), -log_prob.mean(), rtol=1e-4, atol=1e-4)
    assert_close(model.forward(model.inverse(samples)), samples, rtol=1e-4, atol=1e-4)


def test_reverse_kld():
    target = nf.distributions.DiagGaussian(SHAPE, trainable=False)
    layer = scatter(InvertibleConv2d(4, diagonal="learned"))
    nf.NormalizingFlow(nf.distributions.DiagGaussian(SHAPE), [layer], target).reverse_kld(16).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


class Encoder(nn.Module):
    """Returns mean and log-scale of an image's pixels per context, concatenated in the last dimension."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 64)

    def forward(self, context):
        return self.linear(context).view(-1, 4, 4, 4)


def test_conditional_normalizing_flow():
    layers = [scatter(InvertibleConv2d(4, corners=c, diagonal="learned", bias=True)) for c in ("TL", "BR")]
    base = nf.distributions.base.ConditionalDiagGaussian(SHAPE, Encoder())
    model = nf.ConditionalNormalizingFlow(base, layers)
    context = torch.randn(5, 3)
    samples, log_prob = model.sample(5, context=context)
    assert_close(model.log_prob(samples, context), log_prob, rtol=1e-4, atol=1e-4)
    assert_close(model.forward_kld(samples, context), -log_prob.mean(), rtol=1e-4, atol=1e-4)
    latents, log_det = model.inverse_and_log_det(samples, context)
    restored, inverse_log_det = model.forward_and_log_det(latents, context)
    assert_close(restored, samples, rtol=1e-4, atol=1e-4)
    assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_shift_in_place_after_the_layer_leaves_the_gradients_right(direction):
    layer = scatter(InvertibleConv2d(4, diagonal="learned"))
    shift = nf.transforms.Shift(0.7)
    inputs = images(3).requires_grad_()

    def gradients(copy):
        outputs = copy(getattr(layer, direction)(inputs)[0])
        shifted, _ = getattr(shift, direction)(outputs)
        assert shifted is outputs
        return torch.autograd.grad(shifted.pow(3).sum(), [inputs, *layer.parameters()])

    for actual, expected in zip(gradients(lambda x: x), gradients(torch.clone), strict=True):
        assert torch.equal(actual, expected)


LAYER = {"kernel_size": (3, 2), "corners": ("TL", "BR"), "diagonal": "learned", "bias": True}


@pytest.mark.parametrize(
    ("normflows_class", "core_class", "nflows_class", "arguments"),
    [
        (InvertibleConv2d, nflows_kconv.InvertibleConv2d, nflows_kconv.nflows.InvertibleConv2d, LAYER),
        (InvertibleConv1x1, steps.InvertibleConv1x1, nflows_kconv.nflows.InvertibleConv1x1, {}),
    ],
    ids=["layer", "1x1"],
)
def test_states_move_between_the_libraries_with_identical_results(normflows_class, core_class, nflows_class, arguments):
    in_normflows = scatter(normflows_class(4, **arguments))
    core = core_class(4, **arguments)
    in_nflows = nflows_class(4, **arguments)
    core.load_state_dict(in_normflows.state_dict())
    in_nflows.load_state_dict(core.state_dict())
    assert in_nflows.state_dict().keys() == in_normflows.state_dict().keys() == core.state_dict().keys()
    inputs = images(3)
    for convolve in (core, in_nflows, in_normflows.inverse):
        for actual, expected in zip(convolve(inputs), core(inputs), strict=True):
            assert torch.equal(actual, expected)
    for solve in (core.inverse, in_nflows.inverse, in_normflows):
        for actual, expected in zip(solve(inputs), core.inverse(inputs), strict=True):
            assert torch.equal(actual, expected)


def test_the_same_weights_give_the_same_density_in_both_libraries():
    corners = ("TL", "BR")
    flows = [scatter(InvertibleConv2d(4, corners=corner, diagonal="learned", bias=True)) for corner in corners]
    transforms = [
        nflows_kconv.nflows.InvertibleConv2d(4, corners=corner, diagonal="learned", bias=True) for corner in corners
    ]
    for transform, flow in zip(transforms, flows, strict=True):
        transform.load_state_dict(flow.state_dict())
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(SHAPE, trainable=False), flows[::-1])
    other = nflows.flows.Flow(
        nflows.transforms.CompositeTransform(transforms), nflows.distributions.StandardNormal(SHAPE)
    )
    inputs = images(5)
    assert_close(model.log_prob(inputs), other.log_prob(inputs))


@pytest.mark.parametrize("wrap", [lambda flow: flow, nf.flows.Reverse], ids=["convolution", "solution"])
def test_training_lowers_the_loss_and_keeps_the_inverse(wrap):
    layers = [InvertibleConv2d(4, corners=corner, diagonal="learned", bias=True) for corner in ("BR", "TL")]
    base = nf.distributions.DiagGaussian(SHAPE, trainable=False)
    model = nf.NormalizingFlow(base, [wrap(layer) for layer in layers])
    data = images(64).cumsum(2) + 1
    check_training(model, lambda: model.forward_kld(data))
    assert_close(model.forward(model.inverse(data)), data, rtol=1e-4, atol=1e-4)


def test_a_deep_copy_is_equal_and_independent(flow):
    check_deep_copy(flow, images(8))


@pytest.mark.parametrize("name", FLOWS)
def test_a_saved_state_gives_the_same_results(name):
    check_saved_state(FLOWS[name], images(8))


def test_without_normflows_the_error_names_the_extra(monkeypatch):
    check_missing_library(monkeypatch, "normflows", "normflows")
