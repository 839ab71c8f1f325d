"""Warm-up: the layers and inputs it sees, and that it changes no state."""

from __future__ import annotations

import copy
import importlib
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nflows_kconv import InvertibleConv2d, PeriodicConv2d, warmup
from nflows_kconv.backends import registry
from nflows_kconv.flows.steps import Sequence
from nflows_kconv.precompile import differentiate, problems


class Squeeze(nn.Module):
    """Two levels, the second with another shape; the second layer of the first runs backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(InvertibleConv2d(4, corners=("TL", "BR")) for _ in range(3))
        self.second = InvertibleConv2d(16, diagonal="learned", bias=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor, repeat: int = 1) -> Tensor:
        self.calls += 1
        for _ in range(repeat):
            input, _ = self.first[0](input)
            input, _ = self.first[1].inverse(input)
        input, _ = self.first[2](input)
        return self.second(nn.functional.pixel_unshuffle(input, 2))[0] + torch.rand(())


def visited(module: nn.Module, input_shape: tuple[int, ...], context: Any = None) -> list[tuple]:
    return [(problem[1].shape[0], tuple(problem[0].shape)) for problem in problems(module, input_shape, context)]


def test_every_kind_of_layer_and_every_shape_is_seen_once():
    assert visited(Squeeze(), (5, 4, 6, 8), 3) == [(4, (5, 4, 6, 8)), (16, (5, 16, 3, 4))]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_layer_alone_is_a_module(pruned: bool):
    layer = InvertibleConv2d(8)
    if pruned:
        prune.l1_unstructured(layer, "raw_weight", 0.5)
    assert visited(layer, (3, 8, 4, 5)) == [(8, (3, 8, 4, 5))]


def test_periodic_layers_have_no_kernels():
    assert visited(Sequence([InvertibleConv2d(4), PeriodicConv2d(4)]), (2, 4, 5, 6)) == [(4, (2, 4, 5, 6))]
    assert not visited(PeriodicConv2d(4), (2, 4, 5, 6))
    warmup(PeriodicConv2d(4), (2, 4, 5, 6))


def test_nothing_changes():
    module = Squeeze()
    module(torch.randn(2, 4, 4, 4)).sum().backward()
    before, gradients = copy.deepcopy(module.state_dict()), [p.grad.clone() for p in module.parameters()]
    generator = torch.get_rng_state()
    visited(module, (2, 4, 4, 4))
    assert torch.equal(torch.get_rng_state(), generator)
    assert module.training
    assert all(map(torch.equal, module.state_dict().values(), before.values()))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), gradients, strict=True))
    assert "forward" not in vars(module.second)


def test_flows_of_nflows_are_called_by_their_density():
    pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import ActNorm, CompositeTransform, InverseTransform

    from nflows_kconv.nflows import InvertibleConv2d

    steps = [InvertibleConv2d(4), ActNorm(4), InverseTransform(InvertibleConv2d(4, 2))]
    flow = Flow(CompositeTransform(steps), StandardNormal((4, 3, 5)))
    assert [shape for _, shape in visited(flow, (2, 4, 3, 5))] == [(2, 4, 3, 5)] * 2
    assert not flow._transform._transforms[1].initialized


def test_flows_of_normflows_are_called_by_their_density():
    normflows = pytest.importorskip("normflows")
    from nflows_kconv.normflows import GlowBlock

    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian((4, 3, 5)), [GlowBlock(4, 8, corners="TL")])
    assert visited(flow, (2, 4, 3, 5)) == [(4, (2, 4, 3, 5))]
    assert not any(part.data_dep_init_done for part in flow.modules() if isinstance(part, normflows.flows.ActNorm))


@pytest.mark.parametrize("library", ["nflows", "normflows"])
def test_image_flows_get_whole_numbers(library: str):
    pytest.importorskip(library)
    adapter = importlib.import_module(f"nflows_kconv.{library}")
    flow = adapter.finc_flow((1, 4, 6), levels=1, steps=1, hidden_channels=4, corners="TL")
    assert visited(flow, (2, 1, 4, 6)) == [(4, (2, 4, 2, 3))]


def test_layers_are_seen_where_libraries_go_around_their_call():
    """normflows' Reverse calls `forward` of its flow, and torchflows' composition calls that of its layers."""
    normflows = pytest.importorskip("normflows")
    from nflows_kconv.normflows import InvertibleConv2d

    assert visited(normflows.flows.Reverse(InvertibleConv2d(4)), (2, 4, 3, 5)) == [(4, (2, 4, 3, 5))]


def test_both_directions_and_their_gradients_run(monkeypatch: pytest.MonkeyPatch):
    ran, run = set(), registry.run
    (problem,) = problems(InvertibleConv2d(4), (2, 4, 3, 3))
    monkeypatch.setattr(registry, "attempt", None)  # of the CPU, which tells nobody
    monkeypatch.setattr(registry, "run", lambda call: ran.add((call.operation, call.transpose)) or run(call))
    differentiate(problem)
    assert ran == {*product(("conv", "solve"), (False, True)), ("weight_gradient", False)}


def test_on_the_cpu_nothing_happens():
    warmup(Squeeze(), (2, 4, 4, 4))
    warmup(Squeeze(), (1, 2, 3))  # does not even check the shape


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got function"):
        warmup(lambda x: x, (1, 4, 4, 4))
    with pytest.raises(ValueError, match="module must contain a layer of nflows-kconv, got a Conv2d without one"):
        warmup(nn.Conv2d(4, 4, 3), (1, 4, 4, 4))


def test_a_failing_call_says_which():
    match = r"calling Squeeze with an input of shape \(2, 6, 4, 4\) failed: input must have the weight's 4 channels"
    with pytest.raises(RuntimeError, match=match):
        visited(Squeeze(), (2, 6, 4, 4))
