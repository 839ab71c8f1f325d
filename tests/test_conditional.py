"""Weights from a context: each image is treated as by an unconditional layer with its weight."""

import copy
import math
import re

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows as nf
import oracles
import pyro
import pytest
import torch
import zuko
from cases import LAYOUTS, Case, over_cases
from oracles import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.func import functional_call, grad, vmap

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.pyro
import nflows_kconv.torchflows
import nflows_kconv.zuko
from nflows_kconv import conditional, functional, layer
from nflows_kconv.bijection import as_bijection
from nflows_kconv.diagnostics import conditioning
from nflows_kconv.testing import check_transform

FEATURES = 3
OPTIONS = {
    "unit": {},
    "learned": dict(diagonal="learned"),
    "bounded": dict(diagonal="learned", corners="BR", max_inverse_gain=2),
    "network": dict(
        weight_network=nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 152)), diagonal="learned"
    ),
    "sides, dilated": dict(corners=("T", "R"), kernel_size=(2, 3), dilation=(1, 2)),
    "sequences": dict(dimensions=1, diagonal="learned", dilation=2),
    "volumes": dict(dimensions=3, corners=("NTR", "FBL"), kernel_size=2, max_inverse_gain=3),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def build(dimensions: int = 2, **options) -> conditional.ConditionalInvertibleConv:
    options = {"num_channels": 8, "context_features": FEATURES, **options}
    return getattr(conditional, f"ConditionalInvertibleConv{dimensions}d")(**copy.deepcopy(options))


def trained(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the layer in float64 with parameters for which contexts matter, including masked entries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def data(layer: nn.Module, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Returns images and contexts."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, layer.num_channels, *(3, 4, 2)[: layer.dimensions], generator=generator)
    return images.to(layer.raw_weight), torch.randn(batch, FEATURES, generator=generator).to(layer.raw_weight)


def alone(module: nn.Module, context: Tensor) -> layer.InvertibleConv:
    """Returns the unconditional layer with the parameters for one context."""
    twin = getattr(layer, f"InvertibleConv{module.dimensions}d")(
        module.num_channels,
        module.kernel_size,
        corners=module.corners,
        dilation=module.dilation,
        diagonal=module.diagonal,
        max_inverse_gain=module.max_inverse_gain,
    ).to(module.raw_weight)
    network = module.weight_network
    if isinstance(network, nn.Linear):
        numbers = network.weight @ context
    else:
        numbers = network.scale * network.network(context)
    weight, diagonal = numbers.split([twin.raw_weight.numel(), len(numbers) - twin.raw_weight.numel()])
    with torch.no_grad():
        twin.raw_weight.copy_(module.raw_weight + weight.view_as(twin.raw_weight))
        if twin.log_diagonal is not None:
            twin.log_diagonal.copy_(module.log_diagonal + 2 * torch.tanh(diagonal / 2))
    return twin


@every_option
def test_each_image_has_its_own_layer(options: dict, backend: str, device: str):
    layer = trained(build(**options)).to(device)
    images, contexts = data(layer)
    twins = [alone(layer, context) for context in contexts]
    assert_close(layer.weights(contexts), torch.stack([twin.weight.detach() for twin in twins]))
    for function, expected in (
        (layer, [twin(image[None]) for twin, image in zip(twins, images, strict=True)]),
        (layer.inverse, [twin.inverse(image[None]) for twin, image in zip(twins, images, strict=True)]),
    ):
        for actual, parts in zip(function(images, contexts), zip(*expected, strict=True), strict=True):
            assert_close(actual, torch.cat(parts))
    assert torch.equal(layer.convolve(images, contexts), layer(images, contexts)[0])
    assert torch.equal(layer.solve(images, contexts), layer.inverse(images, contexts)[0])
    if layer.dimensions > 1:
        permuted = LAYOUTS["channels_last"](images)
        for function in (layer, layer.inverse):
            output = function(permuted, contexts)[0]
            assert_close(output, function(images, contexts)[0])
            under_func = torch.func.jvp(lambda x: function(x, contexts)[0], (permuted,), (permuted,))  # noqa: B023
            for each in (output, *under_func):
                assert each.stride() == twins[0](permuted)[0].stride()
            assert_close(torch.vmap(function)(permuted[None], contexts[None])[0][0], output)


@over_cases(Case(("TL", "B"), per_group=3, batch=20), Case(("L",), per_group=16, batch=9))
def test_any_weights_any_images(case: Case, backend: str, device: str):
    """Compares the operator with the oracle, image by image."""
    if not 0 < case.batch <= 20 or case.dtype in oracles.HALF_PRECISION:
        return
    weight, images = case.weight(device), case.input(device)
    scales = torch.linspace(0.5, 1.5, case.batch, dtype=case.dtype, device=device)
    weights = weight * scales.view(-1, *[1] * weight.dim())
    log_diagonals = (scales[:, None] * torch.linspace(-1, 1, case.channels, device=device)).to(case.dtype)
    outputs, solutions = (
        functional.run_each(operation, images, weights, log_diagonals, case.stencils, case.steps)
        for operation in ("conv", "solve")
    )
    for index in range(case.batch):
        own = oracles.effective(weights[index], case.corners)
        oracles.set_diagonal(own, case.corners, log_diagonals[index].cpu().double().exp())
        for actual, source in ((outputs[index], images[index]), (images[index], solutions[index])):
            assert_close(actual, oracles.conv(source[None], own, case.corners, case.dilation)[0], factor=10)


@every_option
def test_layers_are_sound_transforms(options: dict, device: str):
    """Log-determinants of dense Jacobians, gradients, memory layouts, hooks, state_dicts, batches."""
    layer = trained(build(**{**options, "num_channels": 8})).to(device)
    check_transform(layer, *data(layer, batch=2))


@every_direction
@pytest.mark.parametrize("name", ["unit", "learned", "bounded"])
def test_derivatives(name: str, inverse: bool, device: str):
    layer = trained(build(num_channels=4, **OPTIONS[name])).to(device)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    images, contexts = data(layer, batch=2)

    def function(images: Tensor, contexts: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, parameters, strict=True))
        return functional_call(layer, named, (images[..., :2, :2], contexts), {"inverse": inverse})

    leaves = [tensor.detach().requires_grad_() for tensor in (images, contexts, *parameters)]
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@every_direction
def test_each_sample_by_itself(inverse: bool, device: str):
    layer = trained(build(diagonal="learned")).to(device)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, context: Tensor) -> Tensor:
        arguments = image[None], context[None]
        output, log_det = functional_call(layer, parameters, arguments, {"inverse": inverse})
        return (output.square().sum() - log_det).sum()

    images, contexts = data(layer)
    each = vmap(lambda *one: layer(*(part[None] for part in one), inverse=inverse))(images, contexts)
    for mapped, expected in zip(each, layer(images, contexts, inverse=inverse), strict=True):
        assert_close(mapped[:, 0], expected)
    each = vmap(grad(loss, (0, 2)), (None, 0, 0))(parameters, images, contexts)
    for index in range(len(images)):
        of_parameters, of_context = grad(loss, (0, 2))(parameters, images[index], contexts[index])
        assert_close(each[1][index], of_context)
        for name, expected in of_parameters.items():
            assert_close(each[0][name][index], expected)


@every_option
def test_contexts_have_no_effect_at_the_start(options: dict, device: str):
    layer = build(**options).to(device)
    for _ in range(2):
        images, contexts = data(layer)
        twin = alone(layer, contexts[0])
        assert torch.equal(layer.raw_weight, twin.raw_weight)
        assert_close(layer(images, contexts)[0], twin(images)[0])
        assert_close(layer.weights(contexts), layer.weight.detach().expand(3, *layer.weight.shape))
        trained(layer).float()
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert layer.weights(contexts[:0]).shape == (0, *layer.raw_weight.shape)
    for function in (layer.inverse, layer):
        output, log_det = function(images[:0], contexts[:0])
        gradients = torch.autograd.grad(output.sum() + log_det.sum(), list(layer.parameters()))
        assert all(not gradient.any() for gradient in gradients)
    assert (output.shape, log_det.shape) == ((0, *images.shape[1:]), (0,))


def test_no_context_makes_a_layer_singular():
    layer = trained(build(diagonal="learned", corners="TL", max_inverse_gain=4))
    images, contexts = data(layer)
    contexts *= 1e6
    diagonals = torch.stack([oracles.diagonal(weight, layer.corners) for weight in layer.weights(contexts).detach()])
    changes = diagonals.log() - layer.log_diagonal
    assert changes.abs().amax() <= 2
    assert (changes.abs() > 1.99).any()
    for weight, diagonal in zip(layer.weights(contexts).detach(), diagonals, strict=True):
        (matrix,) = oracles.matrices(weight, layer.corners, images.shape[2:])
        assert 1 / torch.linalg.svdvals(matrix).min() <= 4 / diagonal.min() * (1 + 1e-9)
    assert_close(layer.inverse(*(layer(images, contexts)[0], contexts))[0], images, factor=10)


@pytest.mark.parametrize("dtype", oracles.HALF_PRECISION, ids=str)
def test_half_precision_and_autocast(dtype: torch.dtype):
    layer = trained(build(diagonal="learned")).float()
    images, contexts = data(layer)
    expected = layer(images, contexts)
    with torch.autocast("cpu", dtype):  # affects only the network
        output, log_det = layer(images, contexts.to(dtype))
        assert_close(layer.inverse(output, contexts)[0], images, factor=4)
    assert output.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close((output, log_det), expected, atol=0.1, rtol=0.1)
    output, log_det = layer.to(dtype)(images.to(dtype), contexts.to(dtype))
    assert (output.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close((output.float(), log_det), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("name", "inverse"), [("network", False), ("bounded", True)])
def test_graphs_leave_the_batch_open(name: str, inverse: bool):
    torch.compiler.reset()
    layer, direction, batch = trained(build(**OPTIONS[name])), {"inverse": inverse}, torch.export.Dim("batch")
    sizes = {"input": {0: batch}, "context": {0: batch}, "inverse": None}
    program = torch.export.export(layer, data(layer), direction, dynamic_shapes=sizes)
    exported = [each.module() for each in ([program] if inverse else [program, program.run_decompositions()])]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for index, count in enumerate((3, 5, 2, 17)):
        arguments = data(layer, count)
        expected = layer(*arguments, **direction)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if index > 1 else "default"):
            for function in (compiled, *exported):
                for actual, value in zip(function(*arguments, **direction), expected, strict=True):
                    assert_close(actual, value)
    torch.compiler.reset()
    images, contexts = data(layer)
    torch._dynamo.maybe_mark_dynamic(contexts, 0)  # as if only this batch had changed from call to call
    assert_close(compiled(images, contexts, **direction)[0], layer(images, contexts, **direction)[0])


@pytest.mark.filterwarnings("ignore:raw_weight has .* nonzero entries")
def test_weights_of_an_unconditional_layer_load():
    trained_layer = trained(layer.InvertibleConv2d(8, diagonal="learned"))
    loaded, assigned = (build(diagonal="learned").double() for _ in range(2))
    loaded.load_state_dict(trained_layer.state_dict(), strict=False)
    assigned.weight = trained_layer.weight
    images, contexts = data(loaded)
    for module in (loaded, assigned):
        assert_close(module(images, contexts)[0], trained_layer(images)[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, c: (x, None), TypeError, "context must be a tensor, got NoneType"),
        (lambda x, c: (x, c.tolist()), TypeError, "context must be a tensor, got list"),
        (lambda x, c: (x, c.long()), TypeError, "context must have one of the dtypes .*, got torch.int64"),
        (lambda x, c: (x, c.double()), TypeError, "input and context must have the same dtype, got .*32 and .*64"),
        (lambda x, c: (x, c.to("meta")), ValueError, "input and context must be on the same device, got cpu and meta"),
        (lambda x, c: (x, c[:, 1:]), ValueError, r"context must have shape \[3, 3\], one row per image, got \(3, 2\)"),
        (lambda x, c: (x, c[:2]), ValueError, r"context must have shape \[3, 3\], one row per image, got \(2, 3\)"),
        (lambda x, c: (x, c[0]), ValueError, r"context must have shape \[3, 3\], one row per image, got \(3,\)"),
        (lambda x, c: (x[:, 1:], c), ValueError, "input must have the weight's 8 channels, got 7"),
        (lambda x, c: (x[0], c), ValueError, r"input must have the 4 dimensions \[B, C, H, W\], got shape \(8, 3, 4\)"),
    ],
)
def test_errors_come_before_any_work(change, error: type[Exception], match: str):
    calls = []
    module = build()
    module.weight_network.register_forward_hook(lambda *_: calls.append(1))
    for function in (module, module.inverse, module.convolve, module.solve):
        with pytest.raises(error, match=match):
            function(*change(*data(module)))
    assert not calls


class Double(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.double()


def test_errors_of_arguments_and_networks():
    for outputs in (143, 1):
        layer = build(weight_network=nn.Linear(FEATURES, outputs))
        with pytest.raises(
            ValueError, match=rf"output of weight_network must have shape \[3, 144\], .* \(3, {outputs}\)"
        ):
            layer(*data(layer))
    layer = build(weight_network=nn.Sequential(nn.Linear(FEATURES, 144), Double()))
    with pytest.raises(
        TypeError, match=r"output of weight_network must have the same dtype, got .*float32 and .*float64"
    ):
        layer(*data(layer))
    with pytest.raises(TypeError, match=r"weight_network must be a torch.nn.Module or None, got function"):
        build(weight_network=lambda context: context)
    with pytest.raises(ValueError, match="context_features must be at least 1, got 0"):
        build(context_features=0)
    with pytest.raises(TypeError, match=r"context must be a tensor, got list"):
        build().weights([1.0])
    with pytest.raises(
        TypeError, match=r"layer must be an InvertibleConv1d, .* or 3d, got ConditionalInvertibleConv2d"
    ):
        conditioning(build(), (4, 4))


def test_a_network_that_cannot_train_is_told():
    layer = build(weight_network=nn.Linear(FEATURES, 144))
    x, context = torch.randn(2, 8, 3, 3), torch.randn(2, FEATURES)
    layer(x, context)
    for parameter in layer.weight_network.network.parameters():
        nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match="weight_network returns zeros: its last layer must not start at zero"):
        layer(x, context)


def test_a_context_of_nan_is_told():
    layer = trained(build(diagonal="learned"))
    images, contexts = data(layer)
    contexts[1] = torch.nan
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=r"finite and nonzero .* got nan in channel 0 of image 1$"):
            function(images, contexts)


class Zeros(nn.Module):
    """The network of normflows' conditional base: mean and log-scale of a standard normal."""

    def forward(self, context: Tensor) -> Tensor:
        return context.new_zeros(len(context), 4, 4, 4)


# Builders of the layer for a shape, by library.
BY_CHANNELS = ("distributions", "nflows", "normflows", "pyro", "zuko")
LIBRARIES = {
    **{
        getattr(nflows_kconv, name): lambda cls, shape: cls(shape[0], context_features=FEATURES, diagonal="learned")
        for name in BY_CHANNELS
    },
    nflows_kconv.freia: lambda cls, shape: cls([shape], dims_c=[(FEATURES,)], diagonal="learned"),
    nflows_kconv.torchflows: lambda cls, shape: cls(shape, context_shape=(FEATURES,), diagonal="learned"),
}


@pytest.mark.filterwarnings("ignore:raw_weight has .* nonzero entries")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)
def test_every_library_with_contexts_has_the_layer(library):
    for dimensions in (3, 2, 1):
        core = trained(build(dimensions, diagonal="learned"))
        images, contexts = data(core)
        adapter = getattr(library, f"ConditionalInvertibleConv{dimensions}d")
        module = LIBRARIES[library](adapter, tuple(images.shape[1:])).double()
        module.load_state_dict(core.state_dict())
        bijection = as_bijection(module)
        directions = [core.inverse, core] if library is nflows_kconv.normflows else [core, core.inverse]
        for function, expected in zip((bijection.forward, bijection.inverse), directions, strict=True):
            assert all(map(torch.equal, function(images, contexts), expected(images, contexts)))
    check_transform(module, images, contexts)


def test_what_is_no_context_is_refused():
    for dims_c in (None, [(3,), (3,)], [(3, 4)]):
        with pytest.raises(ValueError, match=re.escape(f"dims_c must be one shape, [(E,)], got {dims_c}")):
            nflows_kconv.freia.ConditionalInvertibleConv2d([(4, 4, 4)], dims_c)
    for shape in (None, (3, 4)):
        with pytest.raises(ValueError, match=re.escape(f"context_shape must be (E,), got {shape}")):
            nflows_kconv.torchflows.ConditionalInvertibleConv2d((4, 4, 4), shape)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_contexts_of_any_batch_shape():
    """torchflows draws several samples for each context."""
    layer = nflows_kconv.torchflows.ConditionalInvertibleConv2d((4, 4, 2), (FEATURES,))
    images, contexts = torch.randn(5, 2, 4, 4, 2), torch.randn(5, 2, FEATURES)
    output, log_det = layer(images, contexts)
    expected, _ = layer(images.flatten(0, 1), contexts.flatten(0, 1))
    assert torch.equal(output.flatten(0, 1), expected)
    assert log_det.shape == (5, 2)
    assert torch.equal(layer(images[0, 0], contexts[0, 0])[0], output[0, 0])


@pytest.mark.parametrize("diagonal", ["unit", "learned"])
@pytest.mark.parametrize(
    ("of_images", "of_contexts"),
    [
        ((), ()),
        ((4,), ()),
        ((), (5,)),
        ((2, 3), (2, 3)),
        ((4, 2, 3), (2, 3)),
        ((4, 1, 3), (2, 1)),
        ((0, 3), (3,)),
        ((4, 0), (0,)),
    ],
    ids=str,
)
def test_batches_of_images_and_contexts_broadcast(of_images: tuple, of_contexts: tuple, diagonal: str):
    layer = trained(nflows_kconv.distributions.ConditionalInvertibleConv2d(4, context_features=3, diagonal=diagonal))
    images = torch.randn(*of_images, 4, 3, 2, dtype=torch.float64)
    contexts = torch.randn(*of_contexts, 3, dtype=torch.float64)
    noise, batch = Normal(torch.zeros_like(images), 1.0), torch.broadcast_shapes(of_images, of_contexts)
    each = images.expand(1, *batch, 4, 3, 2).flatten(0, -4), contexts.expand(1, *batch, 3).flatten(0, -2)
    (output, log_det), (solution, _) = layer(*each), layer.inverse(*each)
    transform = layer.condition(contexts)
    assert_close(transform(images), output.view(*batch, 4, 3, 2))
    assert_close(transform.inv(images), solution.view(*batch, 4, 3, 2))
    assert_close(transform.log_abs_det_jacobian(images, None), log_det.view(batch))
    # torch has no density for empty batches.
    for inverse in (transform.inv, transform.inv.with_cache()) if len(output) else ():
        density = TransformedDistribution(noise, [inverse])
        assert density.batch_shape == density.sample().shape[:-3] == batch
        expected = Normal(0, 1).log_prob(output).sum((1, 2, 3)) + log_det
        assert_close(density.log_prob(images), expected.view(batch))


@pytest.mark.parametrize("name", ["distributions", "pyro", "zuko"])
def test_errors_of_contexts_and_of_images_for_them(name: str):
    layer = getattr(nflows_kconv, name).ConditionalInvertibleConv2d(4, context_features=3)
    make = layer if name == "zuko" else layer.condition
    with pytest.raises(TypeError, match="context must be a tensor, got NoneType"):
        make(None)
    with pytest.raises(ValueError, match=r"context must have shape \[B, 3\], one row per image, got \(10, 4\)"):
        make(torch.zeros(5, 2, 4))
    transform = make(torch.zeros(5, 3))
    for function in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
        with pytest.raises(
            ValueError, match=r"the batches of images and contexts must broadcast, got \(2,\) and \(5,\)"
        ):
            function(torch.zeros(2, 4, 3, 3))
        with pytest.raises(ValueError, match="input must have the weight's 4 channels, got 3"):
            function(torch.zeros(5, 3, 3, 3))
        with pytest.raises(ValueError, match=r"input must have the dimensions \[..., C, H, W\], got shape \(4, 3\)"):
            function(torch.zeros(4, 3))


@pytest.mark.filterwarnings("ignore:raw_weight has .* nonzero entries")
def test_adapters_take_the_context_of_their_library():
    options = dict(context_features=FEATURES, corners=("TL", "B"), diagonal="learned")
    transform = trained(nflows_kconv.nflows.ConditionalInvertibleConv2d(4, **options)).float()
    other = nflows_kconv.normflows.ConditionalInvertibleConv2d(4, **options)
    other.load_state_dict(transform.state_dict())
    composite = nflows.transforms.CompositeTransform([transform])
    flow = nflows.flows.Flow(composite, nflows.distributions.StandardNormal((4, 4, 2)))
    model = nf.ConditionalNormalizingFlow(nf.distributions.base.ConditionalDiagGaussian((4, 4, 2), Zeros()), [other])
    images, contexts = torch.randn(3, 4, 4, 2), torch.randn(3, FEATURES)
    assert_close(model.log_prob(images, contexts), flow.log_prob(images, contexts))
    drawn, log_prob = flow.sample_and_log_prob(1, contexts)
    assert_close(flow.log_prob(drawn[:, 0], contexts), log_prob[:, 0])
    drawn, log_prob = model.sample(3, contexts)
    assert_close(model.log_prob(drawn, contexts), log_prob)
    noise = Independent(Normal(torch.zeros(4, 4, 2), 1.0), 3)
    of_pyro, of_zuko = (
        getattr(nflows_kconv, name).ConditionalInvertibleConv2d(4, **options) for name in ("pyro", "zuko")
    )
    for each in (of_pyro, of_zuko):
        each.load_state_dict(transform.state_dict())
    assert all(map(torch.equal, of_zuko.inverse(images, contexts), of_pyro.inverse(images, contexts)))
    stack = pyro.distributions.conditional.ConditionalComposeTransformModule([of_pyro.inv], cache_size=1)
    conditional_density = pyro.distributions.ConditionalTransformedDistribution(noise, [stack])
    lazy = zuko.flows.Flow([of_zuko], zuko.lazy.UnconditionalDistribution(lambda: noise))
    for density in (conditional_density.condition(contexts), lazy(contexts)):
        assert_close(density.log_prob(images), flow.log_prob(images, contexts))
        assert density.sample((5,)).shape == (5, 3, 4, 4, 2)


def test_it_is_shown():
    assert repr(build()).splitlines()[1].endswith("bias=False, context_features=3")
    assert math.prod(build().weight.shape) == build().weight_network.out_features
