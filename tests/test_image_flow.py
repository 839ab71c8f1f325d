"""Flows of images, sequences and volumes in both libraries: density, samples, and arguments."""

from __future__ import annotations

import inspect
import math
from typing import Any

import nflows.flows
import normflows
import pytest
import sklearn.datasets
import torch
from nflows.transforms import MultiscaleCompositeTransform
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv.diagnostics import round_trip
from nflows_kconv.flows import steps
from nflows_kconv.flows.image_flow import Architecture
from nflows_kconv.flows.sampling import GraphSampler
from nflows_kconv.layer import InvertibleConv
from nflows_kconv.stencil import CORNERS
from nflows_kconv.testing import check_transform

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}
# `build` also changes masked entries.
pytestmark = pytest.mark.filterwarnings("ignore:.* nonzero entries that the layer ignores")
in_both = pytest.mark.parametrize("library", LIBRARIES)
SHAPE = (3, 8, 12)
SHAPES = {"sequence": (3, 16), "image": SHAPE, "volume": (1, 4, 8, 4)}
in_any_dimension = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def build(
    library: str, shape=SHAPE, levels: int = 2, steps: int = 2, *, trained: bool = True, **arguments
) -> nn.Module:
    """Returns a flow in float64 with all parameters changed from their initial values."""
    torch.manual_seed(0)
    flow = LIBRARIES[library](shape, levels, steps, hidden_channels=8, **arguments).double()
    flow.eval()
    if trained:
        with torch.no_grad():
            for parameter in flow.parameters():  # in whatever order a library has them
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.05)
    return flow


def random_images(count: int = 3, shape=SHAPE) -> Tensor:
    return torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(1)).double()


def log_prob(flow: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    torch.manual_seed(2)  # of the dequantisation noise
    return flow.log_prob(images, labels)


def to_latent(flow: nn.Module, library: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the latent variable, [B, D], and the log-determinant."""
    if library == "nflows":
        return flow._transform(images)
    parts, log_abs_det = flow.inverse_and_log_det(images)
    return torch.cat([part.flatten(1) for part in reversed(parts)], 1), log_abs_det


@in_any_dimension
def test_both_libraries_have_the_same_density(shape):
    images = random_images(3, shape)
    first, *_, last = CORNERS[len(shape) - 1]
    for arguments in (
        {},
        {"kernel_size": None},
        {"kernel_size": (2, 3, 1)[: len(shape) - 1], "corners": ((first,), (last,)), "diagonal": "learned"},
        {"direction": "inverse", "dilation": 2},
        {"padding_mode": "circular", "levels": 1, "kernel_size": 2, "diagonal": "learned", "max_inverse_gain": 3},
        {"levels": 1, "corners": last},
    ):
        of_nflows, of_normflows = (log_prob(build(library, shape, **arguments), images) for library in LIBRARIES)
        assert of_nflows.shape == (3,)
        torch.testing.assert_close(of_nflows, of_normflows)


@in_both
@in_any_dimension
def test_noise_may_be_given(library, shape):
    flow, images = build(library, shape), random_images(3, shape)
    torch.manual_seed(2)
    noise, expected = torch.rand_like(images), log_prob(flow, images)
    torch.testing.assert_close(flow.log_prob(images, noise=noise), expected)
    if library == "normflows":
        torch.testing.assert_close(flow.forward_kld(images, noise=noise), -expected.mean())
    # Noise that float32 rounds to 1 stays in the cell.
    flow, images, noise = flow.float(), images.float(), torch.full(images.shape, 1 - 2**-40, dtype=torch.float64)
    expected = flow.log_prob(images, noise=torch.full_like(images, 1 - 2**-24))
    assert torch.equal(flow.log_prob(images, noise=noise), expected)


@in_both
def test_noise_must_fit(library):
    flow, images = build(library), random_images(2)
    for wrong, error, message in (
        (torch.rand(2, 3, 8), ValueError, r"noise must have the data's shape \(2, 3, 8, 12\), got \(2, 3, 8\)"),
        (torch.ones_like(images), ValueError, "noise must be at least 0 and less than 1, got 1 to 1"),
        (torch.zeros_like(images, dtype=torch.int64), TypeError, "a floating-point tensor, got torch.int64"),
        (0.5, TypeError, "a tensor, got float"),
    ):
        with pytest.raises(error, match=message):
            flow.log_prob(images, noise=wrong)
    with pytest.raises(ValueError, match=r"noise must be None for continuous data, got torch\.float64"):
        build(library, preprocessing=None).log_prob(images, noise=torch.rand_like(images))


def test_both_libraries_start_from_the_same_parameters():
    flows = [build(library, trained=False) for library in LIBRARIES]
    first, second = (sorted(p.double().sum().item() for p in flow.parameters()) for flow in flows)
    assert first == second


@in_both
@pytest.mark.parametrize("shape", [(2, 16), (2, 4, 4), (1, 4, 4, 4)])
def test_the_density_is_that_of_the_jacobian(library, shape):
    """log p(x) = log N(z; 0, I) + log |det dz/dx| - D log 256 for the preprocessed real numbers."""
    flow = build(library, shape, diagonal="learned")
    images = random_images(1, shape)

    def latent(numbers: Tensor) -> Tensor:
        return flow._to_latent(numbers[None], None)[0][0]

    torch.manual_seed(2)
    uniform = (images + torch.rand_like(images)) / 256
    squeezed = 1e-6 + (1 - 2e-6) * uniform
    numbers = squeezed.logit()[0]
    jacobian = torch.autograd.functional.jacobian(latent, numbers).flatten(1)
    z = latent(numbers)
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    expected -= math.prod(shape) * math.log(256) + (squeezed * (1 - squeezed) / (1 - 2e-6)).log().sum()
    torch.testing.assert_close(log_prob(flow, images)[0], expected)


@in_both
@in_any_dimension
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_circular_flows_know_no_borders(library, shape, direction):
    """Shifts by 2^levels pixels keep the density, unlike for other flows."""
    fields, axes = random_images(3, shape) / 64 - 2, tuple(range(2, len(shape) + 1))
    for levels, kernel_size in ((1, 2), (2, None)):
        shifted = fields.roll([2**levels] * len(axes), axes)
        for padding_mode, same in (("circular", True), ("zeros", False)):
            options = dict(padding_mode=padding_mode, kernel_size=kernel_size, direction=direction, preprocessing=None)
            flow = build(library, shape, levels, **options)
            assert torch.allclose(flow.log_prob(fields), flow.log_prob(shifted)) == same
            torch.testing.assert_close(flow.decode(flow.encode(fields)[0]), fields)


@in_both
@in_any_dimension
def test_samples_are_whole_numbers(library, shape):
    flow = build(library, shape).float()
    with torch.no_grad():
        samples = flow.sample(5)
    samples = samples if library == "nflows" else samples[0]
    assert samples.shape == (5, *shape)
    assert torch.equal(samples, samples.floor())
    assert samples.min() >= 0
    assert samples.max() <= 255
    assert samples.unique().numel() > 100


def test_they_are_the_libraries_own_flows():
    flow = build("nflows")
    assert isinstance(flow, nflows.flows.Flow)
    assert any(isinstance(module, MultiscaleCompositeTransform) for module in flow.modules())
    assert isinstance(build("normflows"), normflows.MultiscaleFlow)


@in_both
def test_every_step_has_what_the_arguments_say(library):
    def layers(**arguments) -> list[InvertibleConv]:
        flow = build(library, **arguments)
        norms = [module for module in flow.modules() if isinstance(module, steps.ActNorm)]
        assert len(norms) == 4
        return [module for module in flow.modules() if isinstance(module, InvertibleConv)]

    assert layers(kernel_size=None) == []
    for shape in SHAPES.values():
        first, *_, last = CORNERS[len(shape) - 1]
        pairs = layers(shape=shape, dilation=2)
        assert [layer.corners for layer in pairs] == [(first,), (last,)] * 4
        assert {layer.dilation for layer in pairs} == {(2,) * (len(shape) - 1)}
    units = layers(corners=CORNERS[2], kernel_size=(3, 1), diagonal="learned")
    assert [(layer.corners, layer.kernel_size, layer.diagonal) for layer in units] == [
        (CORNERS[2], (3, 1), "learned")
    ] * 4


@in_both
def test_the_cifar_model_has_46_million_parameters(library):
    with torch.device("meta"):
        count = sum(p.numel() for p in LIBRARIES[library]((3, 32, 32), 3, 32).parameters())
    assert 45.5e6 < count < 46.5e6


@in_both
def test_glow_differs_in_the_convolution_alone(library):
    ours, glow = build(library, trained=False), build(library, trained=False, kernel_size=None)
    more = sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in glow.parameters())
    assert more == sum(4 * channels * channels * 9 for channels in (12, 24))


@in_both
def test_a_call_is_the_loss_of_the_library_and_fires_hooks_once(library):
    flow, images, calls = build(library), random_images(), []
    sign = 1 if library == "nflows" else -1  # normflows' forward is the negative log-likelihood
    flow.register_forward_hook(lambda *_: calls.append("hook"))
    torch.manual_seed(2)
    torch.testing.assert_close(sign * flow(images), log_prob(flow, images))
    assert calls == ["hook"] * 2


@in_both
def test_the_first_batch_normalises(library):
    flow, images = build(library, trained=False), random_images(64)
    flow.train()
    latent, _ = to_latent(flow, library, images)
    first_norm = next(module for module in flow.modules() if isinstance(module, steps.ActNorm))
    assert first_norm.initialized
    assert latent.mean().abs() < 0.05
    assert (latent.std() - 1).abs() < 0.05
    before = first_norm.shift.clone()
    to_latent(flow, library, images[:5])
    assert torch.equal(first_norm.shift, before)


@in_both
def test_classes_shift_the_latent_variable(library):
    flow, images = build(library, num_classes=4), random_images(4)
    zero, one, mixed = (log_prob(flow, images, torch.tensor(y)) for y in ([0] * 4, [1] * 4, [0, 1, 0, 1]))
    assert (zero != one).all()
    assert torch.equal(mixed, torch.stack([zero, one], 1)[range(4), [0, 1, 0, 1]])
    labels = torch.tensor([3, 1])
    with torch.no_grad():
        samples = flow.float().sample(2, labels) if library == "nflows" else flow.float().sample(2, labels)[0]
    assert samples.shape == ((2, 2, *SHAPE) if library == "nflows" else (2, *SHAPE))


CONDITIONS = {
    "none": {},
    "classes": {"num_classes": 3},
    "vector": {"context_shape": (5,)},
    "vector, for kernels too": {"context_shape": (5,), "conditional_kernels": True},
    "image": {"context_shape": (2, 5, 7)},
    "classes and image": {"num_classes": 3, "context_shape": (2, 8, 12)},
}


def arguments_of(condition: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Adapts arguments to this shape: the context becomes a sequence or a volume like the data."""
    given = dict(CONDITIONS[condition])
    if "image" in condition:
        given["context_shape"] = (2, *(shape[1:] if condition == "classes and image" else (5, 7, 3)[: len(shape) - 1]))
    return given


def random_condition(
    num_classes: int | None = None,
    context_shape: tuple[int, ...] | None = None,
    conditional_kernels: bool = False,
    count: int = 3,
):
    """Returns a condition for a flow with these arguments."""
    generator = torch.Generator().manual_seed(4)
    classes = None if num_classes is None else torch.randint(num_classes, (count,), generator=generator)
    if context_shape is None:
        return classes
    tensor = torch.randn(count, *context_shape, generator=generator)
    return tensor if classes is None else (classes, tensor)


@pytest.mark.parametrize(
    ("condition", "shape"),
    [
        *((condition, (3, 8, 16)) for condition in CONDITIONS),
        *(("classes and image", s) for s in [(3, 16), (1, 8, 8, 8)]),
    ],
)
@pytest.mark.parametrize(("source", "target"), [("nflows", "normflows"), ("normflows", "nflows")])
def test_states_of_one_library_load_into_the_other(condition, shape, source, target):
    conditions = arguments_of(condition, shape)
    first, *_, last = CORNERS[len(shape) - 1]
    arguments = conditions | {"levels": 3, "shape": shape, "corners": ((first,), (last,))}
    flow, other = build(source, **arguments), build(target, trained=False, **arguments)
    images, context = random_images(3, shape), random_condition(**conditions)
    state = flow.state_dict()
    names, metadata = list(state), dict(state._metadata)
    assert other.load_state_dict(state) == ([], [])
    assert (list(state), state._metadata) == (names, metadata), "the state_dict was changed"
    torch.testing.assert_close(*(log_prob(each, images, context) for each in (flow, other)))
    assert all(map(torch.equal, *(each.encode(images, context) for each in (flow, other))))
    flow.load_state_dict(other.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
    wrong = build(target, **arguments | {"corners": ((last,), (first,))})
    with pytest.raises(RuntimeError, match=rf"corners must match the layer's \('{last}',\), got \('{first}',\)"):
        wrong.load_state_dict(state)


@in_both
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_every_digit_comes_back_from_its_encoding_through_a_trained_flow(library, direction):
    digits = sklearn.datasets.load_digits()
    images, classes = torch.from_numpy(digits.images).float()[:, None], torch.from_numpy(digits.target)
    torch.manual_seed(0)
    arguments = {"num_levels": 17, "num_classes": 10, "context_shape": (3,), "direction": direction}
    flow, tensor = LIBRARIES[library]((1, 8, 8), 2, 2, hidden_channels=16, **arguments), torch.randn(len(images), 3)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(8):
        chosen = torch.randperm(len(images))[:64]
        loss = -flow.log_prob(images[chosen], context=(classes[chosen], tensor[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.eval()
    latent, log_abs_det = flow.encode(images, (classes, tensor))
    assert latent.shape == (len(images), 64) and log_abs_det.shape == (len(images),)
    assert torch.equal(latent, flow.encode(images, (None, tensor))[0]), "neither noise nor classes are in a latent"
    decoded = flow.decode(latent, (None, tensor))
    assert torch.equal(decoded, images)
    assert not decoded.requires_grad, "a graph whose gradients are zero"


@in_both
@pytest.mark.parametrize("shape", [(1, 32), (1, 4, 8), (1, 4, 4, 4)])
def test_continuous_data(library, shape):
    """The density in data units follows from the latent and the Jacobian, and the latent equals the library's."""
    flow = build(library, shape, preprocessing=None)
    data = 100 * torch.randn(2, *shape, dtype=torch.float64)
    latent, log_abs_det = flow.encode(data)
    normal = torch.distributions.Normal(0, 1).log_prob(latent).sum(1)
    torch.testing.assert_close(flow.log_prob(data), normal + log_abs_det)
    torch.testing.assert_close(flow.decode(latent), data)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow.decode(z[None])[0].flatten(), latent[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, -log_abs_det[0])
    if library == "nflows":
        assert torch.equal(flow.transform_to_noise(data), latent)
    else:
        latents, _ = flow.inverse_and_log_det(data)
        assert [part.shape[1:] for part in reversed(latents)] == list(flow.latent_shapes)
        assert torch.equal(torch.cat([part.flatten(1) for part in reversed(latents)], 1), latent)
    samples = flow.sample(2) if library == "nflows" else flow.sample(2)[0]
    assert not torch.equal(samples, samples.round())
    with pytest.raises(TypeError, match=r"continuous data must be floating-point, got torch\.uint8"):
        flow.log_prob(data.byte())


@in_both
def test_numbers_of_levels(library):
    flow = build(library, num_levels=32)
    images = random_images() % 32
    assert log_prob(flow, images).isfinite().all()
    samples = flow.sample(9) if library == "nflows" else flow.sample(9)[0]
    assert samples.min() >= 0 and 24 < samples.max() <= 31
    for call in (flow.log_prob, flow.encode):
        with pytest.raises(ValueError, match=r"whole numbers in 0\.\.31, got 32"):
            call(torch.full((1, *SHAPE), 32.0))


@in_both
@in_any_dimension
@pytest.mark.parametrize("condition", ["vector", "image", "classes and image"])
def test_contexts_have_no_effect_at_the_start_and_one_on_every_part_later(library, shape, condition):
    arguments, images = arguments_of(condition, shape), random_images(3, shape)
    context = random_condition(**arguments)
    classes, tensor = context if isinstance(context, tuple) else (None, context)
    other = tensor + 1 if classes is None else (classes, tensor + 1)
    for trained in (False, True):
        flow = build(library, shape, trained=trained, **arguments)
        there, back = (flow.encode(images, each)[0] for each in (context, other))
        assert ((there != back).any(0) == trained).all()
        assert torch.equal(flow.decode(there, context), images)
    for module in flow.modules():  # the learned prior also takes it
        if isinstance(module, steps.AffineCoupling) and isinstance(module.network, nn.Sequential):
            nn.init.zeros_(module.network[-1].weight)
    there, back = (flow.encode(images, each)[0] for each in (context, other))
    assert (there != back)[:, : there.shape[1] // 2].all()


@pytest.mark.parametrize("size", [(3,), (2, 3), (2, 3, 1)])
def test_contexts_of_another_size_are_averaged(size):
    coupling = steps.AffineCoupling(steps.CONVOLUTIONS[len(size)](4, 4, 1), context_channels=2).double()
    input, context = torch.randn(3, 4, *size).double(), torch.randn(3, 2, *(3 * number for number in size)).double()
    small = context
    for axis in range(2, input.dim()):
        small = small.unflatten(axis, (-1, 3)).mean(axis + 1)
    torch.testing.assert_close(coupling(input, context), coupling(input, small))
    vectors = torch.randn(3, 2).double()
    everywhere = torch.ones(size).double() * vectors.view(3, 2, *[1] * len(size))
    torch.testing.assert_close(coupling(input, vectors), coupling(input, everywhere))


def test_a_context_adds_the_information_that_it_has():
    """For data y = 1.5 c + noise the context c adds I(y; c) = D/2 log(1 + 1.5^2) to the log-density."""

    def data(count: int) -> tuple[Tensor, Tensor]:
        context = torch.randn(count, 4)
        return 1.5 * context.view(count, 1, 2, 2) + torch.randn(count, 1, 2, 2), context

    held_out = []
    for context_shape in (None, (4,)):
        torch.manual_seed(0)
        flow = LIBRARIES["nflows"]((1, 2, 2), 1, 2, hidden_channels=16, preprocessing=None, context_shape=context_shape)
        optimizer = torch.optim.Adam(flow.parameters(), 0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 100)
        for _ in range(100):
            images, context = data(128)
            loss = -flow(images, context if context_shape else None).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        images, context = data(4000)
        with torch.no_grad():
            held_out.append(flow(images, context if context_shape else None).mean().item())
    assert held_out[1] - held_out[0] == pytest.approx(2 * math.log(1 + 1.5**2), rel=0.05)


@in_both
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("preprocessing", ["images", None])
def test_samples_have_the_documented_shape_and_no_graph(library, condition, preprocessing):
    flow = build(library, **CONDITIONS[condition], preprocessing=preprocessing, max_inverse_gain=4)
    context = random_condition(**CONDITIONS[condition])
    if library == "nflows":
        rows = () if context is None else (3,)
        for batch_size in (None, 1, 4, 6, 9):
            images = flow.sample(6, context, batch_size)
            assert images.shape == (*rows, 6, *SHAPE) and not images.requires_grad
        images, density = flow.sample_and_log_prob(6, context)
        assert images.shape == (*rows, 6, *SHAPE) and density.shape == (*rows, 6)
        images, density = images.flatten(0, -4), density.flatten()
        repeated = random_condition(**CONDITIONS[condition])
        if isinstance(repeated, tuple):
            repeated = tuple(part.repeat_interleave(6, 0) for part in repeated)
        elif repeated is not None:
            repeated = repeated.repeat_interleave(6, 0)
    else:
        images, density = flow.sample(3, context=context)
        assert images.shape == (3, *SHAPE) and density.shape == (3,)
        repeated = context
    assert not images.requires_grad and not density.requires_grad
    assert images.dtype == density.dtype == torch.float64
    if preprocessing is None:
        torch.testing.assert_close(flow.log_prob(images, context=repeated), density)


@in_both
def test_classes_under_vmap(library):
    """Gradients of each image, as differential privacy clips them."""
    flow, images, noise = build(library, num_classes=3), random_images(3), torch.rand(3, *SHAPE).double()
    classes, names = torch.tensor([2, 0, 1]), ("context", "noise")

    def loss(parameters, image, *others):
        options = {name: other[None] for name, other in zip(names, others, strict=True)}
        return torch.func.functional_call(flow, parameters, (image[None],), options)[0]

    parameters = dict(flow.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, images, classes, noise)
    flow(images, context=classes, noise=noise).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name].sum(0), parameter.grad)


@in_both
def test_flows_can_be_linearized(library):
    """Recording reads no values."""
    flow, images = build(library, levels=1, steps=1), random_images(2)
    tangent = torch.randn_like(images)
    latent, linear = torch.func.linearize(lambda x: flow.encode(x)[0], images)
    expected = torch.func.jvp(lambda x: flow.encode(x)[0], (images,), (tangent,))
    torch.testing.assert_close((latent, linear(tangent)), expected)


@in_both
def test_each_row_of_samples_has_its_own_class(library):
    flow = build(library, num_classes=4, preprocessing=None, trained=False)
    with torch.no_grad():  # means far apart, so every number of a latent shows its class
        if library == "nflows":
            flow._distribution._context_encoder.weight.copy_(
                torch.cat([100.0 * torch.arange(4)[:, None].expand(4, 288), torch.zeros(4, 288)], 1)
            )
            samples = flow.sample(6, torch.arange(4), batch_size=4).flatten(0, 1)
            expected = torch.arange(4).repeat_interleave(6)
        else:
            for base in flow.q0:
                base.loc.copy_(100 * torch.arange(4))
            samples = flow.sample(y=torch.arange(4))[0]
            expected = torch.arange(4)
            drawn = (flow.encode(flow.sample(9)[0])[0] / 100).round()
            assert (drawn == drawn[:, :1]).all() and len(drawn[:, 0].unique()) > 1, "a class for all levels"
    assert torch.equal((flow.encode(samples)[0] / 100).round(), expected[:, None].expand(-1, 288).double())


def test_conditions_of_normflows_come_as_y_or_as_context():
    images = random_images()
    for name, arguments in CONDITIONS.items():
        flow, context = build("normflows", **arguments), random_condition(**arguments)
        expected = log_prob(flow, images, context)
        ways = [{"context": context}, {"y": context}]
        ways += [{"y": context[0], "context": context[1]}] if name == "classes and image" else []
        for way in ways:
            torch.manual_seed(2)
            assert torch.equal(flow.log_prob(images, **way), expected)
            torch.manual_seed(2)
            assert torch.equal(flow.forward_kld(images, **way), -expected.mean())
            assert flow.sample(3, **way)[0].shape == (3, *SHAPE)
            latents, _ = flow.inverse_and_log_det(images.byte(), **way)
            assert torch.equal(flow.forward_and_log_det(latents, **way)[0], images)
    assert flow.sample(context=context[1])[0].shape == (3, *SHAPE)  # the classes are drawn
    with pytest.raises(ValueError, match="y and context must not both be given"):
        build("normflows", num_classes=3).log_prob(images, context[0], context[0])


@in_both
@pytest.mark.parametrize(("condition", "shape"), [("vector", (1, 4, 4)), ("classes and image", (1, 8))])
def test_the_tools_take_conditional_flows(library, shape, condition):
    arguments = arguments_of(condition, shape)
    flow, context = build(library, shape, steps=1, **arguments).float(), random_condition(**arguments, count=2)
    images = random_images(2, shape)
    assert round_trip(flow, images, context).error < 1e-4
    check_transform(flow, images.byte(), context=context)
    assert GraphSampler(flow, 2)(labels=context).shape == (2, *shape)


@pytest.mark.parametrize("temperature", [-1, math.inf, math.nan, "warm"])
def test_temperatures(temperature):
    flow = build("normflows", num_classes=2)
    with pytest.raises((TypeError, ValueError), match="temperature must be"):
        flow.sample(2, temperature=temperature)
    assert torch.equal(*flow.sample(2, torch.tensor([1, 1]), temperature=0)[0]), "the image of the mean"
    assert flow.q0[0].temperature is None
    flow.set_temperature(1e-30)
    assert torch.equal(*flow.sample(2, torch.tensor([1, 1]))[0]), "what set_temperature says holds"


@in_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_are_refused(library, dtype):
    flow = build(library).to(dtype)
    latent = torch.zeros(2, 288)
    calls = [lambda: flow.log_prob(random_images().byte()), lambda: flow.sample(2), lambda: flow.decode(latent)]
    for call in calls:
        with pytest.raises(TypeError, match=rf"parameters must be float32 or float64, .*, got {dtype}; .*autocast"):
            call()


@in_both
@pytest.mark.parametrize("condition", ["none", "classes and image"])
def test_a_float32_flow_makes_no_float64_tensor(library, condition):
    class No64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for value in torch.utils._pytree.tree_leaves(result):
                assert not isinstance(value, Tensor) or value.dtype != torch.float64, function
            return result

    flow, context = build(library, **CONDITIONS[condition]).float(), random_condition(**CONDITIONS[condition])
    assert all(tensor.dtype != torch.float64 for tensor in (*flow.parameters(), *flow.buffers()))
    images = random_images().byte()
    with No64():
        flow(images, context).sum().backward()
        flow.decode(flow.encode(images, context)[0], context)
        flow.sample(3, context)


@in_both
@pytest.mark.parametrize("condition", ["none", "classes and image"])
def test_compiled_and_replicated_flows(library, condition):
    arguments, sign = CONDITIONS[condition], 1 if library == "nflows" else -1
    flow = build(library, levels=1, steps=1, **arguments).float()
    calls = [replica(flow)]
    if (library, condition) != ("nflows", "classes and image"):  # which the next test compiles
        calls.append(torch.compile(flow, backend="eager", fullgraph=True, dynamic=True))
    for call in calls:
        for count in (4, 3):
            images, context = random_images(count).byte(), random_condition(**arguments, count=count)
            expected = log_prob(flow, images, context)
            torch.manual_seed(2)
            torch.testing.assert_close(sign * call(images, context), expected)


def test_the_compiler_may_take_only_the_batch_of_a_context_as_dynamic():
    """It does where only that has changed from call to call."""
    arguments = CONDITIONS["classes and image"]
    flow, images = build("nflows", levels=1, steps=1, **arguments), random_images()
    context = random_condition(**arguments)
    for part in context:
        torch._dynamo.maybe_mark_dynamic(part, 0)
    torch.manual_seed(2)
    actual = torch.compile(flow, backend="eager", fullgraph=True)(images, context)
    torch.testing.assert_close(actual, log_prob(flow, images, context))


class Method(nn.Module):
    """A method of a flow as a `forward`, for torch.export."""

    def __init__(self, flow: nn.Module, name: str) -> None:
        super().__init__()
        self.flow, self.name = flow, name

    def forward(self, input: Tensor, context: Any) -> Tensor:
        return getattr(self.flow, self.name)(input, context)


# docs/deploy.md has one that is neither reversible nor conditioned.
@pytest.mark.parametrize(
    ("library", "direction", "condition"),
    [("nflows", "inverse", "vector"), ("normflows", "forward", "classes and image")],
)
def test_exported_flows_take_any_batch(library, direction, condition, tmp_path):
    """Both directions, once loaded; the one that convolves decomposes into plain ATen."""
    conditions = CONDITIONS[condition]
    flow = build(library, levels=1, steps=1, corners="TR", direction=direction, reversible=True, **conditions)
    latents = torch.randn(5, math.prod(SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for name, input, solves in (
        ("log_prob", random_images(5).byte(), direction == "inverse"),
        ("decode", latents, direction == "forward"),
    ):
        inputs, others = ((input[:count], random_condition(count=count, **conditions)) for count in (3, 5))
        sizes = tree_map_only(Tensor, lambda _: {0: torch.export.Dim("B")}, inputs)
        program = torch.export.export(Method(flow, name), inputs, dynamic_shapes=sizes)
        if not solves:
            program = program.run_decompositions()
            assert not any("nflows_kconv" in str(node.target) for node in program.graph.nodes)
        torch.export.save(program, tmp_path / "program.pt2")
        torch.manual_seed(2)  # of the dequantisation noise
        expected = getattr(flow, name)(*others)
        torch.manual_seed(2)
        torch.testing.assert_close(torch.export.load(tmp_path / "program.pt2").module()(*others), expected)


def test_flows_are_exported_after_their_first_batch():
    flow = build("nflows", trained=False).train()
    with pytest.raises(RuntimeError, match="its first batch, or be in evaluation mode"):
        torch.export.export(flow, (random_images(),))


def replica(module: nn.Module) -> nn.Module:
    """Makes replicas as DataParallel does, with tensors instead of parameters."""
    copies = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, copy in copies.items():
        for name, child in part._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        for name, parameter in part._parameters.items():
            setattr(copy, name, None if parameter is None else parameter * 1)
    return copies[module]


@in_both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"data_shape": (3, 30, 32)},
            "sizes in data_shape must be multiples of 2\\^levels = 4 for 2 levels, got 30 x 32",
        ),
        ({"data_shape": (3, 6)}, "sizes in data_shape must be multiples of 2\\^levels = 4 for 2 levels, got 6"),
        ({"data_shape": (3,)}, r"data_shape must be \(C, L\) or \(C, H, W\) or \(C, D, H, W\), got \(3,\)"),
        ({"data_shape": (0, 8, 8)}, "sizes in data_shape must be at least 1, got 0"),
        ({"data_shape": (1, 8, 8, 8), "corners": ("NTL", "FBR", "NTR")}, "multiple of the number of corners, got 8"),
        (
            {"data_shape": (1, 8), "context_shape": (2, 3, 4)},
            r"context_shape must be \(E,\) or \(E, L\), got \(2, 3, 4\)",
        ),
        ({"levels": 0}, "levels must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"hidden_channels": 0}, "hidden_channels must be at least 1"),
        ({"direction": "backward"}, 'direction must be "forward" or "inverse"'),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"corners": ("TL", "XX")}, "corners must be one or more of"),
        ({"corners": ()}, "corners must be one or more of"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"diagonal": "none"}, "diagonal must be"),
        ({"padding_mode": "reflect"}, 'padding_mode must be "zeros" or "circular", got \'reflect\''),
        (
            {"padding_mode": "circular", "corners": "TL"},
            "corners must be left out with padding_mode=\"circular\", got 'TL'",
        ),
        ({"padding_mode": "circular", "dilation": 2}, 'dilation must be 1 with padding_mode="circular", got 2'),
        (
            {"padding_mode": "circular", "kernel_size": (3, 2)},
            'at most the size of the last level with padding_mode="circular", 2 x 3, got 3 x 2',
        ),
        ({"num_levels": 1}, "num_levels must be between 2 and 65536, got 1"),
        ({"num_levels": 32, "preprocessing": None}, 'num_levels needs preprocessing="images", got 32'),
        ({"preprocessing": "logit"}, "preprocessing must be \"images\" or None, got 'logit'"),
        ({"context_shape": (2, 3)}, r"context_shape must be \(E,\) or \(E, H, W\), got \(2, 3\)"),
        ({"context_shape": (0,)}, "sizes in context_shape must be at least 1, got 0"),
        ({"conditional_kernels": True}, r"conditional_kernels needs context_shape=\(E,\), got None"),
        ({"conditional_kernels": True, "context_shape": (2, 4, 4)}, r"conditional_kernels needs .* got \(2, 4, 4\)"),
        ({"conditional_kernels": True, "context_shape": (2,), "kernel_size": None}, "needs a kernel_size, got None"),
        (
            {"conditional_kernels": True, "context_shape": (2,), "kernel_size": 2, "padding_mode": "circular"},
            'conditional_kernels needs padding_mode="zeros", got "circular"',
        ),
    ],
)
def test_arguments_must_fit(library, arguments, message):
    with pytest.raises(ValueError, match=message):
        LIBRARIES[library](**({"data_shape": SHAPE, "levels": 2, "steps": 1, "hidden_channels": 4} | arguments))


@in_both
@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 1.5),
        ("corners", 3),
        ("data_shape", None),
        ("data_shape", 32),
        ("reversible", "yes"),
        ("conditional_kernels", 1),
        ("context_shape", 3),
    ],
)
def test_arguments_have_types(library, name, value):
    with pytest.raises(TypeError, match=f"{name} must .*, got {value!r}"):
        LIBRARIES[library](**{"data_shape": SHAPE, "levels": 2, "steps": 1, "hidden_channels": 4, name: value})


@in_both
def test_images_must_fit(library):
    flow = build(library)
    with pytest.raises(ValueError, match=r"data must have shape \[B, 3, 8, 12\], got \(2, 1, 8, 12\)"):
        flow.log_prob(random_images(2)[:, :1])
    for wrong in (-1.0, 256.0, float("nan")):
        images = random_images(2)
        images[1, 2, 3, 4] = wrong
        with pytest.raises(ValueError, match="255"):
            flow.log_prob(images)


@in_both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_images_may_have_any_dtype(library, dtype):
    for flow in (build(library), build(library).float()):
        density = log_prob(flow, random_images().to(dtype))
        assert density.dtype == next(flow.parameters()).dtype
        torch.testing.assert_close(density, log_prob(flow, random_images().to(density.dtype)))


ENTRIES = {
    "nflows": ("log_prob", "__call__", "encode", "transform_to_noise", "decode"),
    "normflows": (
        *("log_prob", "__call__", "forward_kld", "encode", "inverse_and_log_det", "decode", "forward_and_log_det"),
    ),
}
WRONG = {
    "None": None,
    "a list": [1.0],
    "an array": random_images(2).numpy(),
    "complex": random_images(2).to(torch.complex64),
    "a number": torch.tensor(1.0),
    "one dimension": torch.zeros(3),
    "other channels": random_images(2)[:, :2],
    "no rows": random_images(0),
    "another device": random_images(2).to("meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("library", "entry"), [(each, entry) for each in LIBRARIES for entry in ENTRIES[each]])
def test_every_entry_checks_what_it_takes(library, entry, wrong):
    """Before random numbers are drawn."""
    value = WRONG[wrong]
    if isinstance(value, Tensor) and entry == "decode":
        value = value.flatten(1) if value.dim() > 1 and "channels" not in wrong else value
    if isinstance(value, Tensor) and entry == "forward_and_log_det" and value.dim() > 1:
        value = [value.new_zeros(len(value), *shape) for shape in ((24, 2, 3), (6, 4, 6))]
        value = value[:1] if "channels" in wrong else value
    flow, state = build(library), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=r"^(data|latents?) must .*, got "):
        getattr(flow, entry)(value)
    assert torch.equal(torch.get_rng_state(), state)


@in_both
@pytest.mark.parametrize("number", [0, -1, 1.5, None, True, "2", torch.tensor(2)], ids=repr)
def test_numbers_of_samples_must_be_positive_integers(library, number):
    flow = build(library)
    for name in ("sample", "sample_and_log_prob") if library == "nflows" else ("sample",):
        with pytest.raises((TypeError, ValueError), match=r"^num_samples must .*, got "):
            getattr(flow, name)(number)


CONDITIONS_ELSEWHERE = {
    "classes": torch.zeros(2, dtype=torch.int64, device="meta"),
    "vector": torch.zeros(2, 5, device="meta"),
    "classes and image": (torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 2, 8, 12)),
}


@in_both
@pytest.mark.parametrize("condition", CONDITIONS_ELSEWHERE)
def test_conditions_must_be_on_the_flows_device(library, condition):
    flow, context = build(library, **CONDITIONS[condition]), CONDITIONS_ELSEWHERE[condition]
    for call in (lambda: flow.log_prob(random_images(2), context=context), lambda: flow.sample(2, context=context)):
        with pytest.raises(ValueError, match=r"^(context|y).* must be on the flow's device cpu, got meta"):
            call()
    noise = torch.zeros(2, *SHAPE, device="meta")
    with pytest.raises(ValueError, match=r"^noise must be on the flow's device cpu, got meta"):
        build(library).log_prob(random_images(2), noise=noise)


@in_both
def test_classes_must_fit(library):
    name = "context" if library == "nflows" else "y"
    flow, images = build(library, num_classes=4), random_images(3)
    for wrong, error, message in (
        (torch.tensor([0, 1, 4]), ValueError, r"classes from 0 to 3, got \[0, 1, 4\]"),
        (torch.tensor([0, -1, 2]), ValueError, r"classes from 0 to 3, got \[0, -1, 2\]"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\], one class per image, got \(2,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), ValueError, r"shape \[3\], one class per image, got \(3, 5\)"),
        (torch.rand(3), TypeError, "whole numbers, the classes of the images, got torch.float32"),
        ([0, 1, 2], TypeError, "a tensor, got list"),
        (torch.ones(3).to_sparse(), TypeError, "a dense tensor, got layout torch.sparse_coo"),
    ):
        with pytest.raises(error, match=f"{name} must .*{message}"):
            log_prob(flow, images, wrong)
    with pytest.raises(ValueError, match=f"{name} must give the classes of the images"):
        log_prob(flow, images)
    draws = [flow.sample, flow.sample_and_log_prob] if library == "nflows" else [flow.sample]
    for draw in draws:
        with pytest.raises(ValueError, match=f"{name} must be classes from 0 to 3, got \\[7\\]"):
            draw(1, torch.tensor([7]))
    flow = build(library)
    for call in (lambda: log_prob(flow, images, torch.zeros(3)), lambda: flow.sample(3, torch.zeros(3))):
        with pytest.raises(ValueError, match=f"{name} must be None for a flow without classes or context"):
            call()


@in_both
def test_contexts_must_fit(library):
    flow, images = build(library, context_shape=(5,)), random_images(3)
    for wrong, error, message in (
        (None, ValueError, r"must be a tensor of shape \[3, 5\] for a flow with a context, got None"),
        (torch.zeros(3, 4), ValueError, r"must have shape \[3, 5\], one row per image, got \(3, 4\)"),
        (torch.zeros(2, 5), ValueError, r"must have shape \[3, 5\], one row per image, got \(2, 5\)"),
        (torch.zeros(3, 5, dtype=torch.complex64), TypeError, "must be real, got torch.complex64"),
        ([0.0] * 5, TypeError, "must be a tensor, got list"),
        (torch.ones(3, 5).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    ):
        for call in (flow.log_prob, flow.encode):
            with pytest.raises(error, match=f"context {message}"):
                call(images, wrong)
    assert torch.equal(log_prob(flow, images, torch.ones(3, 5).byte()), log_prob(flow, images, torch.ones(3, 5)))
    flow = build(library, context_shape=(5,), num_classes=4)
    for wrong in (torch.zeros(3, 5), torch.zeros(3), (torch.zeros(3),) * 3):
        with pytest.raises(TypeError, match=r"context must be \(classes, tensor\) for a flow with classes"):
            flow.log_prob(images, wrong)
    with pytest.raises(ValueError, match=r"context\[0\] must be classes from 0 to 3"):
        flow.log_prob(images, (torch.tensor([0, 1, 4]), torch.zeros(3, 5)))
    with pytest.raises(ValueError, match=r"context\[0\] must give the classes of the images"):
        flow.log_prob(images, (None, torch.zeros(3, 5)))
    with pytest.raises(ValueError, match=r"context\[1\] must have shape \[3, 5\]"):
        flow.log_prob(images, (torch.tensor([0, 1, 3]), torch.zeros(3, 4)))


@in_both
def test_latents_must_fit(library):
    flow = build(library)
    for wrong, error, message in (
        (torch.zeros(2, 287), ValueError, r"shape \[B, 288\], got \(2, 287\)"),
        (torch.zeros(0, 288), ValueError, r"shape \[B, 288\], got \(0, 288\)"),
        (torch.zeros(2, 288, dtype=torch.int64), TypeError, "a floating-point tensor, got torch.int64"),
        (flow.latent_shapes, TypeError, "a tensor, got tuple"),
        (torch.ones(2, 288).to_sparse(), TypeError, "a dense tensor, got layout torch.sparse_coo"),
    ):
        with pytest.raises(error, match=f"latent must .*{message}"):
            flow.decode(wrong)
    if library == "normflows":
        latents, _ = flow.inverse_and_log_det(random_images())
        for wrong in (latents[:1], latents[::-1], flow.encode(random_images())[0]):
            with pytest.raises(ValueError, match=r"latents must have the shapes .*of .*, got "):
                flow.forward_and_log_det(wrong)


@in_both
def test_classes_of_any_integers(library):
    flow, images, classes = build(library, num_classes=4), random_images(3), torch.tensor([3, 0, 1])
    expected = log_prob(flow, images, classes)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(log_prob(flow, images, classes.to(dtype)), expected)
    if library == "normflows":
        one_hot = torch.nn.functional.one_hot(classes, 4)
        torch.testing.assert_close(log_prob(flow, images, one_hot), expected)


@in_both
@pytest.mark.filterwarnings("ignore")  # torch warns about prototypes
def test_images_must_be_a_dense_tensor(library):
    images = random_images().float()
    for wrong, message in (
        (images.numpy(), "a tensor, got ndarray"),
        (images.to_sparse(), "a dense tensor, got layout torch.sparse_coo"),
        (torch.nested.nested_tensor([images[0]]), "a dense tensor, got a nested tensor"),
        (torch.quantize_per_tensor(images, 1.0, 0, torch.quint8), "a dense tensor, got torch.quint8"),
    ):
        for call in (flow := build(library), flow.encode):
            with pytest.raises(TypeError, match=f"data must be {message}"):
                call(wrong)


@in_both
@pytest.mark.parametrize(
    ("shape", "latents", "levels"),
    [
        ((3, 16), ((3, 8), (3, 4), (6, 2)), ((6, 8), (6, 4), (6, 2))),
        ((3, 16, 8), ((6, 8, 4), (12, 4, 2), (48, 2, 1)), ((12, 8, 4), (24, 4, 2), (48, 2, 1))),
        ((1, 8, 8, 8), ((4, 4, 4, 4), (16, 2, 2, 2), (128, 1, 1, 1)), ((8, 4, 4, 4), (32, 2, 2, 2), (128, 1, 1, 1))),
    ],
)
def test_the_levels_halve_and_grow(library, shape, latents, levels):
    flow = LIBRARIES[library](shape, 3, 1, hidden_channels=2)
    assert flow.latent_shapes == latents
    assert flow.architecture.level_shapes == levels


@in_both
def test_the_arguments_are_those_of_the_architecture(library):
    finc_flow = LIBRARIES[library]
    signature = inspect.signature(finc_flow)
    assert signature.parameters == inspect.signature(Architecture).parameters
    assert signature.return_annotation == "ImageFlow"
    for name in signature.parameters:
        assert f"\n    {name}: " in finc_flow.__doc__
    with pytest.raises(TypeError, match=r"finc_flow\(\) got an unexpected keyword argument 'hiden_channels'"):
        finc_flow(SHAPE, 2, 1, hiden_channels=4)
