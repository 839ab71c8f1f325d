"""ONNX: onnxruntime computes the same results as torch for exported layers and flows, at any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import onnxruntime
import pytest
import torch
from adapters import check_missing_library
from cases import CASES, CASES_OF_KERNELS, Case
from oracles import assert_close
from torch import Tensor, nn

import nflows_kconv.normflows
from nflows_kconv import (
    ConditionalInvertibleConv2d,
    InvertibleConv1d,
    InvertibleConv2d,
    InvertibleConv3d,
    PeriodicConv2d,
    ops,
)
from nflows_kconv.onnx import translation_table
from nflows_kconv.torch_internals import tree_leaves

pytestmark = [
    pytest.mark.usefixtures("torchlib_once"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # from torch
]


class Calls(nn.Module):
    """Several functions of the same arguments."""

    def __init__(self, module: nn.Module, *functions: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.functions = module, functions

    def forward(self, *arguments: Any) -> list[Any]:
        return [function(*arguments) for function in self.functions]


def exported(
    module: nn.Module, arguments: Sequence[Any], optimize: bool = False, **options: Any
) -> Callable[..., list[Tensor]]:
    """The module as onnxruntime runs it; the optimizer takes as long as the rest: flows and docs/deploy.md have it."""
    program = torch.onnx.export(
        module.eval(),
        tuple(arguments),
        optimize=optimize,
        dynamo=True,
        custom_translation_table=translation_table(),
        verbose=False,
        **options,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())

    def run(*arguments: Any) -> list[Tensor]:
        values = zip(session.get_inputs(), tree_leaves(arguments), strict=True)
        return [*map(torch.from_numpy, session.run(None, {input.name: value.numpy() for input, value in values}))]

    return run


LAYERS = {
    "corners, bounded": partial(InvertibleConv2d, 4, corners=("BL", "TR"), max_inverse_gain=3.0),
    "sides and a corner, dilated": partial(
        InvertibleConv2d, 6, (2, 4), corners=("T", "TR", "R"), dilation=(1, 2), diagonal="learned", bias=True
    ),
    "1-D": partial(InvertibleConv1d, 6, bias=True),
    "3-D": partial(InvertibleConv3d, 6, (2, 3, 2), corners=("NBL", "FTR"), diagonal="learned"),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_layers_of_images_of_any_size(build: Callable[[], Any]):
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    both, sizes = Calls(layer, layer, layer.inverse), (5, 6, 3)[: layer.dimensions]
    dynamic = {axis: f"size_{axis}" for axis in (0, *range(2, 2 + len(sizes)))}
    optimize = layer.dimensions == 3  # torch translates conv3d with a zero bias of a wrong shape, which this removes
    run = exported(both, [torch.randn(2, layer.num_channels, *sizes)], optimize, dynamic_shapes=((dynamic,),))
    for batch, shape in ((2, sizes), (3, (1, 1, 1)), (1, (9, 4, 7))):
        input = torch.randn(batch, layer.num_channels, *shape[: len(sizes)])
        for actual, expected in zip(run(input), tree_leaves(both(input)), strict=True):
            assert_close(actual, expected)


def is_distinct(case: Case) -> bool:
    """Returns whether onnxruntime supports a case on a CPU, and its graph differs from that of others."""
    supported = case.dimensions > 1 and case.dtype in (torch.float32, torch.float16) and 0 not in case.input_shape
    return supported and case.layout == "contiguous" and case not in CASES_OF_KERNELS and len(case.corners) <= 6


class Solutions(nn.Module):
    """Solutions of several cases, transposed for every other one."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *operands: tuple[Tensor, ...]) -> list[Tensor]:
        return [
            ops.solve(*tensors, None, case.stencils, case.steps, False, index % 2 == 0)
            for index, (case, tensors) in enumerate(zip(self.cases, operands, strict=True))
        ]


def test_solutions():
    cases = [case for case in CASES if is_distinct(case)]
    module, operands = Solutions(cases), [(case.input(), case.weight(), case.bias()) for case in cases]
    run = exported(module, operands)
    for actual, expected in zip(run(*operands), module(*operands), strict=True):
        assert_close(actual, expected, factor=2)


def test_triangular_systems():
    torch.manual_seed(0)
    keywords = ("upper", "left", "unitriangular")
    options = [dict(zip(keywords, values, strict=True)) for values in product((False, True), repeat=3)]
    solutions = Calls(nn.Identity(), *(partial(torch.linalg.solve_triangular, **each) for each in options))
    systems = torch.eye(5) + 0.3 * torch.randn(2, 5, 5), torch.randn(2, 5, 5)
    for actual, expected in zip(exported(solutions, systems)(*systems), solutions(*systems), strict=True):
        assert_close(actual, expected)


def test_flows():
    """With all arguments, of normflows; docs/deploy.md has nflows, and convolutions for the density."""
    torch.manual_seed(0)
    shape, numbers = (2, 4, 8), 2**16  # so many that a decoded image tells its rounding
    options = {"direction": "inverse", "corners": "TR", "diagonal": "learned", "num_levels": numbers}
    flow = nflows_kconv.normflows.finc_flow(shape, 2, 1, hidden_channels=4, context_shape=(3,), **options).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    both = Calls(
        flow,
        lambda images, noise, latent, context: flow.log_prob(images, context=context, noise=noise),
        lambda images, noise, latent, context: flow.decode(latent, context),
    )

    def arguments(batch: int) -> tuple[Tensor, ...]:
        images = torch.randint(numbers, (batch, *shape))
        return images, torch.rand(images.shape), torch.randn(batch, images[0].numel()), torch.randn(batch, 3)

    sizes = (({0: torch.export.Dim.DYNAMIC},) * 4,)
    run, others = exported(both, arguments(2), optimize=True, dynamic_shapes=sizes), arguments(5)
    (density, images), expected = run(*others), both(*others)
    assert_close(density, expected[0])
    assert (images - expected[1]).abs().max() <= 1


def test_conditional_layers():
    layer, arguments = ConditionalInvertibleConv2d(4, context_features=3), (torch.randn(2, 4, 5, 6), torch.randn(2, 3))
    nn.init.normal_(layer.weight_network.weight, std=0.1)
    both = Calls(layer, layer, layer.inverse)
    run = exported(both, arguments)
    for actual, expected in zip(run(*arguments), tree_leaves(both(*arguments)), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (PeriodicConv2d(4), [torch.randn(2, 4, 8, 8)], "must have no periodic layers .*, got PeriodicConv2d"),
        (
            ConditionalInvertibleConv2d(4, context_features=3),
            [torch.randn(2, 4, 8, 8), torch.randn(2, 3)],
            "conditional layers must have a fixed batch size .*, got a dynamic batch size",
        ),
    ],
)
def test_what_is_refused(layer: nn.Module, arguments: Sequence[Tensor], message: str):
    with pytest.raises(torch.onnx.OnnxExporterError, match=f"NotImplementedError.*{message}"):
        exported(layer, arguments, dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments))


def test_without_onnxscript(monkeypatch: pytest.MonkeyPatch):
    check_missing_library(monkeypatch, "onnx", "onnxscript")
