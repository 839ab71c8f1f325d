"""`max_inverse_gain`: no parameters break the bound at any image size, and nothing changes if it is inactive."""

import copy

import oracles
import pytest
import torch
from cases import STENCILS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close
from torch import Tensor, nn

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d, PeriodicConv2d, bound
from nflows_kconv.diagnostics import conditioning
from nflows_kconv.layer import InvertibleConv

GAINS = (1.01, 2.0, 4.0, 100.0)
OPTIONS = {
    "unit": {},
    "learned, bias": dict(diagonal="learned", bias=True),
    "one corner": dict(corners="BR"),
    "repeats, oblong": dict(corners=("TL", "TL"), kernel_size=(2, 3), diagonal="learned"),
    "no taps but the pivot": dict(kernel_size=1, corners="TL"),
    "nothing off the diagonal": dict(kernel_size=1),
    "sides, dilated": dict(corners=("T", "R"), dilation=2, bias=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def scattered(layer: InvertibleConv2d, size: float, seed: int = 0) -> InvertibleConv2d:
    """Returns the layer with parameters of a given size, including masked entries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise if name == "log_diagonal" else size * noise)
    return layer


def singular_values(layer: InvertibleConv, size: tuple[int, ...]) -> Tensor:
    """Returns the singular values of the dense matrices."""
    groups = oracles.matrices(layer.weight.detach(), layer.corners, size, layer.dilation)
    return torch.cat([torch.linalg.svdvals(group) for group in groups])


@st.composite
def layers(draw: st.DrawFn) -> InvertibleConv:
    dimensions = draw(st.sampled_from((2, 2, 1, 3)))
    corners = draw(st.lists(st.sampled_from(STENCILS[dimensions]), min_size=1, max_size=3))
    kernel_sizes, dilations = st.integers(1, 5 - dimensions), st.integers(1, 2)
    layer = {1: InvertibleConv1d, 2: InvertibleConv2d, 3: InvertibleConv3d}[dimensions](
        len(corners) * draw(st.integers(1, 4)),
        draw(st.tuples(*[kernel_sizes] * dimensions)),
        corners=corners,
        dilation=draw(st.tuples(*[dilations] * dimensions)),
        diagonal=draw(st.sampled_from(("unit", "learned"))),
        max_inverse_gain=draw(st.sampled_from(GAINS) | st.floats(1.001, 1000)),
    ).double()
    if draw(st.booleans()):  # a single tap of a single channel, where the bound is tight
        scattered(layer, 10.0 ** draw(st.integers(-3, 6)), draw(st.integers(0, 1000)))
    else:
        with torch.no_grad():
            layer.raw_weight.fill_(10.0 ** draw(st.integers(-3, 6)) * draw(st.sampled_from((-1, 1))))
    return layer


@given(layer=layers(), sides=st.tuples(*[st.integers(1, 7)] * 3))
def test_singular_values_stay_in_bounds(layer: InvertibleConv, sides: tuple[int, int, int]):
    gain, diagonal = layer.max_inverse_gain, oracles.diagonal(layer.weight.detach(), layer.corners)
    size = tuple(min(side, 3) for side in sides) if layer.dimensions == 3 else sides[: layer.dimensions]
    values = singular_values(layer, size)
    rounding = 1 + 1e-9
    assert 1 / values.min() <= rounding * gain / diagonal.min()
    assert values.max() <= rounding * (2 - 1 / gain) * diagonal.max()
    measured = conditioning(layer, size, exact=True)
    assert measured.inverse_gain == pytest.approx(1 / values.min().item())
    assert measured.gain == pytest.approx(values.max().item())
    assert measured.inverse_gain <= rounding * measured.inverse_gain_bound


def test_the_bound_is_reached_in_the_limit():
    """One channel, one negative tap: x[h] = y[h] + rho x[h-1], whose gain approaches 1/(1 - rho) in long columns."""
    layer = InvertibleConv2d(1, (2, 1), corners="TL", max_inverse_gain=4).double()
    with torch.no_grad():
        layer.raw_weight.fill_(-1000)
    gains = [1 / singular_values(layer, (height, 1)).min() for height in (1, 10, 100, 400)]
    assert gains == sorted(gains)
    assert 0.999 * 4 < gains[-1] < 4


@given(layer=layers())
def test_the_scale_is_no_smaller_than_the_proof_needs(layer: InvertibleConv):
    """The effective weight is the raw one times a factor per group: 1, or such that r = 1 - 1/g to 10 %."""
    weight, groups = layer.weight.detach(), len(layer.corners)
    raw = oracles.effective(layer.raw_weight.detach(), layer.corners)
    diagonal = oracles.diagonal(weight, layer.corners)
    for tensor in (raw, weight):
        oracles.set_diagonal(tensor, layer.corners, torch.zeros(layer.num_channels))
    for r, w, d in zip(raw.chunk(groups), weight.chunk(groups), diagonal.chunk(groups), strict=True):
        taps = (w.flatten(2) / d[:, None, None]).permute(2, 0, 1)
        norm, largest = torch.linalg.matrix_norm(taps, 2).sum(), 1 - 1 / layer.max_inverse_gain
        assert norm <= largest * (1 + 1e-9)
        if norm >= 0.9 * largest:
            factor = (w * r).sum() / (r * r).sum()
            torch.testing.assert_close(w, factor * r)
        else:
            assert torch.equal(w, r)


@settings(max_examples=20)
@given(size=st.integers(1, 40), exponent=st.integers(-8, 8), rank=st.integers(0, 3), seed=st.integers(0, 1000))
def test_spectral_norms_are_bounded_tightly(size: int, exponent: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(5, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    matrices = 10.0**exponent * (left[..., :rank] @ right[..., :rank, :] if rank < 3 else left)
    exact = torch.linalg.matrix_norm(matrices, 2)
    found = bound.off_diagonal_norm(matrices.permute(1, 2, 0)[..., None])
    assert exact.sum() * (1 - 1e-9) <= found.item() <= 1.06 * exact.sum() + 1e-20


@pytest.mark.parametrize("channels", [4, 48, 256])
@every_option
def test_layers_that_need_no_bound_stay_as_they_are(options: dict, channels: int, device: str):
    torch.manual_seed(0)
    free = InvertibleConv2d(channels, **options).to(device)
    torch.manual_seed(0)
    bounded = InvertibleConv2d(channels, **options, max_inverse_gain=2).to(device)
    assert torch.equal(bounded.weight, free.weight)


@every_option
def test_bounded_layers_are_layers(options: dict, backend: str, device: str):
    """Inverse, log-determinants and bias work as without a bound."""
    layer = scattered(InvertibleConv2d(8, **options, max_inverse_gain=3), 10).to(device)
    input = torch.randn(2, 8, 6, 5, device=device)
    output, log_det = layer(input)
    bias = 0 if layer.bias is None else layer.bias.detach().cpu().double()[:, None, None]
    assert_close(output, oracles.conv(input, layer.weight.detach(), layer.corners, layer.dilation) + bias)
    restored, inverse_log_det = layer.inverse(output)
    assert_close(restored, input, factor=10)
    expected = oracles.log_abs_det(layer.weight.detach(), layer.corners, (6, 5))
    assert_close(log_det, expected.expand(2), factor=10)
    assert torch.equal(inverse_log_det, -log_det)


@every_option
@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradients(options: dict, size: float, inverse: bool):
    layer = scattered(InvertibleConv2d(4, **options, max_inverse_gain=2).double(), size)
    parameters = dict(layer.named_parameters())

    def function(input: Tensor, *values: Tensor) -> Tensor:
        twin = copy.copy(layer)
        twin._parameters = dict.fromkeys(layer._parameters) | dict(zip(parameters, values, strict=True))
        return (twin.inverse if inverse else twin.forward)(input)[0]

    input = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (input, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (input, *parameters.values()), fast_mode=True)


def test_zero_weights_have_gradients():
    """Although a norm has none at zero."""
    layer = InvertibleConv2d(4, corners="TL", max_inverse_gain=2)
    nn.init.zeros_(layer.raw_weight)
    layer(torch.ones(1, 4, 3, 3))[0].sum().backward()
    assert layer.raw_weight.grad.isfinite().all()
    assert layer.raw_weight.grad.any()


@pytest.mark.parametrize("dtype", oracles.HALF_PRECISION, ids=str)
def test_half_precision_bounds_in_float32(dtype: torch.dtype):
    layer = scattered(InvertibleConv2d(8, corners="TL", max_inverse_gain=2), 100).to(dtype)
    assert_close(layer.weight, copy.deepcopy(layer).double().weight)


def test_autocast_does_not_reach_the_bound():
    layer = scattered(InvertibleConv2d(8, corners="TL", max_inverse_gain=2), 100)
    expected = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)


def test_compiled_layers():
    layer = scattered(InvertibleConv2d(8, diagonal="learned", max_inverse_gain=2), 1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input = torch.randn(2, 8, 4, 5)
    assert_close(compiled(input)[0], layer(input)[0])


def test_training_keeps_the_bound():
    """Takes steps that would make the inverse explode."""
    torch.manual_seed(0)
    gains = {}
    for gain in (None, 2):
        layer = InvertibleConv2d(4, corners="TL", max_inverse_gain=gain)
        optimizer = torch.optim.Adam(layer.parameters(), 0.1)
        images = torch.ones(2, 4, 6, 6) + 0.1 * torch.randn(2, 4, 6, 6)
        losses = []
        for _ in range(30):
            loss = layer(images)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        gains[gain] = 1 / singular_values(layer, (6, 6)).min()
    assert gains[2] <= 2.00001
    assert gains[None] > 4


@pytest.mark.parametrize("library", [nflows_kconv.nflows, nflows_kconv.normflows], ids=["nflows", "normflows"])
def test_adapters_and_builders_pass_it_on(library):
    assert library.InvertibleConv2d(4, max_inverse_gain=3).max_inverse_gain == 3
    unit = dict(corners=("TL", "TR", "BL", "BR"))
    for options, cls in ((unit, InvertibleConv2d), (dict(padding_mode="circular", kernel_size=2), PeriodicConv2d)):
        flow = library.finc_flow((1, 8, 8), 2, 1, hidden_channels=4, max_inverse_gain=3, **options)
        assert [m.max_inverse_gain for m in flow.modules() if isinstance(m, cls)] == [3, 3]


def test_glow_blocks_pass_it_on():
    block = nflows_kconv.normflows.GlowBlock(4, 4, max_inverse_gain=3)
    assert [m.max_inverse_gain for m in block.modules() if isinstance(m, InvertibleConv2d)] == [3, 3]


def test_it_is_shown_if_given():
    assert "gain" not in repr(InvertibleConv2d(4))
    assert repr(InvertibleConv2d(4, max_inverse_gain=2)).endswith("bias=False, max_inverse_gain=2.0)")


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (1, ValueError, "finite and greater than 1, got 1"),
        (0.5, ValueError, "finite and greater than 1, got 0.5"),
        (-2, ValueError, "finite and greater than 1, got -2"),
        (float("inf"), ValueError, "finite and greater than 1, got inf"),
        (float("nan"), ValueError, "finite and greater than 1, got nan"),
        ("2", TypeError, "a number or None, got '2'"),
        (True, TypeError, "a number or None, got True"),
    ],
)
def test_errors(value: object, error: type[Exception], match: str):
    with pytest.raises(error, match=f"max_inverse_gain must be {match}"):
        InvertibleConv2d(4, max_inverse_gain=value)
