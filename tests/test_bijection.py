"""Modules of every library as bijections, in both directions, without importing their adapters."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.nn.nets
import normflows
import pytest
import torch
import torchflows.flows
import zuko
from nflows import transforms
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform, SigmoidTransform
from torch.testing import assert_close
from torchflows.bijections.finite.autoregressive.architectures import RealNVP

import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d, bijection
from nflows_kconv.bijection import NoInverse, as_bijection, is_bijection, register
from nflows_kconv.flows import steps

D, E = 4, 3  # entries of a sample and of a context


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Reversed(nn.Module):
    """The idiom of hand-written Glow: no log-determinant in the inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def reverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp()


class Flagged(Reversed):
    """The other idiom: one method with a flag."""

    def forward(self, x: Tensor, logdet: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        sign = -1 if reverse else 1
        return x * (sign * self.log_scale).exp(), logdet + sign * self.log_scale.sum()


register(Reversed, inverse="reverse")
register(
    Flagged,
    forward=lambda module, x, context: module(x, x.new_zeros(len(x))),
    inverse=lambda module, y, context: module(y, y.new_zeros(len(y)), reverse=True),
)


def nflows_coupling() -> nn.Module:
    def network(inputs: int, outputs: int) -> nn.Module:
        return nflows.nn.nets.ResidualNet(inputs, outputs, 8, context_features=E)

    return transforms.AffineCouplingTransform([0, 1, 0, 1], network)


def nflows_flow() -> nn.Module:
    base = nflows.distributions.StandardNormal([D])
    return nflows.flows.Flow(transforms.CompositeTransform([nflows_coupling(), transforms.LULinear(D)]), base)


def normflows_flow() -> nn.Module:
    flows = [normflows.flows.AffineCouplingBlock(normflows.nets.MLP([2, 8, 4])), normflows.flows.LULinearPermute(D)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D), flows)


def normflows_conditional() -> nn.Module:
    flows = [normflows.flows.AutoregressiveRationalQuadraticSpline(D, 1, 8, num_context_channels=E)]
    return normflows.ConditionalNormalizingFlow(normflows.distributions.DiagGaussian(D), flows)


def freia_sequence() -> nn.Module:
    flow = FrEIA.framework.SequenceINN(D)
    flow.append(FrEIA.modules.PermuteRandom)
    flow.append(FrEIA.modules.AllInOneBlock, cond=0, cond_shape=(E,), subnet_constructor=nn.Linear)
    return flow


# By name: how to make it, and whether it takes a context.
BIJECTIONS = {
    "the layer": (lambda: InvertibleConv2d(D, diagonal="learned"), False),
    "nflows": (nflows_coupling, True),
    "nflows, a flow": (nflows_flow, True),
    "nflows, the layer": (lambda: nflows_kconv.nflows.InvertibleConv2d(D), False),
    "normflows": (lambda: normflows.flows.AffineConstFlow(D), False),
    "normflows, one log-determinant": (lambda: normflows.flows.Invertible1x1Conv(D), False),
    "normflows, a flow": (normflows_flow, False),
    "normflows, a conditional flow": (normflows_conditional, True),
    "normflows, the layer": (lambda: nflows_kconv.normflows.InvertibleConv2d(D), False),
    "torch.distributions": (lambda: ComposeTransform([SigmoidTransform(), AffineTransform(1.0, 2.0)]), False),
    "torch.distributions, the layer": (lambda: nflows_kconv.distributions.InvertibleConv2d(D), False),
    "Pyro": (lambda: pyro_transforms.affine_coupling(D), False),
    "Pyro, conditional": (lambda: pyro_transforms.conditional_affine_coupling(D, E), True),
    "zuko": (lambda: zuko.flows.MaskedAutoregressiveTransform(D, E), True),
    "zuko, a flow": (lambda: zuko.flows.NICE(D, E), True),
    "FrEIA": (lambda: FrEIA.modules.PermuteRandom([(D,)]), False),
    "FrEIA, a sequence": (freia_sequence, True),
    "FrEIA, the layer": (lambda: nflows_kconv.freia.InvertibleConv2d([(D, 1, 1)]), False),
    "torchflows, a flow": (lambda: torchflows.flows.Flow(RealNVP((D,))), False),
    "by hand": (Reversed, False),
    "by hand, with a flag": (Flagged, False),
}


@pytest.mark.parametrize("name", BIJECTIONS)
def test_both_directions_and_their_log_determinants(name: str):
    build, is_conditional = BIJECTIONS[name]
    module = build()
    if isinstance(module, nn.Module):
        module.double()
    shape = (D, 1, 1) if "layer" in name or "one log" in name else (D,)
    x = torch.randn(5, *shape, dtype=torch.float64)
    context = torch.randn(5, E, dtype=torch.float64) if is_conditional else None
    one = as_bijection(module)
    assert one.module is module and as_bijection(one) is one
    y, log_abs_det = one.forward(x, context)
    restored, inverse_log_abs_det = one.inverse(y, context)
    assert log_abs_det.shape == inverse_log_abs_det.shape == (5,)
    assert_close(restored, x)
    assert_close(inverse_log_abs_det, -log_abs_det)
    assert_close(one.undo(y, context), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: one.forward(x, context)[0].flatten(1).sum(0), x)
    blocks = jacobian.reshape(D, 5, D).movedim(1, 0)
    assert_close(torch.linalg.slogdet(blocks).logabsdet, log_abs_det, check_dtype=False)
    value = x
    for part in one.parts(context):
        value = part.forward(value, context if part.module is module else None)[0]
    assert_close(value, y)


def test_an_adapter_is_imported_when_its_library_is_met(monkeypatch: pytest.MonkeyPatch):
    class Mine(zuko.flows.NICE):
        pass

    monkeypatch.setattr(bijection, "_registry", {})
    monkeypatch.setattr(nflows_kconv, "zuko", importlib.import_module("nflows_kconv.zuko"))  # restored afterwards
    monkeypatch.delitem(sys.modules, "nflows_kconv.zuko")
    caches = bijection._told_by_class, bijection._import_adapter
    for cache in caches:
        cache.cache_clear()
    try:
        assert is_bijection(nn.Linear(2, 2)) is ("nflows_kconv.zuko" in sys.modules) is False
        assert as_bijection(Mine(4)).forward(torch.randn(2, 4))[1].shape == (2,)
        assert "nflows_kconv.zuko" in sys.modules
    finally:
        for cache in caches:
            cache.cache_clear()


SAMPLED = {
    "nflows": (nflows_flow, E),
    "nflows, images of classes": (
        lambda: nflows_kconv.nflows.finc_flow((1, 4, 4), 1, 1, hidden_channels=4, num_classes=3),
        "classes",
    ),
    "normflows": (normflows_flow, None),
    "normflows, conditional": (normflows_conditional, E),
    "normflows, images of classes": (
        lambda: nflows_kconv.normflows.finc_flow((1, 4, 4), 1, 1, hidden_channels=4, num_classes=3),
        "classes",
    ),
    "zuko": (lambda: zuko.flows.NICE(D, E), E),
    "torchflows": (lambda: torchflows.flows.Flow(RealNVP((D,))), None),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_one_for_each_row_of_the_context(name: str):
    build, kind = SAMPLED[name]
    flow = as_bijection(build())
    context = None if kind is None else torch.tensor([2, 0, 1, 1]) if kind == "classes" else torch.randn(4, E)
    assert flow.can_sample
    assert flow.sample(4, context).shape == ((4, 1, 4, 4) if kind == "classes" else (4, D))


def test_what_cannot_sample_says_so():
    assert not as_bijection(InvertibleConv2d(4)).can_sample
    with pytest.raises(ValueError, match="context must be None for a NormalizingFlow, which is not conditional"):
        as_bijection(normflows_flow()).sample(4, torch.randn(4, E))


def test_an_inverse_is_computed_whatever_is_cached():
    transform, calls = ExpTransform(cache_size=1), []
    transform._inverse = lambda y: calls.append(y) or y.log()
    one = as_bijection(transform)
    y, _ = one.forward(torch.randn(2, 3))
    one.inverse(y)
    assert len(calls) == 1


class Failing(Reversed):
    def reverse(self, y: Tensor) -> Tensor:
        return y.new_zeros(2) + y.new_zeros(3)


class WithoutKernel(Reversed):
    """A module for which torch raises a NotImplementedError."""

    def reverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(torch.eye(D).half(), y.half().mT, upper=True)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (pyro_transforms.Planar(4), NoInverse),
        (ComposeTransform([pyro_transforms.Planar(4)]), NoInverse),
        (transforms.CompositeTransform([transforms.BatchNorm(4)]), NoInverse),
        (nflows.flows.Flow(transforms.BatchNorm(4), nflows.distributions.StandardNormal([4])), NoInverse),
        (normflows.flows.Planar((4,)), NoInverse),
        (Failing(), RuntimeError),
        (WithoutKernel(), RuntimeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, type) is False else value.__name__,
)
def test_no_inverse_is_told_from_other_errors(module: Any, error: type[Exception]):
    message = "has no inverse" if error is NoInverse else "size of tensor|not implemented for 'Half'"
    with pytest.raises(error, match=message) as raised:
        as_bijection(module).inverse(torch.rand(3, 4))
    assert isinstance(raised.value, NoInverse) == (error is NoInverse)


def test_what_classes_tell_is_inherited_kind_by_kind():
    class Base(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x.new_zeros(len(x))

        def back(self, y: Tensor) -> Tensor:
            return y - 1

        def drawn(self, number: int) -> Tensor:
            return torch.zeros(number, 2)

    class Derived(Base):
        pass

    assert not is_bijection(Derived())
    with pytest.raises(
        TypeError, match=r"Derived must have forward\(x\) -> .* or have a class registered with .*register"
    ):
        as_bijection(Derived())
    register(Base, inverse="back", networks=("one", "two"))
    register(Derived, sample="drawn")
    one = as_bijection(Derived())
    assert torch.equal(one.inverse(torch.ones(2, 3))[0], torch.zeros(2, 3))
    assert one.networks == ("one", "two") and one.methods == {"forward", "back"}
    assert one.sample(3).shape == (3, 2) and not as_bijection(Base()).can_sample
    register(Derived, networks=())
    assert one.networks == () and as_bijection(Base()).networks == ("one", "two")


def test_couplings_of_every_library_tell_their_networks():
    coupling = normflows.flows.AffineCoupling(nn.Identity())
    mask = normflows.flows.MaskedAffineFlow(torch.ones(4))
    modules = (steps.AffineCoupling(nn.Identity()), nflows_coupling(), coupling, mask, nn.Linear(2, 2))
    expected = [("network",), ("transform_net",), ("param_map",), ("s", "t"), ()]
    assert [bijection.Bijection(module).networks for module in modules] == expected


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), torch.exp, InvertibleConv2d, None, 3, nflows.distributions.StandardNormal([4])],
    ids=lambda module: type(module).__name__,
)
def test_other_things_are_refused(module: Any):
    assert not is_bijection(module)
    with pytest.raises(TypeError, match="must have forward"):
        as_bijection(module)


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda x: x, TypeError, "Given.forward must return outputs and log-determinants, got a tensor of shape"),
        (lambda x: (x, x.sum()), ValueError, r"Given.forward must return log-determinants of shape \[2\], got a ten"),
        (lambda x: (x, 0.0), ValueError, r"Given.forward must return log-determinants of shape \[2\], got float"),
        (lambda x: (x, x.new_zeros(2, 1)), ValueError, r"of shape \[2\], got a tensor of shape \[2, 1\]"),
    ],
    ids=["no log-determinant", "one for all", "a number", "with an axis too many"],
)
def test_results_are_checked(result: Any, error: type[Exception], match: str):
    class Given(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return result(x)

        inverse = forward

    with pytest.raises(error, match=match):
        as_bijection(Given()).forward(torch.ones(2, 3))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="cls must be a class, got Linear"):
        register(nn.Linear(2, 2), inverse="reverse")
    with pytest.raises(TypeError, match="context must be None for a torch Transform, which takes none, got Tensor"):
        as_bijection(ExpTransform()).forward(torch.ones(2, 3), torch.ones(2))


def test_the_device_is_that_of_all_parameters():
    flow = nn.Sequential(InvertibleConv2d(4), InvertibleConv2d(4).to("meta"))
    assert as_bijection(flow[1]).device == torch.device("meta")
    assert as_bijection(ExpTransform()).device == torch.device("cpu")
    with pytest.raises(
        RuntimeError, match=r"Sequential must be on one device, got 0.raw_weight on cpu, 1.raw_weight on"
    ):
        bijection.Bijection(flow).device  # noqa: B018


def test_compiled_modules_are_what_they_were():
    flow = nflows_flow()
    one = as_bijection(torch.compile(flow, backend="eager"))
    assert one.module is flow and one.can_sample
