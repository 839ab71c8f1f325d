"""The library-independent steps: log-determinants, round trips, initialisation."""

from __future__ import annotations

import copy
import itertools
import math
import re

import nflows.transforms
import normflows
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d
from nflows_kconv.flows import steps
from nflows_kconv.stencil import CORNERS
from nflows_kconv.testing import check_transform

STEPS = {
    "actnorm": lambda n: steps.ActNorm(4),
    "1x1": lambda n: steps.InvertibleConv1x1(4),
    "coupling": lambda n: steps.AffineCoupling(steps.coupling_network(4, 6, dimensions=n)),
    "prior": lambda n: steps.learned_prior(4, dimensions=n),
    "sequence": lambda n: steps.Sequence([layer(n, CORNERS[n][:2]), steps.ActNorm(4), steps.InvertibleConv1x1(4)]),
    "inverse": lambda n: steps.Inverse(layer(n, CORNERS[n][-1], diagonal="learned")),
    "squeeze": lambda n: steps.Squeeze(),
    "nothing": lambda n: steps.Sequence([]),
}
every_step = pytest.mark.parametrize("name", STEPS)


def layer(dimensions: int, corners, **arguments) -> nn.Module:
    kind = {1: InvertibleConv1d, 2: InvertibleConv2d, 3: InvertibleConv3d}[dimensions]
    return kind(4, corners=corners, **arguments)


def build(name: str, dimensions: int = 2) -> nn.Module:
    """Builds a step in float64, in evaluation mode, with changed parameters."""
    torch.manual_seed(3)
    module = STEPS[name](dimensions).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


@every_step
@pytest.mark.parametrize(
    ("size", "dtype"), [((6,), torch.float64), ((4, 2), torch.float32), ((2, 4, 2), torch.float64)], ids=str
)
def test_steps_are_sound_transforms(name, size, dtype):
    check_transform(build(name, len(size)).to(dtype), torch.randn(3, 4, *size, dtype=dtype))


@every_step
@pytest.mark.parametrize("size", [(2,), (2, 2), (2, 2, 2)])
def test_log_determinants_may_be_added_up_in_place(name, size):
    _, log_abs_det = build(name, len(size))(torch.randn(3, 4, *size, dtype=torch.float64))
    log_abs_det = log_abs_det.detach()
    log_abs_det += torch.arange(3.0)
    assert log_abs_det.unique().numel() == 3


@every_step
def test_half_precision_has_float32_log_determinants(name):
    module = build(name).to(torch.bfloat16)
    y, log_abs_det = module(torch.randn(2, 4, 2, 4, dtype=torch.bfloat16))
    assert (y.dtype, log_abs_det.dtype) == (torch.bfloat16, torch.float32)
    x, log_abs_det = module.inverse(y)
    assert (x.dtype, log_abs_det.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("size", [(), (20,), (4, 5), (4, 5, 2)])
def test_the_first_batch_in_training_mode_sets_actnorm(size):
    norm = steps.ActNorm(3)
    numbers = torch.randn(50, *size, 3) * torch.tensor([0.1, 2.0, 30.0]) + 7
    x = numbers.movedim(-1, 1)
    assert torch.equal(norm.eval()(x)[0], x)
    y = norm.train()(x)[0].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))
    again = norm(2 * x)[0].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(again, 2 * y - norm.shift * norm.log_scale.exp(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(4,), (4, 6), (2, 4, 6)])
def test_squeezing_moves_blocks_of_two_into_channels(size):
    """An output channel is one position in the blocks of one channel, with the last axis fastest."""
    x = torch.randn(3, 2, *size)
    y, _ = steps.Squeeze()(x)
    assert y.shape == (3, 2 * 2 ** len(size), *(number // 2 for number in size))
    for channel, (of_x, *place) in enumerate(itertools.product(range(2), repeat=1 + len(size))):
        assert torch.equal(y[:, channel], x[:, of_x][(slice(None), *(slice(start, None, 2) for start in place))])
    if len(size) == 2:
        assert torch.equal(y, nflows.transforms.SqueezeTransform()(x)[0])
        assert torch.equal(y, normflows.flows.Squeeze().inverse(x)[0])
    with pytest.raises(ValueError, match=r"sizes must be even, got shape \(3, 2, .*3\)"):
        steps.Squeeze()(x[..., :3])
    with pytest.raises(ValueError, match=rf"channels must be a multiple of {2 ** len(size)}, got shape \(3, 1,"):
        steps.Squeeze().inverse(x[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_actnorm_of_numbers_far_from_zero(dtype):
    """float32 would lose their variance in the mean of squares."""
    norm = steps.ActNorm(2)
    x = (torch.randn(40, 2, 8, 8) * torch.tensor([1, 100.0])[:, None, None] + 1e4).to(dtype)
    norm.to(dtype)(x)
    exact = x.double()
    torch.testing.assert_close(norm.shift.double(), -exact.mean((0, 2, 3)), atol=0, rtol=1e-6)
    deviation = exact.std((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.log_scale.double(), -deviation.log(), atol=1e-5, rtol=0)


RESETS = {
    "fill_": lambda norm, fresh: norm.initialized.fill_(False),
    "data": lambda norm, fresh: norm.initialized.data.fill_(False),
    "in inference mode": lambda norm, fresh: torch.inference_mode()(norm.initialized.fill_)(False),
    "new buffer": lambda norm, fresh: setattr(norm, "initialized", torch.tensor(False)),
    "load_state_dict": lambda norm, fresh: norm.load_state_dict(fresh.state_dict()),
    "load_state_dict, assigned": lambda norm, fresh: norm.load_state_dict(fresh.state_dict(), assign=True),
    "state_dict in place": lambda norm, fresh: [
        value.copy_(fresh.state_dict()[name]) for name, value in norm.state_dict().items()
    ],
    "reset_parameters": lambda norm, fresh: norm.reset_parameters(),
}


@pytest.mark.parametrize("free", ["cpu", "none"])
@pytest.mark.parametrize("reset", RESETS)
def test_the_buffer_of_actnorm_decides(reset, free, monkeypatch):
    monkeypatch.setattr(steps, "_LOOKS_ARE_FREE", (free,))
    norm, x = steps.ActNorm(3), torch.randn(9, 3, 4, 4) + 5
    norm(x)
    set_by_first = norm.shift.clone()
    norm(x + 1)
    assert torch.equal(norm.shift, set_by_first)
    RESETS[reset](norm, steps.ActNorm(3))
    assert not norm.initialized
    if reset == "data" and free == "none":  # leaves no trace
        norm.train()
    norm(x + 1)
    assert norm.initialized
    torch.testing.assert_close(norm.shift, set_by_first - 1)
    norm.reset_parameters()
    norm.eval()(x)
    norm.train().initialized.fill_(True)  # as copying another layer's parameters and buffers does
    norm(x)
    assert not norm.shift.any()


COMPUTED = {
    "pruning": lambda norm: prune.l1_unstructured(norm, "log_scale", 1),
    "parametrization": lambda norm: parametrize.register_parametrization(norm, "shift", nn.Tanh()),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_actnorm_sets_no_computed_parameters(compute):
    """What it wrote into them was lost, in silence."""
    norm, x = steps.ActNorm(3), torch.randn(9, 3, 4, 4) + 5
    compute(norm)
    norm.eval()(x)
    with pytest.raises(RuntimeError, match="its first batch, or load a state_dict, before pruning or a parametriz"):
        norm.train()(x)
    assert not norm.initialized
    norm = steps.ActNorm(3)
    norm(x)
    compute(norm)
    norm(x)


def test_actnorm_waits_for_a_batch_with_values():
    norm, x = steps.ActNorm(3), torch.randn(9, 3, 4, 4) + 5
    norm(x[:0])
    assert not norm.initialized
    parameters = dict(norm.named_parameters())
    with pytest.raises(RuntimeError, match=r"must see its first batch, or be in evaluation mode, before torch\.func"):
        torch.func.grad(lambda values: torch.func.functional_call(norm, values, (x,))[0].sum())(parameters)
    norm(x)
    torch.func.grad(lambda values: torch.func.functional_call(norm, values, (x,))[0].sum())(parameters)
    parameters, buffers = torch.func.stack_module_state([norm, copy.deepcopy(norm)])  # trains an ensemble
    together = torch.func.vmap(lambda *state: torch.func.functional_call(norm, state, (x,))[0])(parameters, buffers)
    torch.testing.assert_close(together, norm(x)[0].expand(2, -1, -1, -1, -1))
    with torch.device("meta"):
        for step in (steps.ActNorm(3), steps.InvertibleConv1x1(3)):
            assert step.inverse(step(torch.empty(9, 3, 4, 4))[0])[0].shape == (9, 3, 4, 4)
    with FakeTensorMode():
        steps.ActNorm(3)(torch.empty(9, 3, 4, 4))
    with torch.inference_mode():
        made_there = steps.ActNorm(3)
        for _ in range(2):
            made_there(x)
    assert torch.equal(made_there.shift, norm.shift)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_actnorm_refuses_a_first_batch_that_would_ruin_it(value: float):
    norm, x = steps.ActNorm(3), torch.randn(9, 3, 4, 4) + 5
    spoilt = x.clone()
    spoilt[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match=r"must have a finite mean and variance .*, got others in 1 of 3"):
        norm(spoilt)
    assert not norm.initialized and not norm.shift.any() and not norm.log_scale.any()
    norm(x)
    torch.testing.assert_close(norm.shift, -x.mean((0, 2, 3)))


class OneLook(TorchDispatchMode):
    """Counts how often values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.looks += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_other_devices_are_asked_once(monkeypatch):
    """Each read synchronizes, so only the first, and one after a change, is allowed."""
    norm, x = steps.ActNorm(3), torch.randn(9, 3, 4, 4) + 5
    norm(x)
    monkeypatch.setattr(steps, "_LOOKS_ARE_FREE", ())
    with OneLook() as counter:
        for _ in range(3):
            norm(x)
    assert counter.looks == 0
    norm.initialized.fill_(True)
    with OneLook() as counter:
        for _ in range(3):
            norm(x)
    assert counter.looks == 1


def test_running_back_sets_nothing():
    norm = steps.ActNorm(3)
    norm.inverse(torch.randn(4, 3, 2, 2))
    assert not norm.initialized


def test_actnorm_of_a_constant_channel_stays_finite():
    norm = steps.ActNorm(2)
    y, log_abs_det = norm(torch.full((3, 2, 2, 2), 5.0))
    assert y.isfinite().all()
    assert log_abs_det.isfinite().all()


def test_a_state_dict_carries_the_initialisation():
    norm, loaded = steps.ActNorm(2), steps.ActNorm(2)
    norm(torch.randn(9, 2, 3, 3) + 4)
    loaded.load_state_dict(norm.state_dict())
    x = torch.randn(5, 2, 3, 3)
    assert torch.equal(loaded.train()(x)[0], norm(x)[0])


def test_the_1x1_starts_as_a_rotation():
    convolution = steps.InvertibleConv1x1(6)
    x = torch.randn(2, 6, 3, 4)
    y, log_abs_det = convolution(x)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1))
    torch.testing.assert_close(log_abs_det, torch.zeros(2), atol=1e-5, rtol=0)
    weight = convolution(torch.eye(6)[:, :, None, None])[0][:, :, 0, 0].T
    torch.testing.assert_close(convolution.inverse_weight() @ weight, torch.eye(6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shape", [(4,), (4, 3, 3), (2, 3, 4, 4), (2, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", [steps.ActNorm, steps.InvertibleConv1x1])
def test_other_shapes_are_refused(kind, direction, shape):
    with pytest.raises(ValueError, match=re.escape(f"input must have shape [B, 4, ...], got {shape}")):
        getattr(kind(4), direction)(torch.zeros(shape))


def test_the_1x1_needs_pixels():
    with pytest.raises(ValueError, match=re.escape("input must have shape [B, 4, ...], got (2, 4)")):
        steps.InvertibleConv1x1(4)(torch.zeros(2, 4))


@pytest.mark.parametrize(("channels", "error"), [(0, ValueError), (2.0, TypeError)])
@pytest.mark.parametrize("kind", [steps.ActNorm, steps.InvertibleConv1x1])
def test_other_numbers_of_channels_are_refused(kind, channels, error):
    with pytest.raises(error, match=f"num_channels must be .*, got {channels}"):
        kind(num_channels=channels)


@pytest.mark.parametrize("module", [steps.learned_prior(4), steps.AffineCoupling(steps.coupling_network(4, 8))])
def test_couplings_start_as_the_identity(module):
    x = torch.randn(2, 4, 3, 3)
    y, log_abs_det = module(x)
    assert torch.equal(y, x)
    assert torch.equal(log_abs_det, torch.zeros(2))


def test_scales_of_couplings_are_bounded():
    class Huge(nn.Module):
        def forward(self, kept: Tensor) -> Tensor:
            return torch.cat([kept.sign() * 1e6, torch.zeros_like(kept)], 1)

    y, _ = steps.AffineCoupling(Huge())(torch.ones(1, 4, 1, 1) * torch.tensor([1.0, 1, 1, -1])[:, None, None])
    torch.testing.assert_close(y[0, :2, 0, 0].log(), torch.tensor([2.0, -2.0]))


def test_only_networks_run_in_half_precision_under_autocast():
    sequence = steps.Sequence([InvertibleConv2d(4), steps.ActNorm(4), steps.InvertibleConv1x1(4)]).eval()
    x = torch.randn(3, 4, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = sequence(x)
        restored, _ = sequence.inverse(y)
    assert y.dtype == torch.float32
    torch.testing.assert_close(restored, x)
