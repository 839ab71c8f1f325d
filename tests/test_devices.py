"""Devices without float64, such as Apple's GPUs: float32 flows make no float64 tensors, tools compute on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d
from nflows_kconv.bijection import NoInverse
from nflows_kconv.diagnostics import conditioning, round_trip
from nflows_kconv.flows.steps import ActNorm, AffineCoupling, InvertibleConv1x1, Sequence
from nflows_kconv.testing import check_transform
from nflows_kconv.testing.probe import Probe

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}


class WithoutFloat64(TorchDispatchMode):
    """Refuses tensors of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        refuse_float64(func, result)
        return result


class OnDevice(torch.Tensor):
    """A tensor that reports the device "meta" and keeps its values on the CPU."""

    def __new__(cls, values):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, device="meta")

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values.tolist()

    def __reduce_ex__(self, protocol):
        return OnDevice, (self.values,)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device().__torch_dispatch__(func, types, args, kwargs)


class Device(TorchDispatchMode):
    """The device of `OnDevice`, which has no float64, not even for a copy to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = {id(each.values): each for each in tensors if isinstance(each, OnDevice)}
        device = (kwargs or {}).get("device")
        stays = bool(there) if device is None else torch.device(device).type == "meta"
        if not there and not stays:  # most calls, and the rest takes longer than they do
            return func(*args, **(kwargs or {}))
        elsewhere = [each for each in tensors if not isinstance(each, OnDevice)]
        if there and any(each.dim() for each in elsewhere) and func not in MAY_MIX:
            raise RuntimeError(f"{func} got tensors of two devices")

        def wrapped(values):
            return there[id(values)] if id(values) in there else OnDevice(values)

        args_here, options = tree_map_only(OnDevice, lambda each: each.values, (args, kwargs or {}))
        result = func(*args_here, **options | ({} if device is None else {"device": "cpu"}))
        refuse_float64(func, result)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map_only(torch.Tensor, lambda each: wrapped(each), result) if stays else result


MAY_MIX = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor}


def refuse_float64(func, result):
    for each in tree_leaves(result):
        if isinstance(each, torch.Tensor) and each.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"this device has no float64, got {func}")


def test_float64_is_refused():
    with WithoutFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(3).double()


@pytest.mark.parametrize("form", [{}, dict(num_classes=3), dict(direction="inverse"), dict(reversible=True)], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_float32_flow_makes_no_float64(library: str, form: dict):
    images, labels = torch.randint(256, (4, 1, 8, 8)), torch.tensor([0, 2, 1, 0]) if "num_classes" in form else None
    with WithoutFloat64():
        flow = LIBRARIES[library]((1, 8, 8), 2, 1, hidden_channels=4, diagonal="learned", max_inverse_gain=4, **form)
        optimizer = torch.optim.Adam(flow.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            flow.log_prob(images, labels).mean().backward()
            optimizer.step()
        flow.sample(4 if library == "normflows" else 1, labels)
        flow.load_state_dict(flow.state_dict())
        round_trip(flow, images, labels)


def test_neither_do_layers_and_steps():
    with WithoutFloat64():
        steps = Sequence([InvertibleConv2d(4, bias=True), ActNorm(4), InvertibleConv1x1(4)])
        steps.steps[0].weight = steps.steps[0].weight
        for module in steps.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        output, _ = steps(torch.randn(2, 4, 5, 5))
        steps.inverse(output)[0].sum().backward()


class ComplexSquare(nn.Module):
    """Maps x and -x to the same output, though its det dy/dx never changes sign."""

    def forward(self, x):
        real, imaginary = x.unbind(1)
        y = torch.stack([real.square() - imaginary.square(), 2 * real * imaginary], 1)
        return y, (4 * x.square().sum(1)).log()

    def inverse(self, y):
        raise NoInverse("it has none")


class Doubled(ComplexSquare):
    """A transform that cannot move to the CPU, because its constants stay."""

    def __init__(self):
        super().__init__()
        self.factors = OnDevice(torch.full((2,), 2.0))

    def forward(self, x):
        return x * self.factors, self.factors.log().sum().expand(len(x))


@pytest.fixture
def device(monkeypatch):
    """Returns the device of `OnDevice`."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # so that the compiler notes the real functions of torch
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # it does not support "meta"
    with Device(), torch.serialization.safe_globals([OnDevice]):
        yield "meta"


def build_step():
    coupling = AffineCoupling(nn.Conv2d(3, 4, 3, padding=1), context_channels=1)
    steps = Sequence([ActNorm(4), InvertibleConv2d(4, bias=True), coupling])
    steps(torch.randn(10, 4, 3, 3), torch.randn(10, 1))  # initialises
    return steps


def test_tools_judge_in_float64_on_the_cpu(device):
    steps, inputs, context = build_step(), torch.randn(2, 4, 2, 2), torch.randn(2, 1)
    expected = conditioning(steps.steps[1], (2, 2))
    steps, inputs, context = steps.to(device), inputs.to(device), context.to(device)
    assert all(isinstance(each, OnDevice) for each in (inputs, context, *steps.parameters(), *steps.buffers()))
    assert conditioning(steps.steps[1], (2, 2)) == expected
    assert round_trip(steps, inputs, context).error < 1e-5
    check_transform(steps, inputs, context)
    with Probe(steps, inputs, context, {}) as probe:
        assert probe.exact_inputs.dtype == torch.float64
    check_transform(Doubled(), inputs[:, :2, 0, 0])


def test_tools_find_faults_there(device):
    coupling, inputs, context = build_step().steps[2], torch.randn(2, 4, 2, 2), torch.randn(2, 1)
    coupling.network.register_forward_hook(lambda module, args, output: output.detach())
    coupling, inputs, context = coupling.to(device), inputs.to(device), context.to(device)
    with pytest.raises(AssertionError, match="gradient through forward"):
        check_transform(coupling, inputs, context)
    with pytest.raises(AssertionError, match="not injective: it takes"):
        check_transform(ComplexSquare(), inputs[:, :2, 0, 0])
    detached = Doubled()
    detached.register_forward_hook(lambda module, args, results: [each.detach() for each in results])
    with pytest.raises(AssertionError, match="differ from log"):
        check_transform(detached, inputs[:, :2, 0, 0])
