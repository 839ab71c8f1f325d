"""The image flow of both libraries: the density, the samples, what the arguments change, what they must be."""

from __future__ import annotations

import math

import nflows.flows
import normflows
import pytest
import torch
from nflows.transforms import MultiscaleCompositeTransform
from torch import Tensor, nn

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d, step
from nflows_kconv.sampling import GraphSampler

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}
in_both = pytest.mark.parametrize("library", LIBRARIES)
SHAPE = (3, 8, 12)


def build(
    library: str, shape=SHAPE, levels: int = 2, steps: int = 2, *, trained: bool = True, **arguments
) -> nn.Module:
    """A flow whose parameters are all off their initial values, in float64."""
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
    """The latent variable, [B, D], and the log-determinant."""
    if library == "nflows":
        return flow._transform(images)
    parts, log_abs_det = flow.inverse_and_log_det(images)
    return torch.cat([part.flatten(1) for part in reversed(parts)], 1), log_abs_det


def test_both_libraries_have_the_same_density():
    images = random_images()
    for arguments in (
        {},
        {"kernel_size": None},
        {"kernel_size": (2, 3), "corners": (("TL",), ("BR",)), "diagonal": "learned"},
        {"direction": "inverse"},
        {"levels": 1, "corners": "TR"},
    ):
        of_nflows, of_normflows = (log_prob(build(library, **arguments), images) for library in LIBRARIES)
        assert of_nflows.shape == (3,)
        torch.testing.assert_close(of_nflows, of_normflows)


def test_both_libraries_start_from_the_same_parameters():
    flows = [build(library, trained=False) for library in LIBRARIES]
    first, second = (sorted(p.double().sum().item() for p in flow.parameters()) for flow in flows)
    assert first == second


@in_both
def test_the_density_is_that_of_the_jacobian(library):
    """log p(x) = log N(z; 0, I) + log |det dz/dx| - D log 256 for the real numbers that the preprocessing makes."""
    flow = build(library, (2, 4, 4))
    images = random_images(1, (2, 4, 4))

    def latent(numbers: Tensor) -> Tensor:
        if library == "nflows":
            return flow._transform._transforms[1](numbers[None])[0][0]
        transform, flow.transform = flow.transform, None
        try:
            return to_latent(flow, library, numbers[None])[0][0]
        finally:
            flow.transform = transform

    torch.manual_seed(2)
    uniform = (images + torch.rand_like(images)) / 256
    squeezed = 1e-6 + (1 - 2e-6) * uniform
    numbers = squeezed.logit()[0]
    jacobian = torch.autograd.functional.jacobian(latent, numbers).flatten(1)
    z = latent(numbers)
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    expected -= 32 * math.log(256) + (squeezed * (1 - squeezed) / (1 - 2e-6)).log().sum()
    torch.testing.assert_close(log_prob(flow, images)[0], expected)


@in_both
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_images_come_back_from_the_latent_variable(library, direction):
    flow, images = build(library, direction=direction), random_images()
    if library == "nflows":
        latent, there = flow._transform(images)
        restored, back = flow._transform.inverse(latent)
    else:
        latents, there = flow.inverse_and_log_det(images)
        restored, back = flow.forward_and_log_det(latents)
    assert torch.equal(restored, images)
    torch.testing.assert_close(there, -back)


@in_both
def test_samples_are_images(library):
    flow = build(library).float()
    with torch.no_grad():
        samples = flow.sample(5)
    samples = samples if library == "nflows" else samples[0]
    assert samples.shape == (5, *SHAPE)
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
    def layers(**arguments) -> list[InvertibleConv2d]:
        flow = build(library, **arguments)
        steps = [module for module in flow.modules() if isinstance(module, step.ActNorm)]
        assert len(steps) == 4
        return [module for module in flow.modules() if isinstance(module, InvertibleConv2d)]

    assert layers(kernel_size=None) == []
    assert {layer.corners for layer in layers()} == {("TL", "TR", "BL", "BR")}
    pairs = layers(corners=(("TL",), "BR"), kernel_size=(3, 1), diagonal="learned")
    assert sorted(layer.corners for layer in pairs) == [("BR",)] * 4 + [("TL",)] * 4
    assert {(layer.kernel_size, layer.diagonal) for layer in pairs} == {((3, 1), "learned")}


@in_both
def test_the_cifar_model_has_44_million_parameters(library):
    with torch.device("meta"):
        count = sum(p.numel() for p in LIBRARIES[library]((3, 32, 32), 3, 32).parameters())
    assert 43.5e6 < count < 45e6


@in_both
def test_glow_differs_in_the_convolution_alone(library):
    ours, glow = build(library, trained=False), build(library, trained=False, kernel_size=None)
    more = sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in glow.parameters())
    assert more == sum(2 * channels * (channels // 4) * 9 for channels in (12, 24))


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
    first_norm = next(module for module in flow.modules() if isinstance(module, step.ActNorm))
    assert first_norm.initialized
    assert latent.mean().abs() < 0.05
    assert (latent.std() - 1).abs() < 0.05
    before = first_norm.shift.clone()
    to_latent(flow, library, images[:5])
    assert torch.equal(first_norm.shift, before)


@in_both
def test_a_checkpoint_knows_that_it_was_normalised(library):
    flow = build(library, trained=False).train()
    log_prob(flow, random_images(8))
    loaded = build(library, trained=False).train()
    loaded.load_state_dict(flow.state_dict())
    images = random_images(4)
    assert torch.equal(log_prob(loaded, images), log_prob(flow, images))


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


def test_classes_have_the_same_density_in_both_libraries():
    of_nflows, of_normflows = (build(library, num_classes=3) for library in LIBRARIES)
    with torch.no_grad():
        sizes = [base.d for base in reversed(of_normflows.q0)]
        means, log_scales = of_nflows._distribution._context_encoder.weight.chunk(2, 1)
        for base, mean, log_scale in zip(
            reversed(of_normflows.q0), means.split(sizes, 1), log_scales.split(sizes, 1), strict=True
        ):
            base.loc.copy_(mean.T.reshape(base.loc.shape))
            base.log_scale.copy_(log_scale.T.reshape(base.loc.shape))
    levels = next(
        module for module in of_nflows.modules() if isinstance(module, MultiscaleCompositeTransform)
    )._transforms
    for level, flows in zip(levels, reversed(of_normflows.flows), strict=True):
        ours = [part for part in level._transforms if isinstance(part, nflows_kconv.nflows.Step)]
        theirs = [part for part in reversed(flows) if isinstance(part, nflows_kconv.normflows.Step)]
        for first, second in zip(ours, theirs, strict=True):
            second.load_state_dict(first.state_dict())
    images, labels = random_images(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(log_prob(of_nflows, images, labels), log_prob(of_normflows, images, labels))


@in_both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (3, 30, 32)}, "multiples of 2\\^levels = 4 for 2 levels, got 30 x 32"),
        ({"image_shape": (3, 32)}, r"image_shape must be \(C, H, W\), got \(3, 32\)"),
        ({"image_shape": (0, 8, 8)}, "channels must be at least 1, got 0"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"hidden_channels": 0}, "hidden_channels must be at least 1"),
        ({"direction": "backward"}, 'direction must be "forward" or "inverse"'),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"corners": ("TL", "XX")}, "corners must name"),
        ({"corners": ()}, "corners must name"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"diagonal": "none"}, "diagonal must be"),
    ],
)
def test_arguments_must_fit(library, arguments, message):
    with pytest.raises(ValueError, match=message):
        LIBRARIES[library](**({"image_shape": SHAPE, "levels": 2, "steps": 1, "hidden_channels": 4} | arguments))


@in_both
def test_numbers_must_be_integers(library):
    with pytest.raises(TypeError, match=r"steps must be an integer, got 1\.5"):
        LIBRARIES[library](SHAPE, 2, 1.5)


@in_both
@pytest.mark.parametrize(
    "name, value",
    [("corners", None), ("corners", 3), ("image_shape", None), ("image_shape", 32), ("reversible", "yes")],
)
def test_arguments_have_types(library, name, value):
    with pytest.raises(TypeError, match=f"{name} must .*, got {value!r}"):
        LIBRARIES[library](**{"image_shape": SHAPE, "levels": 2, "steps": 1, "hidden_channels": 4, name: value})


@in_both
def test_images_must_fit(library):
    flow = build(library)
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, 8, 12\], got \(2, 1, 8, 12\)"):
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


@in_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_dtype_of_the_flow(library, dtype):
    flow = build(library).to(dtype)
    for images in (flow.sample(2), GraphSampler(flow, 2)()):
        images = images[0] if isinstance(images, tuple) else images  # normflows gives the log-density too
        assert images.dtype == dtype


@in_both
def test_there_must_be_an_image(library):
    with pytest.raises(ValueError, match=r"images must hold at least one image, got shape \(0, 3, 8, 12\)"):
        build(library).log_prob(random_images(0))


@in_both
def test_classes_must_fit(library):
    name = "context" if library == "nflows" else "y"
    flow, images = build(library, num_classes=4), random_images(3)
    for wrong, error, message in (
        (torch.tensor([0, 1, 4]), ValueError, r"classes from 0 to 3, got \[0, 1, 4\]"),
        (torch.tensor([0, -1, 2]), ValueError, r"classes from 0 to 3, got \[0, -1, 2\]"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\], a class for each image, got \(2,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), ValueError, r"shape \[3\], a class for each image, got \(3, 5\)"),
        (torch.rand(3), TypeError, "tensor of whole numbers, the classes of the images, got torch.float32"),
        ([0, 1, 2], TypeError, "tensor of whole numbers, the classes of the images, got list"),
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
        with pytest.raises(ValueError, match=f"{name}, the labels, must be None, as the flow has no classes"):
            call()


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
def test_images_must_be_a_tensor(library):
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        log_prob(build(library), random_images().numpy())


@in_both
def test_the_levels_halve_and_grow(library):
    flow = LIBRARIES[library]((3, 16, 8), 3, 1, hidden_channels=2)
    assert flow.latent_shapes == ((6, 8, 4), (12, 4, 2), (48, 2, 1))
    assert flow.architecture.level_shapes == ((12, 8, 4), (24, 4, 2), (48, 2, 1))
