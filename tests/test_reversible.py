"""Reversible training: ordinary gradients, in memory independent of the number of steps."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable
from functools import partial

import normflows as nf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import nflows_kconv.nflows
import nflows_kconv.normflows
from benchmarks import memory
from nflows_kconv import InvertibleConv2d, bijection
from nflows_kconv.flows import reversible, steps
from nflows_kconv.nflows import ReversibleCompositeTransform
from nflows_kconv.normflows import ReversibleComposite

# nflows' 1x1 convolution uses it to invert.
pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")

SHAPE = (4, 4, 2)  # of an image
KEPT_INPUTS, STEPS = 4, 10  # so most steps are undone


def smooth_network(inputs: int, outputs: int) -> nn.Sequential:
    """Builds a network with a continuous derivative, so rounding changes gradients only by rounding."""
    return nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, outputs, 1))


class ContextNetwork(nn.Module):
    """A network for a coupling of nflows that takes a context."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.image, self.context = smooth_network(inputs, outputs), nn.Linear(3, outputs)

    def forward(self, inputs, context=None):
        outputs = self.image(inputs)
        return outputs if context is None else outputs + self.context(context)[:, :, None, None]


def neutral_step() -> nn.Module:
    coupling = steps.AffineCoupling(smooth_network(2, 4))
    return steps.Sequence([InvertibleConv2d(4), steps.ActNorm(4), steps.InvertibleConv1x1(4), coupling])


def inverse_step() -> nn.Module:
    layers = [steps.Inverse(InvertibleConv2d(4, diagonal="learned", bias=True, corners="TL")), steps.learned_prior(4)]
    return steps.Sequence([*layers, steps.InvertibleConv1x1(4)])


def nflows_step() -> nn.Module:
    return transforms.CompositeTransform(
        [
            nflows_kconv.nflows.InvertibleConv2d(4),
            transforms.ActNorm(4),
            transforms.OneByOneConvolution(4),
            transforms.AffineCouplingTransform([1, 0, 1, 0], ContextNetwork),
        ]
    )


def nflows_splines() -> nn.Module:
    def network(inputs: int, outputs: int) -> nn.Module:
        module = ContextNetwork(inputs, outputs)
        module.hidden_features = 4  # the coupling divides in place by its square root
        return module

    return transforms.PiecewiseRationalQuadraticCouplingTransform([1, 0, 0, 1], network, num_bins=3, tails="linear")


def normflows_step() -> nn.Module:
    block = nflows_kconv.normflows.GlowBlock(4, 6, init_zeros=False, leaky=0.0, corners=("TL", "TR", "BL", "BR"))
    block.flows[0].flows[1].param_map = smooth_network(2, 4)
    return block


def normflows_masked() -> nn.Module:
    mask = torch.tensor([1.0, 0, 1, 0])[:, None, None].repeat(1, *SHAPE[1:])
    return nf.flows.MaskedAffineFlow(mask, smooth_network(4, 4), smooth_network(4, 4))


class OrdinaryComposite(nf.flows.Composite):
    """A composite that sums log-determinants in their own dtype; normflows' own sums in float32, on the CPU."""

    @staticmethod
    def _cascade(inputs, funcs):
        total = inputs.new_zeros(len(inputs))
        for function in funcs:
            inputs, log_det = function(inputs)
            total = total + log_det
        return inputs, total


# By name: a step, and the ordinary and the reversible container.
LIBRARIES = {
    "neutral": (neutral_step, steps.Sequence, reversible.Chain),
    "neutral, inverse": (inverse_step, steps.Sequence, reversible.Chain),
    "nflows": (nflows_step, transforms.CompositeTransform, ReversibleCompositeTransform),
    "nflows, splines": (nflows_splines, transforms.CompositeTransform, ReversibleCompositeTransform),
    "normflows": (normflows_step, OrdinaryComposite, ReversibleComposite),
    "normflows, masked": (normflows_masked, OrdinaryComposite, ReversibleComposite),
}
every_library = pytest.mark.parametrize("library", LIBRARIES)
both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(reversible, "_KEPT_INPUTS", KEPT_INPUTS)  # half of them, so half the steps show the same


def images(batch: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *SHAPE, dtype=dtype)


def twins(library: str, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Builds two stacks with equal, changed parameters, ordinary and reversible, initialised by data."""
    build, ordinary_class, reversible_class = LIBRARIES[library]
    modules = [build() for _ in range(steps)]
    ordinary = ordinary_class(modules).to(dtype)
    with torch.no_grad():
        for parameter in ordinary.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        initialize = ordinary.inverse if library.startswith("normflows") else ordinary
        initialize(images(50, dtype))
    other = reversible_class(copy.deepcopy(modules))
    return ordinary, other


def gradients(
    module: nn.Module, inputs: Tensor, *contexts: Tensor, direction: str = "forward", autocast: bool = False
) -> dict[str, Tensor]:
    """Returns gradients of a loss with uneven weights for outputs and log-determinants, and the results."""
    sources = {"input": inputs.clone().requires_grad_(), **dict(module.named_parameters())}
    function = module if direction == "forward" else module.inverse
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        outputs, log_abs_det = function(sources["input"], *contexts)
    weights = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device).view_as(outputs)
    loss = (weights * outputs.square()).sum() - (weights.flatten()[: len(inputs)] * log_abs_det).sum()
    sources |= {f"context {index}": context for index, context in enumerate(contexts) if context.requires_grad}
    found = zip(sources, torch.autograd.grad(loss, list(sources.values()), allow_unused=True), strict=True)
    results = {"output": outputs, "log_abs_det": log_abs_det}
    return results | {name: gradient for name, gradient in found if gradient is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the relative error of all gradients together."""
    names = [name for name in expected if name not in ("output", "log_abs_det")]
    difference, size = (
        sum(tensor.double().square().sum() for tensor in tensors)
        for tensors in ([found[name] - expected[name] for name in names], [expected[name] for name in names])
    )
    return (difference / size).sqrt().item()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10 * scale + 1e-12, msg=name)


def peak_bytes(module: nn.Module, inputs: Tensor, direction: str = "forward") -> int:
    """Returns the peak memory of a training step, without the gradients of the parameters."""

    def train() -> None:
        outputs, log_abs_det = getattr(module, direction)(inputs)
        (outputs.sum() + log_abs_det.sum()).backward()

    train()  # lets libraries allocate what they allocate once
    module.zero_grad()
    return memory.peak_growth(train, inputs.device.type) - sum(parameter.nbytes for parameter in module.parameters())


@every_library
@both_directions
def test_gradients_are_the_ordinary_ones(library, direction):
    ordinary, other = twins(library)
    inputs = images()
    assert_equal(gradients(other, inputs, direction=direction), gradients(ordinary, inputs, direction=direction))


@settings(max_examples=10)
@given(steps=st.integers(1, 15), batch=st.integers(0, 3))
def test_gradients_are_the_ordinary_ones_for_any_number_of_steps_and_images(steps, batch):
    ordinary, other = twins("neutral", steps)
    inputs = images(batch)
    found, expected = gradients(other, inputs), gradients(ordinary, inputs)
    if batch:
        assert_equal(found, expected)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize("library", ["neutral", "nflows", "normflows"])
def test_gradients_in_float32_are_the_ordinary_ones_to_rounding(library):
    ordinary, other = twins(library, 32, torch.float32)
    inputs = images(dtype=torch.float32)
    assert error(gradients(other, inputs), gradients(ordinary, inputs)) < 1e-5


def test_gradients_stay_right_where_inverses_explode(monkeypatch):
    def squeezing_step() -> nn.Module:
        norm = steps.ActNorm(4)
        with torch.no_grad():
            norm.log_scale.copy_(torch.tensor([0.1, 0.1, 1.5, 1.5]).log())
        return steps.Sequence([norm, steps.AffineCoupling(smooth_network(2, 4)), steps.InvertibleConv1x1(4)]).eval()

    modules = [squeezing_step() for _ in range(28)]
    inputs = images(dtype=torch.float32)
    expected = gradients(steps.Sequence(modules), inputs)
    assert error(gradients(reversible.Chain(modules), inputs), expected) < 1e-5
    monkeypatch.setattr(reversible, "_is_close", lambda *arguments: True)
    assert error(gradients(reversible.Chain(modules), inputs), expected) > 1e-4  # otherwise this tests nothing


@pytest.mark.parametrize(
    ("library", "direction"), [("neutral", "forward"), ("nflows", "forward"), ("normflows", "inverse")]
)
def test_the_memory_is_independent_of_the_number_of_steps(library, direction):
    inputs = images(dtype=torch.float32)
    ordinary, peaks = {}, {}
    for count in (8, 16):
        ordinary[count], peaks[count] = (
            peak_bytes(module, inputs, direction) for module in twins(library, count, torch.float32)
        )
    assert ordinary[16] > 1.7 * ordinary[8]
    assert peaks[16] < 1.1 * peaks[8] < 0.55 * ordinary[8]


@pytest.mark.parametrize("library", ["nflows", "normflows"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("context_shape", [(2, 3, 3), (2,)], ids=["image", "vector, for kernels too"])
def test_image_flows_train_reversibly(library, direction, context_shape):
    finc_flow = {"nflows": nflows_kconv.nflows, "normflows": nflows_kconv.normflows}[library].finc_flow
    inputs = torch.randint(256, (4, 1, 8, 8)).double()
    context = torch.tensor([1, 0, 0, 2]), torch.randn(4, *context_shape, dtype=torch.float64, requires_grad=True)
    found, keys = [], []
    for is_reversible in (False, True):
        torch.manual_seed(1)
        options = dict(hidden_channels=4, direction=direction, num_classes=3, context_shape=context_shape)
        options["conditional_kernels"] = len(context_shape) == 1
        flow = finc_flow((1, 8, 8), 2, 9, reversible=is_reversible, **options).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        flow.log_prob(inputs, context).mean().backward()
        found.append({name: parameter.grad for name, parameter in flow.named_parameters()} | {"": context[1].grad})
        context[1].grad = None
        keys.append(list(flow.state_dict()))
        assert any(isinstance(module, reversible.Chain) for module in flow.modules()) == is_reversible
    assert keys[0] == keys[1]
    assert_equal(*reversed(found))


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "neutral, inverse"])
def test_each_network_is_evaluated_twice_in_a_training_step(library):
    _, module = twins(library)
    calls = []
    for part in module.modules():
        if isinstance(part, nn.SiLU):
            part.register_forward_hook(lambda part, *_: calls.append(part))
    gradients(module, images())
    assert all(calls.count(part) == 2 for part in set(calls)) and len(set(calls)) >= STEPS


def test_the_first_batch_initialises_once():
    modules = [neutral_step() for _ in range(STEPS)]
    ordinary, other = steps.Sequence(copy.deepcopy(modules)), reversible.Chain(modules)
    inputs = 3 + 2 * images(20, torch.float32)
    found, expected = gradients(other, inputs), gradients(ordinary, inputs)
    assert error(found, expected) < 1e-5
    for name, value in ordinary.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


def test_tracers_and_torch_func_run_the_steps_the_ordinary_way():
    """They have no memory to save, or need every operator."""
    inputs, found = images(), []
    ordinary, reversible = twins("neutral", 3)
    for module in (ordinary, reversible):
        found.append(torch.vmap(torch.func.grad(lambda x: module(x[None])[0].square().sum()))(inputs))  # noqa: B023
    torch.testing.assert_close(*found)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert reversible.eval()(torch.empty_like(inputs))[0].shape == inputs.shape
    assert reversible.to("meta")(inputs.to("meta"))[0].shape == inputs.shape


def test_contexts_get_gradients():
    ordinary, other = twins("nflows")
    inputs, context = images(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    found, expected = (gradients(module, inputs, context) for module in (other, ordinary))
    assert "context 0" in found
    assert_equal(found, expected)
    context = context.detach()
    assert_equal(gradients(other, inputs, context), gradients(ordinary, inputs, context))


class AddedContext(nn.Module):
    """A network with a second, named argument."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.linear = smooth_network(2, 4), nn.Linear(3, 4)

    def forward(self, kept, context):
        return self.image(kept) + self.linear(context)[:, :, None, None]


class Shifted(nn.Module):
    """A library-independent coupling with other method names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = AddedContext()

    def forward(self, x, context):
        log_scale, shift = self._computed(x, context)
        y = torch.cat([x[:, :2], x[:, 2:] * log_scale.exp() + shift], 1)
        return y.flip(1), log_scale.sum((1, 2, 3))

    def reverse(self, y, context):
        y = y.flip(1)
        log_scale, shift = self._computed(y, context)
        return torch.cat([y[:, :2], (y[:, 2:] - shift) * (-log_scale).exp()], 1)

    def _computed(self, x, context):
        classes, values = context
        # The network's context has an autograd history when gradients are recorded, but not when the step is undone.
        log_scale, shift = self.net(x[:, :2], context=values.mean(1) * (1 + classes[:, None])).chunk(2, 1)
        return 0.1 * log_scale.tanh(), shift


def test_contexts_of_several_tensors_and_handwritten_steps():
    bijection.register(Shifted, inverse="reverse", networks=("net",))
    modules = nn.ModuleList(Shifted() for _ in range(STEPS)).double()
    calls = []
    for module in modules:
        module.net.image.register_forward_hook(lambda module, *_: calls.append(module))
    classes, values = torch.tensor([2, 0, 1, 1, 0]), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    inputs = images().requires_grad_()
    for run in (reversible.cascade, ordinary_cascade):
        outputs, log_abs_det = run(inputs, modules, (classes, values))
        loss = outputs.pow(3).sum() - log_abs_det.pow(2).sum()
        found.append(torch.autograd.grad(loss, [inputs, values, *modules.parameters()]))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    assert all(calls.count(module.net.image) == 2 + 1 for module in modules)  # plus one ordinary evaluation


def ordinary_cascade(inputs, modules, context):
    total = 0
    for module in modules:
        inputs, log_abs_det = module(inputs, context)
        total = total + log_abs_det
    return inputs, total


def test_gradients_accumulate_in_parameters_as_ever():
    ordinary, other = twins("neutral")
    heard = []
    for module in (ordinary, other):
        for frozen in module.steps[::2]:
            frozen.requires_grad_(False)
        module.steps[1].steps[1].shift.register_post_accumulate_grad_hook(heard.append)
        for scale in (1, 2):
            outputs, log_abs_det = module(scale * torch.ones(2, *SHAPE, dtype=torch.float64))
            (outputs.pow(3).sum() + log_abs_det.sum()).backward()
    assert len(heard) == 4
    for found, expected in zip(other.parameters(), ordinary.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == (not expected.requires_grad)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


def test_a_step_that_occurs_twice_gets_both_gradients():
    modules = [neutral_step().double() for _ in range(6)] * 4
    inputs = images()
    steps.Sequence(modules)(inputs)  # ActNorm looks at its first batch
    assert_equal(gradients(reversible.Chain(modules), inputs), gradients(steps.Sequence(modules), inputs))


def test_one_of_the_results_is_enough():
    ordinary, other = twins("neutral")
    inputs = images()
    for index in (0, 1):
        found, expected = (
            torch.autograd.grad(module(inputs)[index].sum(), list(module.parameters()), allow_unused=True)
            for module in (other, ordinary)
        )
        for actual, value in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, torch.zeros_like(actual) if value is None else value)


def test_autocast_holds_in_the_backward_pass_too():
    ordinary, other = twins("neutral", dtype=torch.float32)
    dtypes = []
    for part in other.modules():
        if isinstance(part, nn.SiLU):
            part.register_forward_hook(lambda *arguments: dtypes.append(arguments[-1].dtype))
    inputs = images(dtype=torch.float32)
    expected = gradients(ordinary, inputs)
    half, found = (gradients(module, inputs, autocast=True) for module in (ordinary, other))
    assert set(dtypes) == {torch.bfloat16}
    assert error(found, half) < 0.3 * error(half, expected)


def test_the_cache_of_autocast_keeps_its_gradients():
    ordinary, other = twins("neutral", dtype=torch.float32)
    inputs = images(dtype=torch.float32)
    found = []
    for module in (ordinary, other):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(inputs)[0].square().sum()
            loss = loss + module.steps[0].steps[-1].network(inputs[:, :2]).float().square().sum()
            loss.backward()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert error(found[1], found[0]) < 0.03


FLOWS = {
    "nflows": lambda module: Flow(module, StandardNormal(SHAPE)),
    "normflows": lambda module: nf.NormalizingFlow(nf.distributions.DiagGaussian(SHAPE, trainable=False), [module]),
}


@pytest.mark.parametrize("library", FLOWS)
def test_works_in_the_flows_of_both_libraries(library):
    ordinary, other = twins(library)
    inputs = images()
    for module in (ordinary, other):
        FLOWS[library](module).double().log_prob(inputs).mean().backward()
    for found, expected in zip(other.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_distributed_training_hears_of_the_gradients(sharded, process_group):
    ordinary, other = twins("neutral", dtype=torch.float32)
    inputs = images(dtype=torch.float32)
    ordinary(inputs)[0].square().sum().backward()
    wrap = partial(fully_shard, mesh=init_device_mesh("cpu", (1,))) if sharded else nn.parallel.DistributedDataParallel
    wrap(other)(inputs)[0].square().sum().backward()
    for found, expected in zip(other.parameters(), ordinary.parameters(), strict=True):
        gradient = found.grad.full_tensor() if sharded else found.grad
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-3, atol=1e-3)


def test_sharding_of_each_step_is_refused(process_group):
    module = twins("neutral", 2, torch.float32)[1]
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(module.steps[1], mesh=mesh)
    fully_shard(module, mesh=mesh)
    with pytest.raises(TypeError, match=r"must be unsharded .* DTensor for steps\.0\.raw_weight of FSDPSequence"):
        module(images(dtype=torch.float32))


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about graph breaks
def test_torch_compile_breaks_its_graph(monkeypatch):
    # Otherwise many steps, which compile slowly, are needed to undo any.
    monkeypatch.setattr(reversible, "_KEPT_INPUTS", 1)
    module = reversible.Chain([steps.AffineCoupling(smooth_network(2, 4)) for _ in range(3)]).double()
    inputs = images()
    results = []
    for function in (module, torch.compile(module, backend="aot_eager")):
        outputs, log_abs_det = function(inputs)
        loss = outputs.square().sum() + log_abs_det.sum()
        results.append((outputs, log_abs_det, *torch.autograd.grad(loss, list(module.parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_networks_may_be_compiled():
    ordinary, other = twins("neutral", 10)
    for module in other.steps:
        module.steps[-1].network.compile(backend="aot_eager")
    inputs = images()
    assert_equal(gradients(other, inputs), gradients(ordinary, inputs))


@pytest.mark.parametrize("library", ["neutral", "nflows", "normflows"])
def test_hooks_of_the_containers_fire_once_in_either_direction(library):
    module, calls = twins(library, 2)[1], []
    module.register_forward_hook(lambda *_: calls.append("hook"))
    outputs, _ = module(images())
    assert calls == ["hook"]
    torch.testing.assert_close(module(module.inverse(outputs)[0])[0], outputs)
    assert calls == ["hook"] * 3


def test_states_are_those_of_the_ordinary_containers():
    for library in LIBRARIES:
        ordinary, other = twins(library, 3)
        names = list(other.state_dict())
        assert names == list(ordinary.state_dict())
        gradients(other, images())
        assert list(other.state_dict()) == names


def test_without_gradients_it_is_the_ordinary_container():
    ordinary, other = twins("neutral", dtype=torch.float32)
    inputs = images(dtype=torch.float32)
    with torch.no_grad():
        for found, expected in zip(other(inputs), ordinary(inputs), strict=True):
            assert torch.equal(found, expected)
        other.bfloat16()
        assert other(inputs.bfloat16())[0].dtype == torch.bfloat16


class AddNoise(nn.Module):
    """A step that can only be undone with the same noise."""

    def forward(self, input):
        return input + torch.randn_like(input), input.new_zeros(len(input))

    inverse = forward


@pytest.mark.parametrize("draws", [nn.Dropout(0.5), AddNoise()], ids=["dropout", "noise"])
def test_random_numbers_are_refused(draws):
    if isinstance(draws, nn.Dropout):
        draws = steps.AffineCoupling(nn.Sequential(draws, smooth_network(2, 4)))
    module = reversible.Chain([neutral_step(), draws])
    with pytest.raises(RuntimeError, match="random numbers, as dropout does"):
        module(images(dtype=torch.float32))
    if not isinstance(draws, AddNoise):
        module.eval()(images(dtype=torch.float32))


def normalised(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    network = smooth_network(2, 4)
    network[0] = normalise(network[0])
    return reversible.Chain([neutral_step(), steps.AffineCoupling(network)])


STATEFUL = {
    "BatchNorm": lambda convolution: nn.Sequential(nn.BatchNorm2d(2), convolution),
    "InstanceNorm": lambda convolution: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), convolution),
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, a parametrization": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("normalise", STATEFUL.values(), ids=STATEFUL.keys())
def test_networks_that_change_whenever_they_are_called_are_refused(normalise):
    module = normalised(normalise).double()
    with pytest.raises(RuntimeError, match=r"must not change buffers .* got changes of AffineCoupling 1, network\.0\."):
        module(images())
    module.eval()
    inputs = images()
    assert_equal(gradients(module, inputs), gradients(steps.Sequence(module.steps), inputs))
    with torch.no_grad():
        module.train()(inputs)


@pytest.mark.parametrize(
    "refused",
    [*STATEFUL.values(), lambda convolution: nn.Sequential(nn.Dropout(), convolution)],
    ids=[*STATEFUL, "dropout"],
)
@pytest.mark.parametrize("library", ["finc_flow of nflows", "finc_flow of normflows", "nflows", "normflows"])
def test_a_refusal_leaves_everything_as_it_was(library, refused):
    """Covers flows of `finc_flow` and the libraries' own ActNorm, which replaces tensors that ours changes in place."""
    if library in LIBRARIES:
        build, _, container = LIBRARIES[library]
        module, inputs = container([build(), steps.AffineCoupling(smooth_network(2, 4))]), images(dtype=torch.float32)
    else:
        adapter = nflows_kconv.nflows if library.endswith(" nflows") else nflows_kconv.normflows
        module, inputs = (
            adapter.finc_flow((1, 4, 4), 1, 2, hidden_channels=4, reversible=True),
            torch.randint(256, (5, 1, 4, 4)),
        )
    call = module if library in LIBRARIES else module.log_prob
    network = [part.network for part in module.modules() if isinstance(part, steps.AffineCoupling)][-1]
    network[0] = refused(network[0])
    for _ in range(2):
        before, tensors = copy.deepcopy(module.state_dict()), [*module.parameters(), *module.buffers()]
        with pytest.raises(RuntimeError, match="steps must not"):
            call(inputs)
        assert all(map(operator.is_, tensors, [*module.parameters(), *module.buffers()]))
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
        module.eval()
        call(inputs)  # passing in evaluation mode says nothing about training
        module.train()


@pytest.mark.parametrize(
    "normalise",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        lambda convolution: prune.random_unstructured(convolution, "weight", 0.5),
    ],
    ids=["weight_norm", "weight_norm, a parametrization", "pruning"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_networks_whose_weights_are_computed_get_the_ordinary_gradients(normalise):
    modules = [steps.AffineCoupling(normalised(normalise).steps[1].network) for _ in range(STEPS)]
    inputs = images()
    ordinary = steps.Sequence(modules).double()
    assert_equal(gradients(reversible.Chain(modules), inputs), gradients(ordinary, inputs))


def test_a_flow_whose_steps_normalise_by_the_batch_is_refused():
    with pytest.raises(RuntimeError, match=r"got changes of BatchNorm 0, running_mean; BatchNorm 0, running_var"):
        ReversibleCompositeTransform([transforms.BatchNorm(3)])(torch.randn(4, 3))


def test_half_precision_is_refused():
    module = reversible.Chain([neutral_step()])
    with pytest.raises(TypeError, match=r"input must be float32 or float64.* got torch.bfloat16"):
        module.bfloat16()(images(dtype=torch.bfloat16))


def test_steps_in_half_precision_are_refused():
    module = ReversibleCompositeTransform([transforms.OneByOneConvolution(4)])
    module(images(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"keep the input's dtype, .* got torch.bfloat16 from OneByOneConvolution"):
            module(images(dtype=torch.float32))


def test_second_derivatives_are_refused():
    _, module = twins("neutral", 3)
    inputs = images().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(module(inputs)[0].square().sum(), inputs, create_graph=True)


def test_changes_in_place_before_the_backward_pass_are_noticed():
    for change in (
        lambda module, inputs, outputs: outputs.detach().add_(1),
        lambda module, inputs, outputs: inputs.add_(1),
        lambda module, inputs, outputs: module.steps[1].steps[2].lower.detach().add_(1),
    ):
        _, module = twins("neutral", 3)
        inputs = images()
        outputs, _ = module(inputs)
        change(module, inputs, outputs)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.square().sum().backward()


def test_a_failing_step_leaves_the_networks_in_place():
    _, module = twins("neutral")
    names = list(module.state_dict())
    outputs, _ = module(images())
    module.steps[-1].steps[-1].network.forward = lambda input: 1 / 0
    with pytest.raises(ZeroDivisionError):
        outputs.sum().backward()
    assert list(module.state_dict()) == names
    assert isinstance(module.steps[-1].steps[-1].network, nn.Sequential)


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = images(500, torch.float32).cuda()
    peaks = {}
    for count in (32, 64):
        ordinary, other = (module.cuda() for module in twins("neutral", count, torch.float32))
        assert error(gradients(other, inputs), gradients(ordinary, inputs)) < 1e-4
        peaks[count] = peak_bytes(other, inputs)
    # Memory is allocated in blocks of 512 bytes.
    assert peaks[64] < 1.05 * peaks[32] + 512 * len(list(other.parameters()))
