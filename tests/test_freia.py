"""The adapter for FrEIA, inside its networks."""

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
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode, SequenceINN
from FrEIA.modules import ActNorm, GLOWCouplingBlock, HaarDownsampling, InvertibleModule, PermuteRandom
from torch import nn
from torch.testing import assert_close

import nflows_kconv
from nflows_kconv.freia import InvertibleConv2d

SHAPE = (4, 4, 2)  # of an image


def sequence():
    flow = SequenceINN(*SHAPE)
    flow.append(InvertibleConv2d, corners="TL", diagonal="learned")
    flow.append(ActNorm)
    flow.append(HaarDownsampling)
    flow.append(GLOWCouplingBlock, subnet_constructor=lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1))
    flow.append(InvertibleConv2d, kernel_size=(2, 3), bias=True)
    return flow


def graph():
    nodes = [InputNode(*SHAPE)]
    for module, arguments in (
        (InvertibleConv2d, {"corners": "BR", "diagonal": "learned"}),
        (PermuteRandom, {}),
        (InvertibleConv2d, {"kernel_size": 2}),
    ):
        nodes.append(Node(nodes[-1], module, arguments))
    return GraphINN([*nodes, OutputNode(nodes[-1])])


NETWORKS = {"SequenceINN": sequence, "GraphINN": graph}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    network = scatter(request.param())
    network(torch.randn(8, *SHAPE))  # initialises ActNorm
    return network


def test_is_a_module_of_freia_and_the_core_layer():
    module = InvertibleConv2d([SHAPE])
    assert isinstance(module, InvertibleModule)
    assert isinstance(module, nflows_kconv.InvertibleConv2d)
    assert module.output_dims([SHAPE]) == [SHAPE]
    assert module.dims_in == [SHAPE] and module.dims_c == []


def test_is_the_core_layer_in_both_directions():
    core = scatter(nflows_kconv.InvertibleConv2d(4, 2, corners="TR", diagonal="learned", bias=True))
    module = InvertibleConv2d([SHAPE], kernel_size=2, corners="TR", diagonal="learned", bias=True)
    module.load_state_dict(core.state_dict())
    x = torch.randn(3, *SHAPE)
    for (output,), log_abs_det, expected in (
        (*module([x]), core(x)),
        (*module([x], rev=True, jac=False), core.inverse(x)),
    ):
        assert torch.equal(output, expected[0])
        assert torch.equal(log_abs_det, expected[1])


def test_both_directions(network):
    network = network.double()
    check_directions(network, lambda z: network(z, rev=True), torch.randn(2, *SHAPE, dtype=torch.float64))


def test_the_log_determinant_is_the_one_that_freia_measures():
    network, x = scatter(graph()), torch.randn(3, *SHAPE)
    assert_close(network(x)[1], network.log_jacobian_numerical(x), rtol=1e-2, atol=1e-2)


def test_training_lowers_the_loss():
    network = SequenceINN(*SHAPE)
    for corners in ("TL", "BR"):
        network.append(InvertibleConv2d, corners=corners, diagonal="learned", bias=True)
    data = torch.randn(64, *SHAPE).cumsum(2) + 1

    def loss():
        z, log_abs_det = network(data)
        return (0.5 * z.square().sum((1, 2, 3)) - log_abs_det).mean()

    check_training(network, loss)


def test_ignores_conditions():
    network = SequenceINN(*SHAPE)
    network.append(InvertibleConv2d, cond=0, cond_shape=(3,))
    x = torch.randn(2, *SHAPE)
    assert torch.equal(network(x, c=[torch.randn(2, 3)])[0], network(x, c=[torch.randn(2, 3)])[0])


@pytest.mark.parametrize("dims_in", [[], [(4, 4)], [SHAPE, SHAPE]], ids=str)
def test_rejects_what_is_not_one_image(dims_in):
    with pytest.raises(ValueError, match=re.escape(f"one shape, [(C, H, W)], got {dims_in}")):
        InvertibleConv2d(dims_in)


def test_a_deep_copy_is_equal_and_independent():
    check_deep_copy(scatter(sequence()), torch.randn(8, *SHAPE))


def test_a_saved_state_gives_the_same_results():
    def build():
        flow = SequenceINN(*SHAPE)
        flow.append(InvertibleConv2d, corners="TL", diagonal="learned", bias=True)
        return flow

    check_saved_state(build, torch.randn(8, *SHAPE))


def test_without_freia_the_error_names_the_extra(monkeypatch):
    check_missing_library(monkeypatch, "freia", "FrEIA.modules")
