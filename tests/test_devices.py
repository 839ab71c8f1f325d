"""Devices without float64, such as Apple's GPUs: what is in float32 makes no tensor of float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d, step
from nflows_kconv.diagnostics import round_trip

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}


class WithoutFloat64(TorchDispatchMode):
    """Refuses tensors of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"this device has no float64, got {func}")
        return result


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
        steps = step.Sequence([InvertibleConv2d(4, bias=True), step.ActNorm(4), step.InvertibleConv1x1(4)])
        steps.steps[0].weight = steps.steps[0].weight
        for module in steps.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        output, _ = steps(torch.randn(2, 4, 5, 5))
        steps.inverse(output)[0].sum().backward()
