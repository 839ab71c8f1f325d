"""Diagnostics: norms against dense matrices, and errors of round trips found where they were inserted."""

import copy
import math
from itertools import chain, pairwise
from typing import Any

import FrEIA.framework
import FrEIA.modules
import normflows as nf
import pytest
import torch
import zuko
from adapters import scatter
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import ComposeTransform, TanhTransform
from torch.nn.utils import prune

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.torchflows
from nflows_kconv import InvertibleConv2d, bijection
from nflows_kconv.diagnostics import conditioning, round_trip
from nflows_kconv.flows import steps

SIZES = (1, 2, 4, 8, 12)


def layer_with(size: float, seed: int = 0, channels: int = 4, **options) -> InvertibleConv2d:
    """Returns a layer with free entries of this size, which determines how much its inverse amplifies."""
    layer = InvertibleConv2d(channels, **options)
    with torch.no_grad():
        noise = torch.randn(layer.raw_weight.shape, generator=torch.Generator().manual_seed(seed))
        layer.raw_weight.copy_(size * noise * (layer.raw_weight != 0))
    return layer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Of a layer


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("options", [{}, dict(corners=("BR", "TL"), kernel_size=(1, 3)), dict(corners="TR")])
@pytest.mark.parametrize("free", [0.01, 0.1, 0.3])
def test_estimates_are_close_to_the_norms_of_the_dense_matrices(free: float, options: dict, size: tuple[int, int]):
    """test_bounded.py compares exact ones with dense matrices, for any layer."""
    layer = layer_with(free, **options)
    estimate, exact = conditioning(layer, size), conditioning(layer, size, exact=True)
    for value, bound in zip(estimate[:2], exact[:2], strict=True):
        assert 0.99 * bound <= value <= bound * (1 + 1e-9)
    assert estimate.condition_number == estimate.gain * estimate.inverse_gain
    assert estimate.inverse_gain_bound == exact.inverse_gain_bound


def test_large_gains_are_found_to_many_digits():
    layer = layer_with(0.5)
    exact, estimate = (conditioning(layer, (6, 6), exact=exact).inverse_gain for exact in (True, False))
    assert exact > 100
    assert estimate == pytest.approx(exact, rel=1e-3)


def test_gains_grow_with_the_image():
    """They grow exponentially without a bound and never exceed it with one."""
    free, bounded = layer_with(0.5), layer_with(0.5, max_inverse_gain=3)
    gains = [conditioning(free, (side, side)).inverse_gain for side in SIZES]
    assert all(large > 2 * small for small, large in pairwise(gains))
    assert conditioning(free, (1, 1)).inverse_gain_bound == math.inf
    gains = [conditioning(bounded, (side, side)) for side in SIZES]
    assert all(small.inverse_gain < large.inverse_gain for small, large in pairwise(gains))
    assert gains[-1].inverse_gain <= gains[-1].inverse_gain_bound == pytest.approx(3)


def test_the_bound_tells_of_a_learned_diagonal():
    layer = InvertibleConv2d(4, corners="TL", diagonal="learned", max_inverse_gain=2)
    with torch.no_grad():
        layer.raw_weight.fill_(100)
        layer.log_diagonal[2] = math.log(0.1)
    assert conditioning(layer, (2, 2)).inverse_gain_bound == pytest.approx(20)


@pytest.mark.parametrize("library", [nflows_kconv.nflows, nflows_kconv.normflows], ids=["nflows", "normflows"])
def test_names_of_directions_make_no_difference(library):
    expected = layer_with(0.3)
    layer = library.InvertibleConv2d(4)
    layer.load_state_dict(expected.state_dict())
    assert conditioning(layer, (4, 5)) == conditioning(expected, (4, 5))


def test_it_starts_alike_and_leaves_random_numbers_alone():
    layer, state = layer_with(0.1), torch.get_rng_state()
    assert conditioning(layer, (4, 5)) == conditioning(layer, (4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.raw_weight.grad is None


def test_iterations_can_be_limited():
    layer = layer_with(0.1)
    assert conditioning(layer, (5, 5), max_iterations=2).gain < 0.95 * conditioning(layer, (5, 5)).gain


@pytest.mark.parametrize("exact", [False, True], ids=["estimate", "exact"])
def test_what_overflows_is_infinite(exact: bool):
    layer = layer_with(1e200, kernel_size=2).double()
    with torch.no_grad():
        layer.raw_weight.mul_(1e200)
    assert conditioning(layer, (4, 4), exact=exact).inverse_gain == math.inf


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(layer=nn.Conv2d(4, 4, 3)), TypeError, "layer must be an InvertibleConv1d, .* or 3d, got Conv2d"),
        (dict(image_size=(4,)), ValueError, r"image_size must have the layer's 2 dimensions, got \(4,\)"),
        (dict(image_size=4), ValueError, r"image_size must have the layer's 2 dimensions, got 4"),
        (dict(image_size=(4, 0)), ValueError, "image_size must be at least 1, got 0"),
        (dict(image_size=(4.0, 4)), TypeError, "image_size must be an integer, got 4.0"),
        (dict(max_iterations=0), ValueError, "max_iterations must be at least 1, got 0"),
    ],
)
def test_errors_of_conditioning(arguments: dict, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        conditioning(**dict(layer=layer_with(0.1), image_size=(4, 4)) | arguments)


# Of a flow


class Net(nn.Module):
    """A coupling's network that may round its input as TF32 does, but to 8 bits."""

    def __init__(self, in_channels: int, out_channels: int, rounds: bool = False) -> None:
        super().__init__()
        self.convolution, self.rounds = nn.Conv2d(in_channels, out_channels, 3, padding=1), rounds

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.convolution(inputs.bfloat16().float() if self.rounds else inputs)


def nflows_flow() -> Flow:
    """Builds a flow with every container of nflows."""
    level = [
        transforms.SqueezeTransform(),
        transforms.CompositeTransform([nflows_kconv.nflows.InvertibleConv2d(4), transforms.ActNorm(4)]),
        transforms.InverseTransform(nflows_kconv.nflows.InvertibleConv2d(4)),
        transforms.AffineCouplingTransform([0, 1, 0, 1], Net),
    ]
    multiscale = transforms.MultiscaleCompositeTransform(2)
    multiscale.add_transform(transforms.CompositeTransform(level), (4, 4, 4))
    multiscale.add_transform(nflows_kconv.nflows.InvertibleConv2d(2, corners="TL"), (2, 4, 4))
    return Flow(multiscale, StandardNormal([64]))


NFLOWS_KINDS = [
    "SqueezeTransform",
    "InvertibleConv2d",
    "ActNorm",
    "InvertibleConv2d",
    "AffineCouplingTransform",
    "InvertibleConv2d",
]


def normflows_flow() -> nf.MultiscaleFlow:
    """Builds a flow with couplings of several invertible modules, ActNorm inside a network, and in-place steps."""
    blocks = [
        nflows_kconv.normflows.GlowBlock(4, 8, net_actnorm=True, corners="TL"),
        nf.flows.Reverse(nf.flows.Invertible1x1Conv(4)),
    ]
    return nf.MultiscaleFlow(
        [nf.distributions.DiagGaussian((2, 4, 4), trainable=False) for _ in range(2)],
        [[nflows_kconv.normflows.InvertibleConv2d(2, corners="TL")], [*blocks, nf.flows.Squeeze()]],
        [nf.flows.Merge()],
        nf.transforms.Shift(0.25),
        class_cond=False,
    )


NORMFLOWS_KINDS = [
    "Shift",
    "Squeeze",
    "Invertible1x1Conv",
    "InvertibleConv2d",
    "ActNorm",
    "Invertible1x1Conv",
    "AffineCouplingBlock",
    "InvertibleConv2d",
]
FLOWS = {"nflows": (nflows_flow, NFLOWS_KINDS), "normflows": (normflows_flow, NORMFLOWS_KINDS)}
every_flow = pytest.mark.parametrize(("build", "kinds"), FLOWS.values(), ids=FLOWS.keys())


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@every_flow
def test_steps_of_sound_flows(build, kinds: list[str]):
    result = round_trip(build(), images())
    assert [step.kind for step in result.steps] == kinds
    assert len({step.name for step in result.steps}) == len(kinds)
    for one in result.steps:
        assert max(one.local, one.arriving, one.leaving) < 100 * result.rounding
    for data_side, latent_side in pairwise(result.steps):
        assert data_side.arriving <= latent_side.leaving * 2  # the halves have other largest entries
    assert result.error == max(one.leaving for one in result.steps)
    assert (result.rounding, result.cure) == (2**-23, "")
    assert "nothing is lost" in result.verdict


@every_flow
def test_nothing_changes(build, kinds: list[str]):
    flow, input = build().train(), images()
    parts = dict(flow.named_modules())
    before = copy.deepcopy((flow.state_dict(), input, torch.get_rng_state()))
    round_trip(flow, input)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert torch.equal(input, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(part.training for part in parts.values())
    assert not any({"forward", "inverse"} & vars(part).keys() for part in parts.values())


def test_it_runs_in_evaluation_mode():
    coupling = steps.AffineCoupling(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(2, 4, 3, padding=1)))
    assert "nothing is lost" in round_trip(coupling.train(), images(3, 4, 8, 8)).verdict


def stack(*tested: nn.Module) -> steps.Sequence:
    """Returns accurate steps with the tested ones among them."""
    return steps.Sequence([steps.ActNorm(4), InvertibleConv2d(4), *tested, steps.InvertibleConv1x1(4)])


def test_it_blames_a_layer_that_amplifies():
    bad = layer_with(0.5, corners="BR")
    result = round_trip(stack(layer_with(0.2), bad), images(3, 4, 8, 8))
    worst = max(result.steps, key=lambda one: one.growth)
    assert (worst.name, worst.kind) == ("steps.3", "InvertibleConv2d")
    assert worst.leaving > 1e-4
    together = math.prod(one.growth for one in result.steps if one.kind == "InvertibleConv2d")
    assert f"All InvertibleConv2d together multiply the error by {together:.1e}" in result.verdict
    assert f"the worst, steps.3, by {worst.growth:.1e}." in result.verdict
    assert "max_inverse_gain" in result.cure
    cured = layer_with(0.5, corners="BR", max_inverse_gain=4)
    assert "nothing is lost" in round_trip(stack(InvertibleConv2d(4), cured), images(3, 4, 8, 8)).verdict
    assert "nothing is lost" in round_trip(stack(bad).double(), images(3, 4, 8, 8)).verdict


def test_errors_are_told_where_they_are_born_and_where_they_arrive():
    """Puts a step with a known error in its inverse between steps that pass errors on unchanged."""

    class Off(nn.Module):
        def forward(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return input.flip(3), input.new_zeros(len(input))

        def inverse(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return input.flip(3) + 0.01 * input.abs().max(), input.new_zeros(len(input))

    first, off, last = round_trip(steps.Sequence([steps.ActNorm(4), Off(), steps.ActNorm(4)]), images(3, 4, 8, 8)).steps
    assert (last.local, last.arriving, last.leaving) == (0, 0, 0)
    assert off.local == off.leaving == pytest.approx(0.01, rel=1e-5)
    assert off.growth == off.leaving / 2**-23
    assert (first.local, first.arriving, first.leaving) == (0, off.leaving, off.leaving)
    assert first.growth == 1


def test_it_blames_an_inverse_that_is_wrong():
    class Wrong(steps.ActNorm):
        def inverse(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return 1.001 * input, input.new_zeros(len(input))

    result = round_trip(stack(Wrong(4)), images(3, 4, 8, 8))
    assert "All Wrong together" in result.verdict
    assert "if the error stays as it is, the inverse is wrong" in result.cure


@pytest.mark.parametrize("there", [False, True], ids=["inverse", "forward"])
def test_a_step_that_calls_another_is_measured_whole(there: bool):
    """nflows' 1 x 1 convolution permutes by another transform, then multiplies by its parameters."""
    convolution = transforms.OneByOneConvolution(4)
    with torch.no_grad():
        convolution.lower_entries.fill_(30)
        convolution.upper_entries.fill_(30)
    bad = convolution if there else transforms.InverseTransform(convolution)
    result = round_trip(transforms.CompositeTransform([transforms.ActNorm(4).eval(), bad]), images(3, 4, 8, 8))
    assert [one.kind for one in result.steps] == ["ActNorm", "OneByOneConvolution"]
    assert "All OneByOneConvolution together" in result.verdict


def test_an_error_between_steps_is_not_blamed_on_them():
    class Cubed(nn.Module):
        """Cubes the output of a step, and takes a slightly wrong root."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = InvertibleConv2d(4)

        def forward(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            output, log_abs_det = self.inner(input)
            return output**3, log_abs_det

        def inverse(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return self.inner.inverse(input.sign() * input.abs() ** 0.33)

    result = round_trip(Cubed(), images(3, 4, 8, 8))
    assert result.error > 1e-3
    assert [one.name for one in result.steps] == ["inner"]
    assert "it arises between them" in result.verdict
    assert "computes something besides calling its steps" in result.cure


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32", "bf16"])
def test_it_blames_networks_in_reduced_precision(setting: str):
    """A network that rounds its input jumps when the input changes by a rounding; its step has no error itself."""
    pairs = [(steps.AffineCoupling(Net(2, 4, rounds=True)), steps.InvertibleConv1x1(4)) for _ in range(6)]
    flow = stack(*chain.from_iterable(pairs))
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = setting
    try:
        result = round_trip(flow, images(200, 4, 8, 8))
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    assert result.settings["torch.backends.mkldnn.conv.fp32_precision"] == setting
    assert all(one.local < 10 * result.rounding for one in result.steps)
    assert "All AffineCoupling together" in result.verdict
    is_reduced = setting in ("tf32", "bf16")
    assert ("reduced precision" in result.cure) == is_reduced
    assert (f"torch.backends.mkldnn.conv.fp32_precision = {setting}" in result.cure) == is_reduced


def test_autocast_is_a_setting():
    with torch.autocast("cpu", torch.bfloat16):
        assert round_trip(stack(), images(3, 4, 8, 8)).settings["torch.autocast"] == "torch.bfloat16"


def test_ways_that_are_not_finite():
    layer = layer_with(1e30)
    result = round_trip(steps.Sequence([steps.Inverse(layer), steps.ActNorm(4)]), images(3, 4, 8, 8))
    assert result.verdict == "The way to the latent variable is not finite from steps.0.step on."
    result = round_trip(steps.Sequence([steps.ActNorm(4), layer]), images(3, 4, 8, 8))
    assert result.error == math.inf
    assert [one.growth for one in result.steps] == [1, math.inf]
    assert "All InvertibleConv2d together" in result.verdict


def test_rounding_to_whole_numbers_is_no_loss():
    """Dequantisation noise may be so close to the edge of a cell that any error changes the result by one."""

    class Edge(nn.Module):
        def forward(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return input + 1e-6, input.new_zeros(len(input))

        def inverse(self, input: Tensor, context: None = None) -> tuple[Tensor, Tensor]:
            return (input - 1e-5).floor(), input.new_zeros(len(input))

    result = round_trip(steps.Sequence([Edge(), InvertibleConv2d(4)]), images(3, 4, 8, 8).mul(10).round())
    assert result.steps[0].leaving > 0.01
    assert result.steps[0].growth == 1
    assert "nothing is lost" in result.verdict


def test_other_flows():
    """A list of flows without levels, and a step alone."""
    flows = [nflows_kconv.normflows.InvertibleConv2d(4), nf.flows.ActNorm((4, 1, 1))]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 8, 8)), flows)
    assert [one.name for one in round_trip(flow, images(3, 4, 8, 8)).steps] == ["flows.1", "flows.0"]
    assert [one.name for one in round_trip(InvertibleConv2d(4), images(3, 4, 8, 8)).steps] == ["(flow)"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_of_half_precision_are_told_in_float32(dtype: torch.dtype):
    layer, input = layer_with(0.1).to(dtype), images(3, 4, 8, 8)
    result = round_trip(layer, input)
    input = input.to(dtype)
    error = (layer.inverse(layer(input)[0])[0].float() - input.float()).abs().max() / input.float().abs().max()
    assert (result.error, result.rounding) == (error.item(), torch.finfo(dtype).eps)


class GlowScale(nn.Module):
    """The idiom of many repositories: one method that adds to a log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, input: Tensor, logdet: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        sign = -1 if reverse else 1
        log_abs_det = sign * self.log_scale.sum() * input[0, 0].numel()
        return input * (sign * self.log_scale).exp(), logdet + log_abs_det


class Glow(nn.Module):
    """Another idiom: `forward` returns a log-determinant, `reverse` does not."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.scale = layer_with(0.1), GlowScale()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, log_abs_det = self.convolution(x)
        return self.scale(x, log_abs_det)

    def reverse(self, y: Tensor) -> Tensor:
        y, _ = self.scale(y, y.new_zeros(len(y)), reverse=True)
        return self.convolution.inverse(y)[0]


def handwritten_glow() -> nn.Module:
    bijection.register(Glow, inverse="reverse")
    bijection.register(
        GlowScale,
        forward=lambda step, x, context: step(x, x.new_zeros(len(x))),
        inverse=lambda step, y, context: step(y, y.new_zeros(len(y)), reverse=True)[0],
    )
    return Glow()


def freia_sequence() -> nn.Module:
    flow = FrEIA.framework.SequenceINN(4, 8, 8)
    flow.append(nflows_kconv.freia.InvertibleConv2d, corners="TL")
    flow.append(FrEIA.modules.PermuteRandom)
    flow.append(
        FrEIA.modules.AllInOneBlock,
        cond=0,
        cond_shape=(3, 8, 8),
        subnet_constructor=lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1),
    )
    return flow


def freia_graph() -> nn.Module:
    framework = FrEIA.framework
    start = framework.InputNode(4, 8, 8)
    layer = framework.Node(start, nflows_kconv.freia.InvertibleConv2d, {})
    split = framework.Node(layer, FrEIA.modules.Split, {})
    merge = framework.Node([split.out0, split.out1], FrEIA.modules.Concat, {})
    norm = framework.Node(merge, FrEIA.modules.ActNorm, {})
    return framework.GraphINN([start, layer, split, merge, norm, framework.OutputNode(norm)])


def zuko_layers() -> nn.Module:
    layers = [zuko.lazy.UnconditionalTransform(Held(), nflows_kconv.distributions.InvertibleConv2d(4))]
    scale = zuko.lazy.UnconditionalTransform(zuko.transforms.MonotonicAffineTransform, torch.ones(8), torch.ones(8))
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(4, 8, 8), torch.ones(4, 8, 8), ndims=3
    )
    return zuko.flows.Flow([*layers, scale], base)


class Held(nn.Module):
    def forward(self, transform: Any) -> Any:
        return transform


def torch_layers() -> Any:
    first, second = (nflows_kconv.distributions.InvertibleConv2d(4) for _ in range(2))
    return ComposeTransform([first, ComposeTransform([TanhTransform().inv, second.inv]).inv])


def of_classes(library: Any, **options: Any) -> nn.Module:
    return library.finc_flow((4, 8, 8), 1, 1, hidden_channels=4, num_classes=3, max_inverse_gain=4, **options)


IMAGE_FLOW = [
    "UniformDequantization",
    "Logit",
    "Squeeze",
    "InvertibleConv2d",
    "InvertibleConv2d",
    "ActNorm",
    "InvertibleConv1x1",
    "AffineCoupling",
]


def called(transform: pyro_transforms.AffineAutoregressive) -> nn.Module:
    """Returns the transform with values in its cache, which have an autograd history."""
    transform(images(3, 4))
    return transform


ANY_KIND = {
    "nflows, classes": (lambda: of_classes(nflows_kconv.nflows, direction="inverse"), IMAGE_FLOW),
    "normflows, classes": (lambda: of_classes(nflows_kconv.normflows), IMAGE_FLOW),
    "nflows, classes and contexts": (lambda: of_classes(nflows_kconv.nflows, context_shape=(2,)), IMAGE_FLOW),
    "normflows, classes and contexts": (
        lambda: of_classes(nflows_kconv.normflows, context_shape=(2,), reversible=True),
        IMAGE_FLOW,
    ),
    "FrEIA, a layer": (lambda: nflows_kconv.freia.InvertibleConv2d([(4, 8, 8)]), ["InvertibleConv2d"]),
    "FrEIA, a permutation": (lambda: FrEIA.modules.PermuteRandom([(4, 8, 8)]), ["PermuteRandom"]),
    "FrEIA, a sequence": (freia_sequence, ["InvertibleConv2d", "PermuteRandom", "AllInOneBlock"]),
    "FrEIA, a graph": (freia_graph, ["InvertibleConv2d", "ActNorm"]),
    "zuko, layers": (zuko_layers, ["InvertibleConv2d", "MonotonicAffineTransform"]),
    "zuko, autoregressive": (lambda: zuko.flows.NSF(4, 2, transforms=2), ["AutoregressiveTransform"] * 2),
    "torch.distributions": (torch_layers, ["InvertibleConv2d", "InvertibleConv2d", "TanhTransform"]),
    "Pyro": (lambda: pyro_transforms.affine_autoregressive(4), ["AffineAutoregressive"]),
    "Pyro, conditional": (lambda: pyro_transforms.conditional_spline(4, 2), ["ConditionedSpline"]),
    "Pyro, called before": (lambda: called(pyro_transforms.affine_autoregressive(4)), ["AffineAutoregressive"]),
    "torchflows": (lambda: nflows_kconv.torchflows.InvertibleConv2d((4, 8, 8)), ["InvertibleConv2d"]),
    "pruned": (lambda: prune.l1_unstructured(InvertibleConv2d(4), "raw_weight", 0.5), ["InvertibleConv2d"]),
    "by hand": (handwritten_glow, ["InvertibleConv2d", "GlowScale"]),
}


@pytest.mark.parametrize("name", ANY_KIND)
def test_flows_of_every_library(name: str):
    build, kinds = ANY_KIND[name]
    flow = scatter(build()) if isinstance(build(), nn.Module) else build()
    input, context = images(3, 4, 8, 8), None
    if "classes" in name:
        input, context = torch.randint(0, 256, (3, 4, 8, 8)), torch.tensor([2, 0, 1])
        context = (context, images(3, 2)) if "contexts" in name else context
    elif name == "FrEIA, a sequence":
        context = images(3, 3, 8, 8)
    elif name in ("zuko, autoregressive", "Pyro", "Pyro, called before", "Pyro, conditional"):
        input, context = images(3, 4), None if name in ("Pyro", "Pyro, called before") else images(3, 2)
    before = {part: set(vars(part)) for part in flow.modules()} if isinstance(flow, nn.Module) else {}
    state = torch.get_rng_state()
    result = round_trip(flow, input, context)
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.kind for one in result.steps] == kinds
    assert len({one.name for one in result.steps}) == len(kinds)
    assert "nothing is lost" in result.verdict
    assert {part: set(vars(part)) for part in before} == before


def test_what_has_no_inverse_is_told():
    """Some Pyro transforms have only a cached inverse."""
    cached = pyro_transforms.Planar(4)
    cached._cache_size, cached._cached_x_y = 1, (None, None)
    for flow in (cached, ComposeTransform([cached]), nf.flows.Planar((4,))):
        with pytest.raises(bijection.NoInverse, match="Planar has no inverse"):
            round_trip(flow, images(3, 4))


def test_it_prints_a_table():
    result = round_trip(stack(layer_with(0.5, corners="TL")), images(3, 4, 8, 8))
    lines = str(result).splitlines()
    assert lines[0].split() == ["step", "kind", "local", "arriving", "leaving", "growth"]
    for line, one in zip(lines[1:5], result.steps, strict=True):
        assert line.split() == [one.name, one.kind, *(f"{value:.1e}" for value in one[2:])]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "torch.backends.mkldnn.conv.fp32_precision: " in lines[5]
    assert lines[6:] == [result.verdict, result.cure]


class Straight(nn.Module):
    """Calls its steps in the same order in both directions."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        for each in self.steps:
            input = each(input)[0]
        return input, input.new_zeros(len(input))

    def inverse(self, input: Tensor) -> Tensor:
        for each in self.steps:
            input = each.inverse(input)[0]
        return input


@pytest.mark.parametrize(
    ("flow", "error", "match"),
    [
        (
            torch.exp,
            TypeError,
            r"builtin_function_or_method must have forward\(x\) -> .* or have a class registered with .*register",
        ),
        (nn.Linear(2, 2), TypeError, r"Linear must have forward\(x\) -> \(y, log_abs_det\) and inverse, as in"),
        (
            Straight(steps.ActNorm(4), InvertibleConv2d(4)),
            ValueError,
            r"got \[steps.0, steps.1\] forward and, reversed, \[st",
        ),
        (
            nf.MultiscaleFlow(
                [nf.distributions.DiagGaussian((2, 8, 8))] * 2, [[], []], [nf.flows.Merge()], None, False
            ),
            ValueError,
            r"got \[\] forward and, reversed, \[\] back",
        ),
    ],
    ids=["function", "one direction", "not in reverse", "no steps"],
)
def test_errors_of_round_trip(flow: object, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        round_trip(flow, images(3, 4, 8, 8))


def test_images_must_be_a_tensor():
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        round_trip(stack(), images(3, 4, 8, 8).numpy())
