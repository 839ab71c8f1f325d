"""The adapter for torch.distributions: the contract of a transform, and use inside torch's, Pyro's and zuko's flows."""

import copy
import io
import math
import pickle
import re

import pyro
import pytest
import torch
import zuko
from adapters import check_deep_copy, check_directions, check_training, scatter
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    Normal,
    Transform,
    TransformedDistribution,
)
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import nflows_kconv
from nflows_kconv.distributions import InvertibleConv2d

SHAPE = (4, 4, 2)  # of an image

TRANSFORMS = {
    "four corners": lambda: InvertibleConv2d(4),
    "one group": lambda: InvertibleConv2d(4, corners="TL"),
    "learned, bias": lambda: InvertibleConv2d(4, corners=("BR", "TL"), diagonal="learned", bias=True),
    "rectangular": lambda: InvertibleConv2d(4, (2, 5), corners=("TR",), diagonal="learned"),
    "cached": lambda: InvertibleConv2d(4, diagonal="learned", cache_size=1),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    pyro.clear_param_store()


@pytest.fixture(params=TRANSFORMS.values(), ids=TRANSFORMS.keys())
def transform(request):
    return scatter(request.param())


def noise(dtype=torch.float32):
    return Normal(torch.zeros(SHAPE, dtype=dtype), torch.ones(SHAPE, dtype=dtype))


def standard_normal_log_prob(z):
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum((-3, -2, -1))


def both(transform):
    """Returns a transform as a function that also returns the log-determinant."""

    def function(x):
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)

    return function


def test_is_a_transform_and_the_core_layer():
    transform = InvertibleConv2d(4)
    assert isinstance(transform, Transform)
    assert isinstance(transform, nflows_kconv.InvertibleConv2d)
    assert transform.bijective and transform.inv.bijective
    assert transform.sign == transform.inv.sign == 1
    assert transform.event_dim == transform.inv.event_dim == 3
    assert transform.domain.check(torch.randn(2, *SHAPE)).shape == (2,)
    assert transform.inv.inv is transform
    assert transform.forward_shape((7, *SHAPE)) == transform.inverse_shape((7, *SHAPE)) == (7, *SHAPE)
    assert repr(transform).startswith("InvertibleConv2d(4, kernel_size=(3, 3)")


def test_both_directions(transform):
    transform = transform.double()
    check_directions(both(transform), both(transform.inv), torch.randn(2, 1, *SHAPE, dtype=torch.float64))


def test_the_sign_is_that_of_the_determinant(transform):
    transform = transform.double()
    jacobian = torch.autograd.functional.jacobian(transform, torch.randn(SHAPE, dtype=torch.float64))
    assert torch.linalg.det(jacobian.reshape(math.prod(SHAPE), -1)).sign() == transform.sign


@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    size=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16)),
)
def test_any_batch_shape_is_the_core_layer_on_each_image(batch, size, dtype):
    torch.manual_seed(0)
    transform = scatter(InvertibleConv2d(4, diagonal="learned", bias=True)).to(dtype)
    inputs = torch.randn(*batch, 4, *size).to(dtype)
    images = inputs.reshape(math.prod(batch), 4, *size)
    for actual, core in ((both(transform), transform.forward), (both(transform.inv), transform.inverse)):
        outputs, log_abs_det = actual(inputs)
        expected, expected_log_abs_det = core(images)
        assert outputs.shape == inputs.shape
        assert log_abs_det.shape == tuple(batch)
        assert torch.equal(outputs.reshape(expected.shape), expected)
        assert_close(log_abs_det.flatten(), expected_log_abs_det, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (4,), (3, 3)], ids=str)
def test_rejects_what_is_no_image(shape):
    transform = InvertibleConv2d(4)
    for function in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=re.escape(f"[..., C, H, W], got shape {shape}")):
            function(torch.zeros(shape))


def test_rejects_wrong_channels():
    with pytest.raises(ValueError, match="input must have the weight's 4 channels, got 3"):
        InvertibleConv2d(4)(torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    "build", [lambda: InvertibleConv2d(4, cache_size=2), lambda: InvertibleConv2d(4).with_cache(2)]
)
def test_rejects_another_cache_size(build):
    with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
        build()


def test_a_transformed_distribution_has_the_density_of_the_change_of_variables(transform):
    x = torch.randn(5, 2, *SHAPE)
    z, log_abs_det = transform.forward(x.flatten(0, 1))
    density = TransformedDistribution(noise(), [transform.inv], validate_args=True)
    expected = standard_normal_log_prob(z) + log_abs_det
    assert density.event_shape == SHAPE
    assert_close(density.log_prob(x).flatten(), expected)
    z, log_abs_det = transform.inverse(x.flatten(0, 1))
    density = TransformedDistribution(noise(), transform)
    assert_close(density.log_prob(x).flatten(), standard_normal_log_prob(z) + log_abs_det)


def test_a_transformed_distribution_among_other_transforms_with_a_batch_shape():
    inner = scatter(InvertibleConv2d(4, diagonal="learned"))
    density = TransformedDistribution(
        Independent(Normal(torch.zeros(6, 1, *SHAPE), 1.0), 3), [AffineTransform(1.0, 2.0), inner.inv]
    ).expand((6, 2))
    assert density.batch_shape == (6, 2)
    assert density.event_shape == SHAPE
    x = density.rsample((3,))
    assert x.shape == (3, 6, 2, *SHAPE)
    z = (inner(x) - 1) / 2
    expected = standard_normal_log_prob(z) - math.prod(SHAPE) * math.log(2) + inner.log_abs_det_jacobian(x, None)
    assert_close(density.log_prob(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["convolution", "solution"])
def test_training_lowers_the_loss(direction):
    transforms = [InvertibleConv2d(4, corners=corner, diagonal="learned", bias=True) for corner in ("TL", "BR")]
    density = TransformedDistribution(
        noise(), [transform.inv if direction == "convolution" else transform for transform in transforms]
    )
    data = torch.randn(64, *SHAPE).cumsum(2) + 1
    check_training(nn.ModuleList(transforms), lambda: -density.log_prob(data).mean())


def test_a_cache_gives_back_the_same_tensors():
    transform = scatter(InvertibleConv2d(4, cache_size=1))
    x = torch.randn(2, *SHAPE)
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    assert transform(x.clone()) is not y
    plain = transform.with_cache(0)
    assert plain(x) is not plain(x)


def step_of_an_optimizer(transform):
    transform.bias.grad = torch.ones_like(transform.bias)
    torch.optim.SGD([transform.bias], 1.0).step()


@pytest.mark.parametrize(
    "change",
    [
        step_of_an_optimizer,
        lambda transform: transform.load_state_dict(scatter(InvertibleConv2d(4, bias=True)).state_dict()),
        lambda transform: transform.load_state_dict(scatter(InvertibleConv2d(4, bias=True)).state_dict(), assign=True),
        lambda transform: transform.double().float(),
    ],
    ids=["optimizer", "load_state_dict", "assign", "to"],
)
def test_a_cache_forgets_when_parameters_change(change):
    transform = scatter(InvertibleConv2d(4, bias=True, cache_size=1))
    x = torch.randn(2, *SHAPE)
    y = transform(x)
    change(transform)
    assert transform.inv(y) is not x
    y = transform(x)
    change(transform)
    assert transform(x) is not y
    assert_close(transform(x), transform.forward(x)[0])


def test_a_cache_forgets_when_pruning_changes():
    transform = scatter(InvertibleConv2d(4, cache_size=1))
    x = torch.randn(2, *SHAPE)
    for amount in (0.2, 0.9):
        prune.l1_unstructured(transform, "raw_weight", amount)
        assert_close(transform(x), transform.forward(x)[0])


def test_a_cache_and_copies_follow_a_spectral_norm():
    transform = parametrizations.spectral_norm(InvertibleConv2d(4, corners="TL", cache_size=1), "raw_weight")
    x = torch.randn(2, *SHAPE)
    y = transform(x)
    assert transform.inv(y) is not x  # training has changed the estimate of the norm
    y = transform.eval()(x)
    assert transform.inv(y) is x
    twin = copy.deepcopy(transform)
    with torch.no_grad():
        transform.parametrizations.raw_weight.original.add_(torch.randn(4, 4, 3, 3))
    assert_close(transform(x), transform.forward(x)[0])
    assert_close(twin(x), y)
    assert not torch.allclose(transform(x), y)


def test_a_cache_works_with_parameters_of_inference_mode():
    with torch.inference_mode():
        transform = InvertibleConv2d(4, cache_size=1)
        x = torch.randn(SHAPE)
        assert transform(x) is transform(x)


def test_with_cache_shares_the_parameters():
    transform = InvertibleConv2d(4, diagonal="learned")
    cached = transform.with_cache()
    assert cached is not transform and cached.with_cache(1) is cached
    assert cached.with_cache(0).raw_weight is cached.raw_weight is transform.raw_weight
    transform.double()
    assert cached(torch.zeros(SHAPE, dtype=torch.float64)).dtype == torch.float64
    assert cached.inv.inv is cached and transform.inv.inv is transform
    normed = parametrizations.spectral_norm(transform, "raw_weight").eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    cached = ComposeTransform([normed]).with_cache().parts[0]
    assert cached(x) is cached(x) and torch.equal(cached(x), normed(x))


def test_copies_take_no_cache_along():
    transform = InvertibleConv2d(4, cache_size=1)
    x = torch.randn(SHAPE, requires_grad=True)
    y = transform(x)
    assert transform.inv(y) is x
    for twin in (copy.copy(transform), copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert twin.inv.inv is twin
        assert twin(x) is not y
        assert_close(twin(x), y)
    parametrizations.weight_norm(transform, "raw_weight")
    transform.inv(transform(x))
    twin = copy.deepcopy(transform)
    assert twin.inv.inv is twin
    assert_close(twin.inv(x), transform.inv(x))


def test_a_deep_copy_is_equal_and_independent(transform):
    check_deep_copy(transform, torch.randn(8, *SHAPE))


def test_in_pyro_a_model_learns_the_parameters():
    transform = InvertibleConv2d(4, diagonal="learned", bias=True)
    data = torch.randn(64, *SHAPE).cumsum(2) + 1

    def model(images):
        pyro.module("transform", transform)
        density = pyro.distributions.TransformedDistribution(noise(), [transform.inv])
        with pyro.plate("images", len(images)):
            return pyro.sample("image", density, obs=images)

    optimizer = pyro.optim.Adam({"lr": 0.02})
    inference = pyro.infer.SVI(model, lambda images: None, optimizer, pyro.infer.Trace_ELBO())
    expected = -TransformedDistribution(noise(), [transform.inv]).log_prob(data).sum().item()
    losses = [inference.step(data) for _ in range(30)]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 64
    names = {f"transform$$${name}" for name, _ in transform.named_parameters()}
    assert set(pyro.get_param_store().keys()) == names


def test_in_zuko_a_flow_holds_the_parameters():
    transforms = [scatter(InvertibleConv2d(4, corners=corner, diagonal="learned")) for corner in ("TL", "BR")]
    flow = zuko.flows.Flow(
        [zuko.lazy.UnconditionalTransform(nn.Identity(), transform) for transform in transforms],
        zuko.lazy.UnconditionalDistribution(noise),
    )
    assert len(list(flow.parameters())) == 4
    x, log_prob = flow().rsample_and_log_prob((5,))
    assert x.shape == (5, *SHAPE)
    z, first = transforms[0].forward(x)
    z, second = transforms[1].forward(z)
    assert_close(flow().log_prob(x), standard_normal_log_prob(z) + first + second, rtol=1e-4, atol=1e-4)
    assert_close(log_prob, flow().log_prob(x), rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)().log_prob(x), flow().log_prob(x))
    check_training(flow, lambda: -flow().log_prob(torch.randn(64, *SHAPE).cumsum(2) + 1).mean())
