"""torch.compile and torch.export: one graph without breaks, the same numbers, no recompilation for other sizes."""

import copy
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Case
from oracles import assert_close
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jvp, vmap

from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d, functional, ops
from nflows_kconv.flows import steps
from nflows_kconv.layer import InvertibleConv

LAYERS = {
    "unit": partial(InvertibleConv2d, 4),
    "learned, bias": partial(InvertibleConv2d, 4, diagonal="learned", bias=True),
    "one corner": partial(InvertibleConv2d, 4, corners="BR", diagonal="learned"),
    "sides, dilated": partial(InvertibleConv2d, 4, corners=("T", "R"), dilation=(1, 2), diagonal="learned"),
    "1-D, dilated": partial(InvertibleConv1d, 4, corners="R", dilation=2),
    "3-D": partial(InvertibleConv3d, 4, 2, corners=("NBL", "FTR"), diagonal="learned", bias=True),
}
# Without processes that import torch, headers to compile for other graphs, and a search for what vectors there are.
QUICKLY = {"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, **options):
    """Traces everything, including derivatives, without code generation: seconds instead of minutes."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def a_layer(build: Callable[[], InvertibleConv], device: str) -> InvertibleConv:
    torch.manual_seed(0)
    layer = build().to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


def images(batch: int = 3, height: int = 5, width: int = 6, device: str = "cpu") -> torch.Tensor:
    return torch.randn(batch, 4, height, width, device=device)


def images_for(layer: InvertibleConv, device: str) -> torch.Tensor:
    return torch.randn(3, 4, *(5, 6, 3)[: layer.dimensions], device=device)


@every_layer
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_layer(build: Callable[[], InvertibleConv], inverse: bool, device: str):
    """Without gradients, which `test_training_step` has."""
    layer = a_layer(build, device)
    input = images_for(layer, device)
    function = layer.inverse if inverse else layer
    with torch.no_grad():
        for actual, expected in zip(compiled(function)(input), function(input), strict=True):
            assert_close(actual, expected)
            assert actual.stride() == expected.stride()


class Flow(nn.Module):
    """Both directions in one loss, as in a training step."""

    def __init__(self, build: Callable[[], InvertibleConv], device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(a_layer(build, device) for _ in range(2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output, log_det = self.layers[0](input)
        output, inverse_log_det = self.layers[1].inverse(output)
        return (output.square().flatten(1).sum(1) / 2 - log_det - inverse_log_det).mean()


# Each asks torch.func for derivatives of f, a function of x, in direction v; u is f followed by a sum of cubes.
TRANSFORMS = {
    "jvp": lambda f, u, x, v: jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, u, x, v: jacfwd(f)(x),
    "hessian": lambda f, u, x, v: hessian(u)(x),
    "vmap of jvp": lambda f, u, x, v: vmap(lambda x, v: jvp(f, (x[None],), (v[None],))[1])(x, v),
    "grad of grad": lambda f, u, x, v: grad(lambda x: (grad(u)(x) * v).sum())(x),
    "vmap of grad": lambda f, u, x, v: vmap(grad(lambda x: u(x[None])))(x),
}


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name: str, compiler: str, device: str):
    """Each for one direction by one compiler, and for the other by the other."""
    transform, inverse = TRANSFORMS[name], (compiler == "eager") == bool(list(TRANSFORMS).index(name) % 2)
    layer = a_layer(LAYERS["learned, bias"], device)
    direction = layer.inverse if inverse else layer
    input, tangent = images(2, 2, 3, device), images(2, 2, 3, device)

    def derivative(input: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        def function(input: torch.Tensor) -> torch.Tensor:
            return direction(input)[0]

        return transform(function, lambda input: function(input).pow(3).sum(), input, tangent)

    fast = torch.compile(derivative, backend=compiler, fullgraph=True)
    assert_close(fast(input, tangent), derivative(input, tangent), factor=4)


@every_layer
def test_training_step(build: Callable[[], InvertibleConv], device: str):
    model = Flow(build, device)
    other = copy.deepcopy(model)
    fast = compiled(other)
    for seed in range(3):
        torch.manual_seed(seed)
        input = images_for(model.layers[0], device)
        losses = []
        for flow, call in ((model, model), (other, fast)):
            optimizer = torch.optim.SGD(flow.parameters(), lr=0.01, weight_decay=0.1)
            optimizer.zero_grad()
            losses.append(call(input))
            losses[-1].backward()
            optimizer.step()
        assert_close(losses[1], losses[0])
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", ["learned, bias", "sides, dilated"])
def test_dynamic_shapes_compile_once(name: str, inverse: bool, device: str):
    layer = a_layer(LAYERS[name], device)
    function = layer.inverse if inverse else layer
    fast = compiled(function, dynamic=True)
    for index, (batch, height, width) in enumerate(((3, 5, 6), (4, 7, 5), (17, 9, 11), (2, 33, 2))):
        input = images(batch, height, width, device)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            for actual, expected in zip(fast(input), function(input), strict=True):
                assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("name", ["conv", "inverse"])
def test_functions_and_gradients_of_any_layout(name: str, layout: str, device: str):
    case = Case(("TL", "BR"), per_group=3, layout=layout)
    function = getattr(case, name)
    leaves = [tensor.detach().requires_grad_() for tensor in (case.input(device), case.weight(device))]
    outputs = [call(*leaves) for call in (function, compiled(function))]
    assert_close(outputs[1], outputs[0])
    with FakeTensorMode() as mode:
        assert function(*map(mode.from_tensor, leaves)).stride() == outputs[0].stride()
    gradients = [torch.autograd.grad(output.pow(2).sum(), leaves) for output in outputs]
    for actual, expected in zip(*reversed(gradients), strict=True):
        assert_close(actual, expected)


def test_log_abs_det(device: str):
    case = Case()
    weight = case.weight(device)
    options = dict(corners=case.corners, size=case.size)
    assert_close(compiled(functional.log_abs_det)(weight, **options), functional.log_abs_det(weight, **options))


def test_autocast(device: str):
    layer, input = a_layer(LAYERS["learned, bias"], device), images(device=device)
    with torch.autocast(device, torch.bfloat16):
        output, log_det = compiled(layer)(input.bfloat16())
    assert output.dtype == log_det.dtype == torch.float32
    assert_close(output, layer(input.bfloat16().float())[0])

    def derivative(input: torch.Tensor) -> torch.Tensor:
        return jvp(lambda input: layer.inverse(input)[0], (input,), (input,))[1]

    with torch.autocast(device, torch.bfloat16):
        assert_close(compiled(derivative)(input), derivative(input))
    assert_close(compiled(derivative)(input), derivative(input))


def test_parameters_that_change_are_seen(device: str):
    layer, input = a_layer(LAYERS["learned, bias"], device), images(device=device)
    fast = compiled(layer)
    fast(input)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert_close(fast(input)[0], layer(input)[0])


def steps_with_actnorm(device: str) -> steps.Sequence:
    torch.manual_seed(0)
    pairs = ([a_layer(LAYERS["unit"], device), steps.ActNorm(4)] for _ in range(3))
    return steps.Sequence([steps.Sequence(pair) for pair in pairs]).to(device)


def test_actnorm_compiles_once_more_after_its_first_batch(device: str):
    """The first one breaks the graph; from the second on it is one graph, whatever happens to the buffer."""
    model, input = steps_with_actnorm(device), images(device=device)
    expected, other = copy.deepcopy(model), copy.deepcopy(model)
    fast = torch.compile(model, backend="aot_eager")
    for function in (fast, expected):
        function(input)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(one, two)
    counters.clear()
    assert_close(fast(2 * input)[0], expected(2 * input)[0])
    assert counters["stats"]["unique_graphs"] == 1
    norms = [module for module in model.modules() if isinstance(module, steps.ActNorm)]
    with torch.compiler.set_stance("fail_on_recompile"):
        fast(input)
        for norm in norms:
            norm.initialized.fill_(True)  # as DistributedDataParallel does at each step
        model.eval().train()
        fast(input)
        model.load_state_dict(model.state_dict())
        fast(input)
    shift = norms[1].shift.clone()
    norms[1].initialized.fill_(False)
    model.train()
    fast(input + 5)
    assert norms[1].initialized
    assert not torch.equal(norms[1].shift, shift)

    other(input)  # then it is one graph from the start
    torch.compiler.reset()
    assert_close(compiled(other)(input)[0], other(input)[0])


class Inverted(nn.Module):
    def __init__(self, layer: InvertibleConv) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.inverse(input)


def exported(module: nn.Module, input: torch.Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    sizes = {axis: torch.export.Dim(f"size_{axis}") for axis in (0, *range(2, input.dim()))}
    return torch.export.export(module, (input,), dynamic_shapes=(sizes,), strict=strict)


def of_twice_the_size(input: torch.Tensor) -> torch.Tensor:
    return torch.randn(7, 4, *(2 * size for size in input.shape[2:]), device=input.device)


@every_layer
def test_export_of_the_inverse(build: Callable[[], InvertibleConv], device: str):
    module = Inverted(a_layer(build, device))
    input = images_for(module.layer, device)
    program, larger = exported(module, input), of_twice_the_size(input)
    for actual, expected in zip(program.module()(larger), module(larger), strict=True):
        assert_close(actual, expected)


# test_deploy.py has one of corners.
@pytest.mark.parametrize(("name", "strict"), [("sides, dilated", True), ("3-D", False)])
def test_exported_convolutions_decompose_into_plain_aten(name: str, strict: bool, device: str):
    layer = a_layer(LAYERS[name], device)
    input = images_for(layer, device)
    program, larger = exported(layer, input, strict), of_twice_the_size(input)
    decomposed = program.run_decompositions()
    assert not any("nflows_kconv" in str(node.target) for node in decomposed.graph.nodes)
    for each in (program, decomposed):
        for actual, expected in zip(each.module()(larger), layer(larger), strict=True):
            assert_close(actual, expected)


def test_compiled_programs_have_the_kernels(device: str):
    layer, graphs = a_layer(LAYERS["unit"], device), []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    input = images_for(layer, device)
    torch.compile(exported(layer, input).module(), backend=aot_autograd(fw_compiler=compiler))(input)
    assert ops.conv in {node.target for graph in graphs for node in graph.graph.nodes}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_inductor(device: str):
    """The default compiler, with code generation around the operators."""
    model = Flow(LAYERS["learned, bias"], device)
    other = copy.deepcopy(model)
    input = images(device=device)
    losses = model(input), torch.compile(other, fullgraph=True, options=QUICKLY)(input)
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        assert_close(one.grad, two.grad)
