"""Tools for modules work inside flows of both libraries, in both directions."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim import swa_utils

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d
from nflows_kconv.flows import steps

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}
in_both = pytest.mark.parametrize("library", LIBRARIES)
FORMS = {
    "plain": {},
    "inverse": dict(direction="inverse"),
    "reversible": dict(reversible=True),
    "classes": dict(num_classes=3),
}

# Modules that the host library calls by methods, or nobody calls.
_NEVER = {nn.ModuleList, nflows_kconv.nflows._TransformContext}
AROUND = {
    ("nflows", "log_prob"): _NEVER | {nflows.distributions.Distribution},  # but the flow, which is one
    ("nflows", "sample"): _NEVER
    | {
        nflows.distributions.Distribution,
        nflows.transforms.CompositeTransform,
        nflows.transforms.MultiscaleCompositeTransform,
    },
    ("normflows", "log_prob"): _NEVER | {normflows.distributions.BaseDistribution, normflows.flows.Merge},
    ("normflows", "sample"): _NEVER | {normflows.MultiscaleFlow},
}


def build(library: str, **options) -> nn.Module:
    """Returns a flow with layers away from the identity, in float64 and evaluation mode."""
    torch.manual_seed(0)
    flow = LIBRARIES[library]((1, 8, 8), 2, 1, hidden_channels=4, **options).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return flow


def images() -> Tensor:
    return torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1))


def results(flow: nn.Module, library: str) -> list[Tensor]:
    """Returns results of both directions and a gradient."""
    torch.manual_seed(2)
    density = flow.log_prob(images())
    gradients = torch.autograd.grad(density.mean(), [each for each in flow.parameters() if each.requires_grad])
    torch.manual_seed(3)
    samples = flow.sample(2)
    samples = samples if library == "nflows" else samples[0]
    return [density, samples, sum(gradient.square().sum() for gradient in gradients)]


def parts(flow: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in flow.modules() if isinstance(module, kind)]


@in_both
@pytest.mark.parametrize("form", FORMS)
def test_hooks_fire_once_in_either_direction(library: str, form: str):
    flow = build(library, **FORMS[form])
    count: collections.Counter = collections.Counter()
    for name, module in flow.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: count.update([name]))
        module.register_forward_hook(lambda *_, name=name: count.update([name]))
    classes = torch.tensor([0, 2, 1]) if form == "classes" else None
    calls = {
        "log_prob": lambda: flow.log_prob(images(), classes),
        "sample": lambda: flow.sample(3 if library == "normflows" else 1, classes),
    }
    for direction, call in calls.items():
        count.clear()
        with torch.no_grad():
            call()
        around = tuple(AROUND[library, direction])
        for name, module in flow.named_modules():
            called = not isinstance(module, around) or (module is flow and direction == "log_prob")
            assert count[name] == 2 * called, (direction, name, type(module))


def _couplings(flow: nn.Module) -> list[nn.Module]:
    return [
        module.network[0] for module in parts(flow, steps.AffineCoupling) if isinstance(module.network, nn.Sequential)
    ]


def _layers(flow: nn.Module) -> list[nn.Module]:
    return parts(flow, InvertibleConv2d)


def _each(choose: Callable, apply: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def change(flow: nn.Module) -> None:
        for module in choose(flow):
            apply(module)

    return change


TOOLS = {
    "pruned layers": _each(_layers, lambda layer: prune.l1_unstructured(layer, "raw_weight", 0.5)),
    "pruned networks": _each(_couplings, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "old weight_norm": _each(_layers, lambda layer: old_weight_norm(layer, "raw_weight")),
    "old weight_norm of networks": _each(_couplings, old_weight_norm),
    "weight_norm": _each(_layers, lambda layer: parametrizations.weight_norm(layer, "raw_weight")),
    "spectral_norm": _each(_layers, lambda layer: parametrizations.spectral_norm(layer, "raw_weight")),
    "orthogonal": _each(_layers, lambda layer: parametrizations.orthogonal(layer, "raw_weight")),
    "parametrize": _each(_layers, lambda layer: parametrize.register_parametrization(layer, "raw_weight", nn.Tanh())),
    "spectral_norm of networks": _each(_couplings, parametrizations.spectral_norm),
}


@in_both
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:.*nonzero entries")
def test_tools_that_compute_parameters(library: str, tool: str):
    """The flow uses the computed parameters, before and after a training step, and after loading."""
    flow = build(library, diagonal="learned")
    before = results(flow, library)
    TOOLS[tool](flow)
    torch.manual_seed(2)
    flow.log_prob(images()).mean().backward()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 1e-5 * parameter.grad
    found = results(flow, library)
    plain = build(library, diagonal="learned")
    with torch.no_grad():
        changed = dict(flow.named_modules())
        for name, parameter in plain.named_parameters():
            module, _, attribute = name.rpartition(".")
            parameter.copy_(getattr(changed[module], attribute))
    expected = results(plain, library)
    for actual, value in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, value)
    assert not torch.equal(found[0], before[0])
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = build(library, diagonal="learned")
    TOOLS[tool](other)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(results(other, library)[:2], found[:2])


@in_both
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))], ids=["copy", "pickle"]
)
def test_duplicates(library: str, duplicate: Callable):
    flow = build(library)
    expected = results(flow, library)
    twin = duplicate(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2)
    for actual, value in zip(results(twin, library), expected, strict=True):
        assert torch.equal(actual, value)


AVERAGES = {
    "mean": {},
    "mean of lists": dict(multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
    "moving": dict(avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    "moving, of lists": dict(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
}


@in_both
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_with_buffers(library: str, average: str):
    """Booleans cannot be subtracted, and integers were rounded down, to another permutation."""
    flow = LIBRARIES[library]((4, 8, 8), 2, 1, hidden_channels=4)
    data = torch.randint(256, (3, 4, 8, 8))
    flow(data)
    averaged = swa_utils.AveragedModel(flow, use_buffers=True, **AVERAGES[average])
    for _ in range(20):
        averaged.update_parameters(flow)
    for actual, expected in zip(averaged.module.train().encode(data), flow.encode(data), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@in_both
def test_functional_call(library: str):
    flow, other = build(library), build(library)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = results(other, library)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self) -> list[Tensor]:
            return results(self.flow, library)

    replaced = {
        f"flow.{name}": value.requires_grad_(value.is_floating_point()) for name, value in other.state_dict().items()
    }
    for actual, value in zip(torch.func.functional_call(Both(), replaced), expected, strict=True):
        torch.testing.assert_close(actual, value)


@in_both
def test_flows_stacked_for_vmap(library: str):
    """All of them see the same images, so only the parameters have a dimension to map over."""
    flows = [build(library) for _ in range(2)]
    with torch.no_grad():
        for parameter in flows[1].parameters():
            parameter.mul_(1.1)

    class Method(nn.Module):
        def __init__(self, flow: nn.Module, name: str) -> None:
            super().__init__()
            self.flow, self.name = flow, name

        def forward(self, *arguments: Tensor) -> Tensor:
            return getattr(self.flow, self.name)(*arguments)

    noise, latent = torch.rand(3, 1, 8, 8).double(), torch.randn(3, 64).double()
    condition = (None,) if library == "nflows" else (None, None)
    for name, arguments in (("log_prob", (images(), *condition, noise)), ("decode", (latent,))):
        modules = [Method(flow, name) for flow in flows]
        parameters, buffers = torch.func.stack_module_state(modules)
        empty = copy.deepcopy(modules[0]).to("meta")

        def call(parameters: dict, buffers: dict) -> Tensor:
            return torch.func.functional_call(empty, (parameters, buffers), arguments)  # noqa: B023

        torch.testing.assert_close(torch.vmap(call)(parameters, buffers), torch.stack([m(*arguments) for m in modules]))


@in_both
def test_torchs_default_device_need_not_be_the_flows(library: str):
    flow, data, noise = build(library), images(), torch.rand(3, 1, 8, 8).double()
    expected = flow.log_prob(data, noise=noise)
    latent, _ = flow.encode(data)
    with torch.device("meta"):
        assert torch.equal(flow.log_prob(data, noise=noise), expected)
        assert torch.equal(flow.encode(data)[0], latent)
        assert torch.equal(flow.decode(latent), data.double())
        samples = flow.sample(2)
        assert (samples if library == "nflows" else samples[0]).device.type == "cpu"


@in_both
def test_data_parallel_on_the_cpu_is_the_module(library: str):
    flow = build(library)
    torch.manual_seed(2)
    expected = flow(images())
    torch.manual_seed(2)
    assert torch.equal(nn.DataParallel(flow)(images()), expected)


def test_the_core_layer_in_a_flow_of_nflows():
    """It takes a context and ignores it."""
    flow = nflows.flows.Flow(
        nflows.transforms.CompositeTransform(
            [InvertibleConv2d(4), nflows.transforms.InverseTransform(InvertibleConv2d(4))]
        ),
        nflows.distributions.StandardNormal((4, 3, 3)),
    )
    context = torch.randn(2, 5)
    samples, log_prob = flow.sample_and_log_prob(3, context)
    assert samples.shape == (2, 3, 4, 3, 3)
    torch.testing.assert_close(flow.log_prob(samples[0], context[:1].expand(3, -1)), log_prob[0])
