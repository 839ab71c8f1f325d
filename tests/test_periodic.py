"""Convolutions with circular borders against dense matrices, and in every library."""

import copy
import math
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import oracles
import pytest
import torch
from cases import Case, over_cases
from oracles import assert_close
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.torchflows
from nflows_kconv import InvertibleConv2d, PeriodicConv1d, PeriodicConv2d, PeriodicConv3d, bound
from nflows_kconv.bijection import as_bijection
from nflows_kconv.diagnostics import conditioning
from nflows_kconv.periodic import PeriodicConv
from nflows_kconv.testing import check_transform

LAYERS = {1: PeriodicConv1d, 2: PeriodicConv2d, 3: PeriodicConv3d}
TORCHS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


SMALL = {
    "1D": Case(("L",) * 3, per_group=1, size=(5,), kernel_size=(4,), dtype=torch.float64),
    "2D": Case(("TL", "BR"), size=(3, 4), kernel_size=(2, 3), dtype=torch.float64),
    "2D, full": Case(("T",), size=(4, 5), kernel_size=(4, 5), dtype=torch.float64),
    "3D": Case(("NTL",), per_group=1, size=(2, 1, 4), kernel_size=(2, 1, 3), dtype=torch.float64),
}


def layer_of(case: Case, **options: Any) -> PeriodicConv:
    """Makes a layer for the images of a case, one group per corner; options not given vary with the case."""
    random = Random(repr(case))
    scale = random.choice((-1, 1)) * 10.0 ** random.randint(-3, 3)
    drawn = dict(
        groups=len(case.corners),
        diagonal=random.choice(("unit", "learned")),
        bias=random.choice((True, False)),
        max_inverse_gain=random.choice((1.01, 2, 10, 100)),
    )
    kernel_size = tuple(map(min, case.kernel_size, case.size))
    layer = LAYERS[case.dimensions](case.channels, kernel_size, **drawn | options)
    scattered(layer, scale)
    if random.random() < 0.3:  # one channel reaches the bound
        nn.init.constant_(layer.raw_weight, scale)
    return layer.to(case.dtype)


def scattered(layer: PeriodicConv, size: float = 0.3, seed: int = 0) -> PeriodicConv:
    """Returns the layer with a weight of a given size; biases of that size would overflow half precision."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((size if name == "raw_weight" else 0.3) * noise)
    return layer


@over_cases()
def test_layers_are_dense_matrices(case: Case, device: str):
    """Checks both directions, log-determinants, bounds of singular values, and torch's convolution."""
    if not 0 < case.unknowns <= 400:
        return
    layer, input, size = layer_of(case).to(device), case.input(device), case.size
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    weight, x = exact.weight.detach(), input.cpu().double()
    bias = 0 if exact.bias is None else exact.bias.detach().view(-1, *[1] * len(size))
    matrices = oracles.circular_matrices(weight, size)

    def dense(function: Callable[[Tensor, Tensor], Tensor], images: Tensor) -> Tensor:
        groups = zip(matrices, images.chunk(layer.groups, 1), strict=True)
        return torch.cat([function(matrix, group.flatten(1).mT).mT.reshape(group.shape) for matrix, group in groups], 1)

    values = torch.cat([torch.linalg.svdvals(matrix) for matrix in matrices])
    diagonal = torch.ones(1).double() if exact.log_diagonal is None else exact.log_diagonal.exp()
    assert 1 / values.min() <= (1 + 1e-9) * layer.max_inverse_gain / diagonal.min()
    assert values.max() <= (1 + 1e-9) * (2 - 1 / layer.max_inverse_gain) * diagonal.max()
    condition = (values.max() / values.min()).item()
    found = conditioning(exact, size)
    norms = torch.stack([values.max(), 1 / values.min()])
    assert_close(torch.tensor(found[:2], dtype=torch.float64), norms, factor=condition)
    assert found.inverse_gain <= (1 + 1e-9) * found.inverse_gain_bound
    assert found.inverse_gain_bound <= (1 + 1e-9) * layer.max_inverse_gain / diagonal.min()

    output, log_det = layer(input)
    solution, inverse_log_det = layer.inverse(input)
    assert_close(output, dense(torch.matmul, x) + bias)
    assert_close(solution, dense(torch.linalg.solve, x - bias), factor=condition)
    expected = sum(torch.linalg.slogdet(matrix).logabsdet for matrix in matrices).expand(case.batch)
    assert_close(log_det, expected, factor=condition * case.unknowns**0.5)
    assert torch.equal(inverse_log_det, -log_det)
    assert log_det.dtype == torch.promote_types(case.dtype, torch.float32)
    log_det += 1  # users add to it
    if case.batch:
        options = dict(groups=layer.groups, bias=False, padding="same", padding_mode="circular")
        of_torch = TORCHS[len(size)](*[layer.num_channels] * 2, layer.kernel_size, **options).double()
        of_torch.weight.data = weight
        assert_close(output, of_torch(x) + bias)


def test_the_bound_is_reached():
    """For a multiple of the identity the singular values are 1 - r, so no smaller bound exists."""
    layer = PeriodicConv1d(1, 1, max_inverse_gain=4).double()
    nn.init.constant_(layer.raw_weight, -1000.0)
    assert layer.solve(torch.ones(1, 1, 5, dtype=torch.float64)).flatten().tolist() == [pytest.approx(4)] * 5


def test_the_weight_is_computed_once_a_call(monkeypatch: pytest.MonkeyPatch):
    calls, scale = [], bound.scale
    monkeypatch.setattr(bound, "scale", lambda *arguments: calls.append(1) or scale(*arguments))
    layer, input = PeriodicConv2d(4), torch.randn(2, 4, 5, 6)
    for function in (layer, layer.inverse):
        function(input)
    assert len(calls) == 2


@pytest.mark.parametrize("dimensions", [1, 3])  # 2 are as 3, and 1 becomes 2
def test_every_convolution_is_an_operator(dimensions: int):
    """Also in derivatives of any order: a GPU would compute torch's own in TF32."""
    layer, input = LAYERS[dimensions](4, groups=2), torch.randn(2, 4, *(5, 4, 3)[:dimensions])

    def second(input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        def first(input: Tensor, weight: Tensor) -> Tensor:
            output, log_det = functional_call(layer, {"raw_weight": weight}, input)
            return output.pow(3).sum() + log_det.sum()

        return grad(lambda *leaves: sum(d.square().sum() for d in grad(first, (0, 1))(*leaves)), (0, 1))(input, weight)

    graph = make_fx(second, tracing_mode="fake")(input, layer.raw_weight.detach()).graph
    called = {str(node.target) for node in graph.nodes if "conv" in str(node.target)}
    assert called == {"nflows_kconv.conv.default", "nflows_kconv.weight_gradient.default"}


def test_groups_are_layers_of_their_own():
    layer, alone = scattered(PeriodicConv2d(6, groups=3), 1.0), PeriodicConv2d(2)
    for raw_weight, weight in zip(layer.raw_weight.chunk(3), layer.weight.chunk(3), strict=True):
        alone.raw_weight.data = raw_weight.detach()
        assert_close(alone.weight, weight)


@pytest.mark.parametrize(("case", "inverse"), zip(SMALL.values(), (False, True, True, False), strict=True), ids=SMALL)
def test_derivatives(case: Case, inverse: bool):
    layer, input = layer_of(case, diagonal="learned", bias=True), case.input().requires_grad_()
    parameters = dict(layer.named_parameters())

    def function(input: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(layer, dict(zip(parameters, values, strict=True)), input, {"inverse": inverse})

    arguments = input, *parameters.values()
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
    stacked = tuple(torch.stack([argument, 2 * argument]).detach() for argument in arguments)
    for batched, *singles in zip(
        vmap(function)(*stacked), *(function(*(s[i] for s in stacked)) for i in (0, 1)), strict=True
    ):
        assert_close(batched, torch.stack(singles), factor=10)

    def output(input: Tensor) -> Tensor:
        return function(input, *parameters.values())[0]

    point, tangent = input.detach(), torch.randn_like(input)
    _, linear = torch.func.linearize(output, point)  # folds what does not depend on the input
    assert_close(linear(tangent), torch.func.jvp(output, (point,), (tangent,))[1])


def test_compiled_layers():
    layer, input = layer_of(SMALL["3D"]), SMALL["3D"].input()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for inverse in (False, True):
        with torch.set_grad_enabled(not inverse):
            for actual, expected in zip(compiled(input, inverse=inverse), layer(input, inverse=inverse), strict=True):
                assert_close(actual, expected)


def test_exported_layers_need_torch_alone():
    layer, input = layer_of(SMALL["2D"]), SMALL["2D"].input()
    larger = torch.cat([input, 2 * input])
    for options in ({}, {"inverse": True}):
        sizes = {"input": {0: torch.export.Dim("batch")}} | dict.fromkeys(options)
        program = torch.export.export(layer, (input,), options, dynamic_shapes=sizes).run_decompositions()
        assert "nflows_kconv" not in str(program.graph)
        for actual, expected in zip(program.module()(larger, **options), layer(larger, **options), strict=True):
            assert_close(actual, expected)


def test_autocast_does_not_reach_it():
    layer, input = scattered(PeriodicConv2d(4, groups=2, bias=True)), torch.randn(2, 4, 5, 6).bfloat16()
    expected = [*layer(input.float()), *layer.inverse(input.float())]
    program = torch.export.export(layer, (input.float(),)).module()  # of a time when it was off
    with torch.autocast("cpu", torch.bfloat16):
        results = [*layer(input), *layer.inverse(input)]
        exported = program(input.float())
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, exported, expected[:2]))


def test_tensors_without_values():
    layer, input = PeriodicConv2d(4, diagonal="learned"), torch.randn(3, 4, 5, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = layer.inverse(mode.from_tensor(input))
    for output, log_det in (layer.to("meta")(input.to("meta")), fake):
        assert (output.shape, log_det.shape) == ((3, 4, 5, 6), (3,))


@pytest.mark.parametrize("cls", [PeriodicConv1d, nflows_kconv.normflows.PeriodicConv2d, PeriodicConv3d])
def test_layers_are_sound_transforms(cls: type[PeriodicConv]):
    layer = scattered(cls(4, 2, groups=2, diagonal="learned", bias=True))
    check_transform(layer, torch.randn(2, 4, *(3, 4, 2)[: layer.dimensions]))


@pytest.mark.parametrize("options", [{}, dict(groups=4, diagonal="learned", bias=True), dict(kernel_size=7)], ids=str)
def test_starts_close_to_the_identity(options: dict):
    torch.manual_seed(0)
    layer, input = PeriodicConv2d(48, **options), torch.randn(2, 48, 8, 8)
    output, log_det = layer(input)
    assert 0.01 < (output - input).std() < 0.1
    assert log_det.abs().max() < 0.01 * input[0].numel()
    limit = copy.deepcopy(layer)
    limit.max_inverse_gain = 1e9
    assert torch.equal(layer.weight, limit.weight)  # its bound is inactive


# Files


def test_the_weight_can_be_assigned_and_loaded():
    """Also as saved by torch's circular convolution; files of other layers are refused."""
    for options in ({}, dict(diagonal="learned", bias=True)):
        layer, other, loaded = (scattered(PeriodicConv2d(4, (3, 2), **options), 0.02, seed) for seed in range(3))
        state_dict = {name: value for name, value in layer.state_dict().items() if name == "bias"}
        other.weight = layer.weight
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.load_state_dict(state_dict | {"weight": layer.weight.detach()})
        for each in (other, loaded):
            torch.testing.assert_close(each.weight, layer.weight)
        with pytest.raises(
            ValueError, match=r"must respect max_inverse_gain=10, got off-diagonal entries .* times too large"
        ):
            other.weight = 1000 * torch.ones(4, 4, 3, 2).cumsum(0)
    with pytest.raises(ValueError, match="the pivot's diagonal must be positive for diagonal='learned', got -1"):
        other.weight = -torch.ones(4, 4, 3, 2)
    with pytest.raises(RuntimeError, match="weight must not be modified in place"):
        other.weight.zero_()
    grouped, corner = PeriodicConv2d(4, groups=2), InvertibleConv2d(4, corners=("TL", "BR"))
    with pytest.raises(
        RuntimeError, match=r"corners must match the layer's \('periodic', 'periodic'\), got \('TL', 'BR'"
    ):
        grouped.load_state_dict(corner.state_dict())
    with pytest.raises(
        RuntimeError, match=r"corners must match the layer's \('TL', 'BR'\), got \('periodic', 'periodic'"
    ):
        corner.load_state_dict(grouped.state_dict())


# Errors

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels": (dict(num_channels=0), ValueError, "num_channels must be at least 1, got 0"),
    "groups": (dict(groups=3), ValueError, "num_channels must be a multiple of groups, got 4 channels and 3 groups"),
    "no groups": (dict(groups=0), ValueError, "groups must be at least 1, got 0"),
    "kernel": (dict(kernel_size=(3, 0)), ValueError, "kernel_size must be at least 1, got 0"),
    "diagonal": (dict(diagonal="free"), ValueError, 'diagonal must be "unit" or "learned", got \'free\''),
    "no bound": (dict(max_inverse_gain=None), TypeError, "max_inverse_gain must be a number, got None"),
    "bound": (dict(max_inverse_gain=1), ValueError, "max_inverse_gain must be finite and greater than 1, got 1"),
}
WRONG_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "small": (torch.zeros(2, 4, 2, 9), ValueError, r"as large as the kernel \(3, 3\) along every axis, got \(2, 9\)"),
    "no pixels": (torch.zeros(2, 4, 0, 9), ValueError, "at least as large as the kernel"),
    "rank": (
        torch.zeros(4, 5, 5),
        ValueError,
        r"input must have the 4 dimensions \[B, C, H, W\], got shape \(4, 5, 5\)",
    ),
    "channels": (torch.zeros(2, 6, 5, 5), ValueError, "input must have the weight's 4 channels, got 6"),
    "dtype": (
        torch.zeros(2, 4, 5, 5).double(),
        TypeError,
        "input and weight must have the same dtype, got torch.float64",
    ),
    "list": ([0.0], TypeError, "input must be a tensor, got list"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_constructor_errors(arguments: dict, error: type[Exception], match: str):
    with pytest.raises(error, match=f"^{match}"):
        PeriodicConv2d(**{"num_channels": 4} | arguments)


@pytest.mark.parametrize(("input", "error", "match"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_errors_of_calls(input: Any, error: type[Exception], match: str):
    layer = PeriodicConv2d(4)
    for function in (layer, layer.inverse, layer.convolve, layer.solve):
        with pytest.raises(error, match=match):
            function(input)


def test_a_diagonal_without_reciprocal():
    layer = PeriodicConv2d(4, diagonal="learned")
    nn.init.constant_(layer.log_diagonal, -math.inf)
    with pytest.raises(ValueError, match="the pivot's diagonal and its reciprocal must be finite and nonzero"):
        layer.solve(torch.zeros(1, 4, 3, 3))


# Libraries


# Builders of the layer for a shape, by library.
LIBRARIES: dict[Any, Callable[[Any, tuple[int, ...]], nn.Module]] = {
    nflows_kconv.nflows: lambda cls, shape: cls(shape[0], bias=True),
    nflows_kconv.normflows: lambda cls, shape: cls(shape[0], bias=True),
    nflows_kconv.freia: lambda cls, shape: cls([shape], bias=True),
    nflows_kconv.torchflows: lambda cls, shape: cls(shape, bias=True),
    nflows_kconv.distributions: lambda cls, shape: cls(shape[0], bias=True, cache_size=1),
}


@pytest.mark.parametrize("dimensions", LAYERS)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)
def test_every_library_has_the_layer(library: Any, dimensions: int):
    core = scattered(LAYERS[dimensions](4, bias=True))
    input = torch.randn(2, 4, *(5, 4, 3)[:dimensions])
    module = LIBRARIES[library](getattr(library, LAYERS[dimensions].__name__), tuple(input.shape[1:]))
    module.load_state_dict(core.state_dict())
    bijection = as_bijection(module)
    directions = [core.inverse, core] if library is nflows_kconv.normflows else [core, core.inverse]
    for function, expected in zip((bijection.forward, bijection.inverse), directions, strict=True):
        assert all(map(torch.equal, function(input), expected(input)))
    assert torch.equal(module.convolve(input), core.convolve(input))


def test_the_size_is_checked_where_the_shape_alone_counts():
    small = torch.zeros(1, 4, 2, 5)
    with pytest.raises(ValueError, match="at least as large as the kernel"):
        nflows_kconv.distributions.PeriodicConv2d(4).log_abs_det_jacobian(small, small)
