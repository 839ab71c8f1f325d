"""Checks shared by the tests of all adapters."""

import copy
import importlib
import io
import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nflows_kconv import layer


def scatter(module: nn.Module) -> nn.Module:
    """Moves convolutions away from the identity and from zero, to reveal a wrong sign or a lost tap."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, layer.InvertibleConv2d | nn.Conv2d):
                for parameter in part.parameters():
                    parameter.normal_(std=0.2)
    return module


def check_training(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Asserts that Adam lowers the loss and changes every parameter."""
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(30):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 1
    for part in model.modules():
        if isinstance(part, layer.InvertibleConv2d):
            assert part.raw_weight.grad.abs().max() > 0


def check_deep_copy(module: nn.Module, inputs: Tensor) -> None:
    """Asserts that a copy computes the same and does not change with the original."""
    expected = module(inputs)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    for actual, value in zip(twin(inputs), expected, strict=True):
        assert torch.equal(actual, value)
    assert not torch.equal(module(inputs)[0], expected[0])


def check_saved_state(build: Callable[[], nn.Module], inputs: Tensor) -> None:
    """Asserts that a state_dict, saved and loaded, holds everything that results depend on."""
    module, other = scatter(build()), build()
    expected = module(inputs)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for actual, value in zip(other(inputs), expected, strict=True):
        assert torch.equal(actual, value)


def check_missing_library(monkeypatch: pytest.MonkeyPatch, adapter: str, imported: str) -> None:
    """Asserts that importing the adapter names the extra if the library's module `imported` is missing."""
    monkeypatch.setitem(sys.modules, imported, None)
    monkeypatch.delitem(sys.modules, f"nflows_kconv.{adapter}")
    with pytest.raises(ImportError, match=re.escape(f'pip install "nflows-kconv[{adapter}]"')) as raised:
        importlib.import_module(f"nflows_kconv.{adapter}")
    assert isinstance(raised.value.__cause__, ImportError)


def check_directions(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    inverse: Callable[[Tensor], tuple[Tensor, Tensor]],
    inputs: Tensor,
) -> None:
    """Asserts, in double precision, that the directions undo each other and log-determinants match the Jacobians."""
    outputs, log_abs_det = forward(inputs)
    restored, inverse_log_abs_det = inverse(outputs)
    assert_close(restored, inputs)
    assert_close(inverse_log_abs_det, -log_abs_det)
    assert log_abs_det.shape == inputs.shape[:-3]
    assert log_abs_det.dtype == torch.float64
    for function, points, expected in ((forward, inputs, log_abs_det), (inverse, outputs, inverse_log_abs_det)):
        for point, value in zip(points.detach().flatten(0, -4), expected.flatten(), strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda x, f=function: f(x)[0], point[None])
            assert_close(torch.linalg.slogdet(jacobian.reshape(point.numel(), -1)).logabsdet, value)
