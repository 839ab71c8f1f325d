"""The assertions: sound transforms of every library pass, faults are named, and no state changes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import broken_transforms
import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.flows
import nflows.transforms as nt
import normflows as nf
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from nflows.distributions import StandardNormal
from nflows.nn.nets import ConvResidualNet, ResidualNet
from torch import Tensor, nn
from torch.distributions import transforms as tt

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.torchflows
from nflows_kconv import InvertibleConv2d, testing
from nflows_kconv.flows import images, steps

# nflows' and normflows' 1x1 convolutions
pytestmark = [pytest.mark.filterwarnings(f"ignore:torch.{name} is deprecated") for name in ("lu", "triangular_solve")]


def vectors(batch: int = 3, size: int = 4) -> Tensor:
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(0))


def pictures(batch: int = 2, channels: int = 4, height: int = 4, width: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def network(inputs: int, outputs: int) -> nn.Module:
    return ResidualNet(inputs, outputs, hidden_features=4, num_blocks=1)


def convolutions(inputs: int, outputs: int) -> nn.Module:
    return ConvResidualNet(inputs, outputs, hidden_channels=4, num_blocks=1)


MASK = [1, 0, 1, 0]
TAILS = dict(tails="linear", tail_bound=3.0, num_bins=3)
CORNERS = ("TL", "TR", "BL", "BR")
TRANSFORMS = {
    # nflows
    "nflows affine coupling": (lambda: nt.AffineCouplingTransform(MASK, network), vectors()),
    "nflows additive coupling of images": (lambda: nt.AdditiveCouplingTransform(MASK, convolutions), pictures()),
    "nflows linear spline": (lambda: nt.PiecewiseLinearCouplingTransform(MASK, network, **TAILS), vectors()),
    "nflows quadratic spline": (lambda: nt.PiecewiseQuadraticCouplingTransform(MASK, network, **TAILS), vectors()),
    "nflows cubic spline": (lambda: nt.PiecewiseCubicCouplingTransform(MASK, network, **TAILS), vectors()),
    "nflows rational spline": (
        lambda: nt.PiecewiseRationalQuadraticCouplingTransform(MASK, network, **TAILS),
        vectors(),
    ),
    "nflows autoregressive": (lambda: nt.MaskedAffineAutoregressiveTransform(4, 8), vectors()),
    "nflows ActNorm": (lambda: nt.ActNorm(4), vectors()),
    "nflows BatchNorm": (lambda: nt.BatchNorm(4).eval(), vectors()),
    "nflows 1x1": (lambda: nt.OneByOneConvolution(4), pictures()),
    "nflows 1x1, cached": (lambda: nt.OneByOneConvolution(4, using_cache=True).eval(), pictures()),
    "nflows QR": (lambda: nt.QRLinear(4, 2), vectors()),
    "nflows squeeze": (nt.SqueezeTransform, pictures()),
    "nflows permutation": (lambda: nt.RandomPermutation(4), vectors()),
    "nflows logit": (nt.Logit, vectors().sigmoid()),
    "nflows LogTanh": (nt.LogTanh, vectors()),
    "nflows affine, far from 0": (lambda: nt.PointwiseAffineTransform(torch.tensor(1e3), torch.tensor(0.1)), vectors()),
    "nflows multiscale": (lambda: multiscale_of_nflows(), pictures()),
    # normflows
    "normflows ActNorm": (lambda: nf.flows.ActNorm((4, 1, 1)), pictures()),
    "normflows 1x1": (lambda: nf.flows.Invertible1x1Conv(4), pictures()),
    "normflows 1x1 by LU": (lambda: nf.flows.LULinearPermute(4), vectors()),
    "normflows permutation": (lambda: nf.flows.Permute(4), vectors()),
    "normflows squeeze": (nf.flows.Squeeze, pictures()),
    "normflows split": (nf.flows.Split, pictures()),
    "normflows masked affine": (
        lambda: nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0]), *(nf.nets.MLP([4, 4, 4]) for _ in range(2))),
        vectors(),
    ),
    "normflows GlowBlock": (lambda: nf.flows.GlowBlock(4, 4, net_actnorm=True), pictures()),
    "normflows spline": (lambda: nf.flows.CoupledRationalQuadraticSpline(4, 1, 4, num_bins=3), vectors(2)),
    "normflows Reverse": (lambda: nf.flows.Reverse(nf.flows.LULinearPermute(4)), vectors()),
    "normflows without inverse": (lambda: nf.flows.Planar((4,)), vectors()),
    "normflows Planar with inverse": (lambda: nf.flows.Planar((4,), act="leaky_relu"), vectors()),
    "normflows Composite": (
        lambda: nf.flows.Composite([nflows_kconv.normflows.InvertibleConv2d(4), nf.flows.ActNorm((4, 1, 1))]),
        pictures(),
    ),
    # torch.distributions and libraries built on it
    "torch affine": (lambda: tt.AffineTransform(torch.randn(4), torch.randn(4)), vectors()),
    "torch affine of a network's output": (lambda: tt.AffineTransform(nn.Linear(1, 4)(torch.ones(1)), 2.0), vectors()),
    "torch sigmoid, cached": (lambda: tt.SigmoidTransform(cache_size=1), vectors()),
    "torch power": (lambda: tt.PowerTransform(3.0), vectors().exp()),
    "torch exp of numbers": (tt.ExpTransform, vectors()[0]),
    "torch stick breaking": (tt.StickBreakingTransform, vectors()),
    "torch Cholesky": (tt.CorrCholeskyTransform, vectors(size=3)),
    "torch reshape": (lambda: tt.ReshapeTransform((4,), (2, 2)), vectors()),
    "torch compose": (
        lambda: tt.ComposeTransform([tt.AffineTransform(1.0, 2.0), tt.IndependentTransform(tt.TanhTransform(), 1)]),
        vectors() / 3,
    ),
    "zuko spline": (lambda: zuko.flows.NSF(4, transforms=1, bins=3, hidden_features=[4])().transform, vectors()),
    "zuko autoregressive, of a context": (
        lambda: zuko.flows.MAF(4, 2, transforms=1, hidden_features=[4]),
        vectors(),
        vectors(3, 2),
    ),
    "zuko transform that waits for a context": (
        lambda: zuko.flows.MAF(4, transforms=1, hidden_features=[4]).transform,
        vectors(),
    ),
    "pyro 1x1": (lambda: pt.GeneralizedChannelPermute(4), pictures()),
    "pyro inverse by cache": (lambda: pt.Planar(4), vectors()),
    "pyro inverse by cache, of a context": (
        lambda: pt.conditional_planar(4, 2, hidden_dims=[4]),
        vectors(),
        vectors(3, 2),
    ),
    # FrEIA and torchflows
    "FrEIA coupling": (lambda: fm.GLOWCouplingBlock([(4,)], subnet_constructor=nn.Linear), vectors()),
    "FrEIA graph, of a context": (lambda: graph_of_freia(), vectors(), vectors(3, 2)),
    "layer in FrEIA's sequence": (lambda: sequence_of_freia(), pictures()),
    "layer in torchflows": (lambda: nflows_kconv.torchflows.InvertibleConv2d((4, 4, 2)), pictures()),
    # Flows with labels and contexts
    "nflows flow, of a context": (lambda: flow_of_nflows(), vectors(), vectors(3, 2)),
    "normflows flow, of a context": (
        lambda: nf.ConditionalNormalizingFlow(
            nf.distributions.DiagGaussian(4), [nf.flows.MaskedAffineAutoregressive(4, 8, context_features=2)]
        ),
        vectors(),
        vectors(3, 2),
    ),
    "normflows flow, of labels": (
        lambda: nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(4, 3), [nf.flows.LULinearPermute(4)]),
        vectors(),
        torch.tensor([2, 0, 1]),
    ),
    # This package
    "layer": (lambda: InvertibleConv2d(4, diagonal="learned", bias=True), pictures()),
    **{
        f"layer in {corner}": (lambda corner=corner: InvertibleConv2d(4, (2, 3), corners=corner), pictures(width=3))
        for corner in CORNERS
    },
    "layer in nflows, inverted": (lambda: nt.InverseTransform(nflows_kconv.nflows.InvertibleConv2d(4)), pictures()),
    "GlowBlock": (lambda: nflows_kconv.normflows.GlowBlock(4, 4), pictures()),
    "steps": (
        lambda: steps.Sequence([steps.ActNorm(4), steps.InvertibleConv1x1(4), steps.learned_prior(4)]),
        pictures(),
    ),
    "logit": (images.Logit, pictures().sigmoid()),
    # The sign of the Jacobian depends on the context
    "reflection, without inverse": (lambda: Reflection(), vectors(), torch.tensor([1.0, -1.0, 1.0])),
}


class Reflection(nn.Module):
    """Changes the sign of one feature, depending on the context."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x[:, :1] * context[:, None], x[:, 1:]], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def multiscale_of_nflows() -> nt.Transform:
    transform = nt.MultiscaleCompositeTransform(2)
    shape = transform.add_transform(nflows_kconv.nflows.InvertibleConv2d(4), (4, 4, 2))
    transform.add_transform(nt.ReversePermutation(shape[0]), shape)
    return transform


def graph_of_freia() -> nn.Module:
    nodes = [ff.InputNode(4), ff.ConditionNode(2)]
    coupling = {"subnet_constructor": nn.Linear}
    nodes.append(ff.Node(nodes[0], fm.GLOWCouplingBlock, coupling, conditions=nodes[1]))
    nodes.append(ff.Node(nodes[2], fm.PermuteRandom, {"seed": 1}))
    return ff.GraphINN([*nodes, ff.OutputNode(nodes[3])])


def sequence_of_freia() -> nn.Module:
    sequence = ff.SequenceINN(4, 4, 2)
    sequence.append(nflows_kconv.freia.InvertibleConv2d)
    sequence.append(fm.PermuteRandom, seed=1)
    return sequence


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_sound_transforms_pass(name: str):
    build, *arguments = TRANSFORMS[name]
    testing.check_transform(build(), *arguments)


def test_inverses_of_torchs_transforms_pass(monkeypatch: pytest.MonkeyPatch):
    """Their copies lose what they invert, unless Pyro has replaced a method."""
    transform = nflows_kconv.distributions.InvertibleConv2d(4)
    inverse = tt.ComposeTransform([transform.inv, tt.AffineTransform(1.0, 2.0)]).inv
    testing.check_transform(inverse, pictures())
    monkeypatch.setattr(tt.Transform, "__getstate__", lambda transform: {**vars(transform), "_inv": None})
    testing.check_transform(inverse, pictures())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["layer", "layer in BR", "nflows affine coupling", "normflows ActNorm", "torch affine"]
)
def test_sound_transforms_pass_in_other_precisions(name: str, dtype: torch.dtype):
    build, inputs = TRANSFORMS[name]
    transform = build()
    if isinstance(transform, nn.Module):
        transform.to(dtype)
    else:
        transform.loc, transform.scale = transform.loc.to(dtype), transform.scale.to(dtype)
    testing.check_transform(transform, inputs.to(dtype))


# Whole flows


class Context(nn.Module):
    """A coupling's network that takes the context."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.of_inputs, self.of_context = nn.Linear(inputs, outputs), nn.Linear(5, outputs)

    def forward(self, inputs: Tensor, context: Tensor) -> Tensor:
        return (self.of_inputs(inputs) + self.of_context(context)).tanh()


def flow_of_nflows() -> nflows.flows.Flow:
    transforms = [nt.AffineCouplingTransform(MASK, Context), nt.LULinear(4), nt.ActNorm(4)]
    return nflows.flows.Flow(nt.CompositeTransform(transforms), StandardNormal([4]), embedding_net=nn.Linear(2, 5))


def test_flows_of_normflows_pass():
    flows = [nf.flows.LULinearPermute(4), nf.flows.ActNorm(4)]
    testing.check_transform(nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows), vectors())
    bases = [nf.distributions.DiagGaussian(shape) for shape in ((8, 2, 1), (2, 4, 2))]
    levels = [[nf.flows.Invertible1x1Conv(8), nf.flows.Squeeze()], [nflows_kconv.normflows.InvertibleConv2d(4)]]
    testing.check_transform(nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=False), pictures())


@pytest.mark.parametrize(
    ("library", "dtype"), [(nflows_kconv.nflows, torch.uint8), (nflows_kconv.normflows, torch.float32)]
)
def test_flows_of_images_pass_though_they_dequantise_with_noise(library, dtype: torch.dtype):
    flow = library.finc_flow((1, 4, 4), levels=1, steps=1, hidden_channels=4, corners="TL")
    testing.check_transform(flow, torch.randint(0, 256, (2, 1, 4, 4)).to(dtype))


def test_noise_is_the_same_at_every_replay():
    def message() -> str:
        with pytest.raises(AssertionError) as failure:
            testing.assert_invertible(noisy.build(), noisy.inputs)
        return str(failure.value)

    noisy = next(each for each in broken_transforms.CATALOGUE if each.fault == "adds noise")
    assert (torch.manual_seed(1), message())[1] == (torch.manual_seed(2), message())[1]


# No state changes


@pytest.mark.parametrize("name", ["nflows ActNorm", "normflows ActNorm", "nflows 1x1, cached", "steps", "layer"])
def test_a_transform_stays_as_it_is(name: str):
    build, inputs = TRANSFORMS[name]
    transform, inputs = build(), inputs.clone().requires_grad_()
    for parameter in transform.parameters():
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in transform.parameters()]
    before, values, random = copy.deepcopy(transform), inputs.detach().clone(), torch.get_rng_state()
    testing.check_transform(transform, inputs)

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, values) and inputs.grad is None
    assert [part.training for part in transform.modules()] == [part.training for part in before.modules()]
    for actual, expected in zip(transform.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)
    for parameter in transform.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert parameter.requires_grad
    assert [parameter._version for parameter in transform.parameters()] == versions


def test_frozen_parameters_are_constants():
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0], requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.matrix, x.new_zeros(len(x))

        def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
            return y @ self.matrix.T, y.new_zeros(len(y))

    testing.check_transform(Rotation(), vectors())


# Conditioning


class Wrong(InvertibleConv2d):
    """A layer whose inverse is off by a thousandth in the last pixel."""

    def inverse(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x, log_abs_det = super().inverse(input)
        return x * (1 + 1e-3 * (torch.arange(x.shape[3]) == x.shape[3] - 1)), log_abs_det


@pytest.mark.filterwarnings("ignore:raw_weight has")  # the layer ignores entries above its diagonal
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_rounding_is_told_from_errors_however_ill_conditioned(std: float):
    sound, wrong = (layer_class(4, corners="TL", diagonal="learned") for layer_class in (InvertibleConv2d, Wrong))
    nn.init.normal_(sound.raw_weight, std=std)
    wrong.load_state_dict(sound.state_dict())
    inputs = pictures(height=7, width=7)
    with torch.no_grad():
        error = (sound.inverse(sound(inputs)[0])[0] - inputs).abs().max()
    # At std 1 the error of the wrong inverse is smaller than rounding.
    assert (error > 1e-2) == (std == 1.0)
    testing.check_transform(sound, inputs)
    with pytest.raises(AssertionError, match=r"worst at \[\d, \d, \d, 6\]"):
        testing.assert_invertible(wrong, inputs)


def test_tolerances_may_be_given():
    fudged = next(each for each in broken_transforms.CATALOGUE if "small number" in each.fault)
    transform, inputs = fudged.build(), fudged.inputs
    for tolerance in ({"atol": 1e-3}, {"rtol": 1e-3}, {"atol": 5e-4, "rtol": 5e-4}):
        testing.assert_invertible(transform, inputs, **tolerance)
    for tolerance in ({}, {"atol": 1e-6}, {"rtol": 1e-6}, {"atol": 0.0, "rtol": 0.0}):
        with pytest.raises(AssertionError, match="inverse"):
            testing.assert_invertible(transform, inputs, **tolerance)


# Failures


def test_a_failure_names_element_error_tolerance_and_replay():
    class Off(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.new_zeros(len(x))

        def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
            x = y.clone()
            x[1, 2] += 0.25
            return x, y.new_zeros(len(y))

    inputs = torch.zeros(3, 4)
    inputs[1, 2] = 8
    with pytest.raises(AssertionError) as failure:
        testing.assert_invertible(Off(), inputs)
    message = str(failure.value)
    for part in (
        "inverse(forward(x)) is not x",
        "worst at [1, 2]: got 8.25, expected 8; error 0.25, tolerance 8e-05 from eps",
        "Off in training mode",
        "inputs: torch.tensor([[0, 0, 0, 0], [0, 0, 8, 0], [0, 0, 0, 0]], dtype=torch.float32)",
        "replay: the call fails again with these inputs",
    ):
        assert part in message


def test_all_faults_are_told_the_likeliest_cause_first():
    class Wrong(broken_transforms.Elementwise):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, log_abs_det = super().forward(x)
            return y + 0.1 * torch.rand(1), 2 * log_abs_det

        def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
            return y.to_nowhere()

    with pytest.raises(AssertionError) as failure:
        testing.check_transform(Wrong(), vectors(size=3))
    lines = str(failure.value).splitlines()
    assert lines[0].startswith("Wrong.inverse raised AttributeError(")
    assert lines[1] == "  also: Wrong draws from torch's global random numbers"
    assert lines[2].startswith("  also: results differ from log |det| of the Jacobian: forward's log-determinants")
    assert [line.split(":")[0].strip() for line in lines[3:]] == ["tested", "inputs", "replay"]
    assert isinstance(failure.value.__cause__, AttributeError)


def test_what_is_not_finite_is_named():
    with pytest.raises(
        AssertionError, match=r"ActNorm.forward returns outputs that are not finite, nan at .* it has no variance"
    ):
        testing.check_transform(nt.ActNorm(4), pictures(1, 4, 1, 1))
    with pytest.raises(
        AssertionError,
        match=r"Exp.* returns log-determinants that are not finite, inf at \[1\], for float32 \[3, 4\]\n",
    ):
        testing.assert_invertible(Exploding(), vectors())


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.tensor([0, torch.inf, 0])

    inverse = forward


def test_a_wrong_gradient_is_named_with_its_element():
    class Wrong(broken_transforms.Elementwise):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, log_abs_det = super().forward(x)
            return y + (self.shift.detach() - self.shift) * torch.tensor([0, 1, 0]), log_abs_det

    with pytest.raises(
        AssertionError, match=r"through forward .* in shift, flattened, worst at \[1\]: got 0, expected"
    ):
        testing.assert_gradients_match_finite_differences(Wrong(), vectors(size=3))


@pytest.mark.parametrize("name", ["assert_invertible", "assert_log_dets_cancel"])
def test_a_transform_without_inverse_is_named(name: str):
    with pytest.raises(AssertionError, match=r"an inverse is needed, but Planar has no inverse"):
        getattr(testing, name)(nf.flows.Planar((4,)), vectors())


def test_what_a_transform_raises_is_a_failure():
    with pytest.raises(
        AssertionError, match=r"forward raised ValueError\(.*got 3 in shape .* for float32 \[2, 3, 4, 2\]"
    ):
        testing.check_transform(InvertibleConv2d(4), pictures(channels=3))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "inputs must be a tensor"),
        (torch.zeros(0, 4), ValueError, r"finite and not empty, \[B, \.\.\.\], got float32 \[0, 4\]"),
        (torch.tensor(1.0), ValueError, r"inputs must be finite and not empty"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, r"inputs must be finite and not empty"),
    ],
)
def test_other_inputs_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        testing.check_transform(tt.ExpTransform(), inputs)


def test_a_torch_transform_takes_no_context():
    with pytest.raises(AssertionError, match="context must be None"):
        testing.check_transform(tt.ExpTransform(), vectors(), context=vectors())


def test_what_cannot_be_copied_is_refused():
    transform = InvertibleConv2d(4)
    transform.file = sys.stdout
    with pytest.raises(TypeError, match="must be deep-copyable"):
        testing.check_transform(transform, pictures())


# Limits and options


def test_large_samples_are_checked_but_for_the_jacobian():
    inputs = torch.randn(1, 4, 32, 33)
    with pytest.warns(UserWarning, match="not compared with the Jacobian.*got 4224") as warned:
        testing.check_transform(InvertibleConv2d(4, corners="TL"), inputs)
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match="at most 4096 entries for a Jacobian, got 4224"):
        testing.assert_log_abs_det_matches_jacobian(InvertibleConv2d(4, corners="TL"), inputs)


def test_whole_numbers_have_no_jacobian():
    with pytest.raises(ValueError, match="inputs must be real numbers"):
        testing.assert_log_abs_det_matches_jacobian(images.UniformDequantization(), torch.ones(1, 1, 2, 2))


def test_whole_numbers_count_as_any_where_others_are_taken():
    sign = next(each for each in broken_transforms.CATALOGUE if "wrong sign" in each.fault)
    with pytest.raises(AssertionError, match="Jacobian"):
        testing.check_transform(sign.build(), torch.arange(24.0).view(1, 4, 3, 2))


def test_integers_are_not_compared_with_the_jacobian_but_by_warning():
    permutation = fm.PermuteRandom([(4, 3, 2)], seed=1)  # some of its parameters are integers
    for transform in (InvertibleConv2d(4, corners="TL").half(), permutation):
        with pytest.warns(UserWarning, match="not compared with the Jacobian.*got torch.int64") as warned:
            testing.check_transform(transform, torch.arange(24).view(1, 4, 3, 2))
        assert warned[0].filename == __file__
    flow = nflows_kconv.nflows.finc_flow((1, 4, 4), levels=1, steps=1, hidden_channels=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # this transform takes only integers and dequantises them
        testing.check_transform(flow, torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8))


def test_a_wrong_log_determinant_of_forward_is_told_as_that():
    class Wrong(InvertibleConv2d):
        def forward(self, x: Tensor, context: object = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
            y, log_abs_det = super().forward(x, context, inverse=inverse)
            return y, log_abs_det + (0 if inverse else 3)

    with pytest.raises(AssertionError, match=r"log .det. of the Jacobian: forward's log-determinants") as failure:
        testing.check_transform(Wrong(4), pictures())
    assert "  inputs: float32 [2, 4, 4, 2]\n" in str(failure.value)  # too many to print


@pytest.mark.parametrize("rebuild", [InvertibleConv2d(4), 3], ids=str)
def test_rebuild_must_be_a_function(rebuild: object):
    for test in (testing.assert_state_dict_round_trip, testing.check_transform):
        with pytest.raises(TypeError, match=r"rebuild must be a function that builds the transform, .* got "):
            test(InvertibleConv2d(4), pictures(), rebuild=rebuild)


def test_tolerances_have_names():
    for test in (testing.assert_invertible, testing.assert_deterministic, testing.check_transform):
        with pytest.raises(TypeError, match="tolerance must be atol or rtol, got tol"):
            test(InvertibleConv2d(4), pictures(), tol=1)


class Table(nn.Module):
    """Adds numbers that depend on the constructor's arguments, or not."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.numbers, x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y - self.numbers, y.new_zeros(len(y))


def test_rebuild_tells_constants_from_lost_state():
    table = Table(torch.linspace(0, 1, 4))
    with pytest.raises(AssertionError, match="results depend on numbers, which is not in the state_dict"):
        testing.check_transform(table, vectors())
    testing.check_transform(table, vectors(), rebuild=lambda: Table(torch.linspace(0, 1, 4)))
    with pytest.raises(AssertionError, match="never ran differs once it has loaded"):
        testing.check_transform(table, vectors(), rebuild=lambda: Table(torch.randn(4)))


@pytest.mark.parametrize("numbers", [[0, 1, 1, 0], [-1, 1, 1, -1], [0.5, 0.5, 0.5, 0.5]], ids=str)
def test_masks_and_constants_need_no_rebuild(numbers: list[float]):
    testing.check_transform(Table(torch.tensor(numbers)), vectors())


class TableInBuffer(nn.Module):
    """Adds numbers in a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.ones(4), persistent=False)

    forward, inverse = Table.forward, Table.inverse


def test_buffers_that_are_not_persistent_are_rebuilt_by_reset_parameters_or_lost():
    class Rebuilt(TableInBuffer):
        def reset_parameters(self) -> None:
            self.numbers.fill_(1)

    testing.check_transform(Rebuilt(), vectors())
    with pytest.raises(AssertionError, match=r"memory from to_empty differs .*, which numbers is not in"):
        testing.check_transform(TableInBuffer(), vectors())


def test_a_batch_of_one_is_enough():
    statistics = next(each for each in broken_transforms.CATALOGUE if "statistics" in each.fault)
    testing.assert_batch_independent(flow_of_nflows().eval(), vectors(1), context=vectors(1, 2))
    with pytest.raises(AssertionError, match="in the whole batch"):
        testing.assert_batch_independent(statistics.build(), vectors(2, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode):
    layer = InvertibleConv2d(4, diagonal="learned")
    with mode():
        testing.check_transform(layer, pictures())
        assert not torch.is_grad_enabled()


def test_the_assertions_need_no_library_and_the_strategies_name_theirs():
    code = """
import sys
sys.modules["hypothesis"] = None
from nflows_kconv.testing import check_transform
assert not {"nflows", "normflows", "pytest"} & set(sys.modules)
try:
    from nflows_kconv.testing import strategies
except ImportError as error:
    assert 'pip install "nflows-kconv[testing]"' in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
