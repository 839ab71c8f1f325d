"""The layer: weight, log-determinants, initialization, and everything that may happen to it."""

import copy
import io
import math
import operator
import pickle

import numpy as np
import oracles
import pytest
import torch
from cases import CORNERS, CORNERS_3D, STENCILS, Case, over_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d, functional
from nflows_kconv.layer import InvertibleConv
from nflows_kconv.testing import check_transform

OPTIONS = {
    "unit": {},
    "learned": dict(diagonal="learned"),
    "bias": dict(bias=True),
    "learned, bias": dict(diagonal="learned", bias=True),
    "one corner": dict(corners="BR", diagonal="learned"),
    "repeats, oblong": dict(corners=("TL", "TL"), kernel_size=(2, 3), diagonal="learned"),
    "sides, dilated": dict(corners=("T", "R"), kernel_size=(2, 3), dilation=(1, 2), diagonal="learned", bias=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
LAYERS = {1: InvertibleConv1d, 2: InvertibleConv2d, 3: InvertibleConv3d}


def trained(layer: InvertibleConv2d, seed: int = 0) -> InvertibleConv2d:
    """Returns the layer with parameters far from their initial values, including masked entries."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.copy_(0.3 * noise / parameter[0].numel() ** 0.5)
    return layer


def images(layer: InvertibleConv, batch: int = 3, size: tuple[int, ...] = (4, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, layer.num_channels, *size, generator=generator).to(layer.raw_weight)


def check(layer: InvertibleConv2d) -> None:
    """Asserts that weight, outputs and log-determinants follow from the parameters, with gradients on and off."""
    parameters = {name: parameter.detach().cpu() for name, parameter in layer.named_parameters()}
    log_diagonal = parameters.get("log_diagonal", torch.zeros(layer.num_channels))
    weight = oracles.effective(parameters["raw_weight"], layer.corners)
    oracles.set_diagonal(weight, layer.corners, log_diagonal.double().exp())
    bias = parameters.get("bias", torch.zeros(layer.num_channels))[:, None, None]

    input = images(layer)
    expected = oracles.conv(input, weight, layer.corners, layer.dilation) + bias
    expected_log_det = oracles.log_abs_det(weight, layer.corners, input.shape[2:]).expand(len(input))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output, log_det = layer(input)
            restored, inverse_log_det = layer.inverse(output)
            assert_close(layer.weight, weight)
        assert_close(output, expected)
        assert_close(restored, input, factor=4)
        assert log_det.shape == inverse_log_det.shape == (len(input),)
        assert_close(log_det, expected_log_det, factor=4)
        assert torch.equal(inverse_log_det, -log_det)


@every_option
def test_weight_is_what_conv2d_takes(options: dict, backend: str, device: str):
    check(InvertibleConv2d(8, **options).to(device))
    check(trained(InvertibleConv2d(8, **options)).to(device))


@over_cases()
def test_any_layer_any_image(case: Case, backend: str, device: str):
    bias = case.seed % 2 == 0
    options = dict(corners=case.corners, dilation=case.dilation, diagonal="learned", bias=bias)
    layer = trained(LAYERS[case.dimensions](case.channels, case.kernel_size, **options)).to(device, case.dtype)
    input = case.input(device)
    output, log_det = layer(input)
    assert log_det.shape == (case.batch,)
    assert log_det.dtype == torch.promote_types(case.dtype, torch.float32)
    shift = 0 if layer.bias is None else case.of_channels(layer.bias.detach().cpu().double())
    if case.dtype not in oracles.HALF_PRECISION:  # the bias adds a second rounding
        assert_close(output, oracles.conv(input, layer.weight.detach(), case.corners, case.dilation) + shift)
        assert_close(layer.inverse(output)[0], input, factor=4)


@over_cases()
def test_log_abs_det_is_the_dense_one(case: Case):
    log_det = functional.log_abs_det(case.weight(), corners=case.corners, size=case.size)
    assert log_det.dtype == torch.promote_types(case.dtype, torch.float32)
    diagonal = oracles.diagonal(case.weight(), case.corners).double().abs().log()
    assert_close(log_det, math.prod(case.size) * diagonal.sum(), factor=10)
    if case.unknowns <= 300:
        dense = oracles.log_abs_det(case.weight(), case.corners, case.size)
        assert_close(log_det, dense, factor=10)


@every_option
def test_layers_are_sound_transforms(options: dict, device: str):
    layer = trained(InvertibleConv2d(4, **options)).to(device)
    check_transform(layer, images(layer, batch=2, size=(3, 2)))


# Events in the life of a layer. Each takes a layer and returns the one to continue with.


def _steps(optimizer_class, **options):
    def event(layer: InvertibleConv2d) -> InvertibleConv2d:
        optimizer = optimizer_class(layer.parameters(), **options)
        for _ in range(20):
            optimizer.zero_grad()
            outputs, log_det = layer(images(layer))
            inputs, _ = layer.inverse(images(layer))
            (outputs.square().sum() / 100 + inputs.square().mean() - log_det.mean() / 10).backward()
            optimizer.step()
        return layer

    return event


@torch.no_grad()
def _in_place(layer: InvertibleConv2d) -> InvertibleConv2d:
    for parameter in layer.parameters():
        parameter += 0.1 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    return layer


def _in_place_unseen(layer: InvertibleConv2d) -> InvertibleConv2d:
    """Changes the values of the tensors but not their address or version."""
    for parameter in layer.parameters():
        parameter.data *= 0.9
    return layer


def _load_state_dict(layer: InvertibleConv2d) -> InvertibleConv2d:
    other = trained(copy.deepcopy(layer), seed=2)
    layer.load_state_dict(other.state_dict())
    return layer


def _load_assigned(layer: InvertibleConv2d) -> InvertibleConv2d:
    other = trained(copy.deepcopy(layer), seed=3)
    layer.load_state_dict(other.state_dict(), assign=True)
    return layer


def _save_and_load(layer: InvertibleConv2d) -> InvertibleConv2d:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = InvertibleConv2d(
        layer.num_channels,
        layer.kernel_size,
        corners=layer.corners,
        dilation=layer.dilation,
        diagonal=layer.diagonal,
        bias=layer.bias is not None,
    ).to(layer.raw_weight)
    other.load_state_dict(torch.load(file))
    assert all(map(torch.equal, other.state_dict().values(), layer.state_dict().values()))
    return other


def _new_data(layer: InvertibleConv2d) -> InvertibleConv2d:
    other = trained(copy.deepcopy(layer), seed=4)
    for parameter, new in zip(layer.parameters(), other.parameters(), strict=True):
        parameter.data = new.data
    return layer


def _on_meta_and_back(layer: InvertibleConv2d) -> InvertibleConv2d:
    device = layer.raw_weight.device
    layer = layer.to("meta").to_empty(device=device)
    layer.reset_parameters()
    return layer


def _functional_call(layer: InvertibleConv2d) -> InvertibleConv2d:
    parameters = dict(trained(copy.deepcopy(layer), seed=5).named_parameters())
    torch.func.functional_call(layer, parameters, (images(layer),))
    return layer


EVENTS = {
    "AdamW": _steps(torch.optim.AdamW, lr=0.02, weight_decay=0.5),
    "SGD with weight decay": _steps(torch.optim.SGD, lr=0.01, weight_decay=1.0, momentum=0.5),
    "in-place steps": _in_place,
    "in-place steps on the data": _in_place_unseen,
    "load_state_dict": _load_state_dict,
    "load_state_dict, assigned": _load_assigned,
    "torch.save and load": _save_and_load,
    "new data": _new_data,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to float64": lambda layer: layer.double(),
    "to float32": lambda layer: layer.float(),
    "to bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "to channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "reset_parameters": lambda layer: (layer.reset_parameters(), layer)[1],
    "on meta and back": _on_meta_and_back,
    "functional_call": _functional_call,
    "eval": lambda layer: layer.eval(),
    "frozen and thawed": lambda layer: layer.requires_grad_(False).requires_grad_(True),
}


@every_option
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_events_leave_a_layer_whole(event, options: dict, device: str):
    layer = trained(InvertibleConv2d(4, **options)).to(device)
    check(layer)
    check(event(layer))


def test_a_file_takes_nothing_that_belongs_to_a_device():
    """torch.load may map the tensors of a pickled module to a device from which `to_empty` cannot restore them."""
    layer = InvertibleConv2d(4)
    expected, file = layer(torch.ones(1, 4, 3, 3))[0], io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, map_location="meta", weights_only=False).to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(torch.ones(1, 4, 3, 3))[0], expected)


def test_fake_parameters_of_a_layer_that_ran():
    layer = trained(InvertibleConv2d(4, diagonal="learned"))
    layer(torch.ones(1, 4, 3, 3))
    mode = FakeTensorMode()
    parameters = {name: mode.from_tensor(parameter) for name, parameter in layer.named_parameters()}
    with mode:
        output, _ = torch.func.functional_call(layer, parameters, torch.ones(1, 4, 3, 3))
    assert output.shape == (1, 4, 3, 3)


@settings(max_examples=20)
@given(names=st.lists(st.sampled_from(tuple(EVENTS)), max_size=5), options=st.sampled_from(tuple(OPTIONS)))
def test_any_history_leaves_a_layer_whole(names: list[str], options: str, device: str):
    layer = trained(InvertibleConv2d(4, **OPTIONS[options])).to(device)
    for name in names:
        layer = EVENTS[name](layer)
        check(layer)


@pytest.mark.parametrize("dtype", oracles.HALF_PRECISION, ids=str)
def test_half_precision_layers(dtype: torch.dtype, backend: str, device: str):
    layer = trained(InvertibleConv2d(8, diagonal="learned")).to(device, dtype)
    input = images(layer)
    output, log_det = layer(input)
    assert output.dtype == dtype
    assert log_det.dtype == torch.float32
    weight = layer.weight.detach().to("cpu", torch.float64)
    oracles.set_diagonal(weight, CORNERS, layer.log_diagonal.detach().cpu().double().exp())  # not rounded in between
    assert_close(output, oracles.conv(input, weight, CORNERS))
    assert_close(layer.inverse(input)[0], oracles.solve(input, weight, CORNERS))


@every_option
def test_state_dict_has_the_parameters_and_the_options(options: dict):
    layer = InvertibleConv2d(8, **options)
    expected = [
        "raw_weight",
        *(["log_diagonal"] if "diagonal" in options else []),
        *(["bias"] if "bias" in options else []),
    ]
    assert [name for name, _ in layer.named_parameters()] == expected
    assert list(layer.state_dict()) == [*expected, "_extra_state"]


def test_constructor_arguments_are_kept_and_shown():
    layer = InvertibleConv2d(6, (2, 3), corners=["BR", "T"], dilation=2, diagonal="learned", bias=True)
    assert (layer.num_channels, layer.kernel_size, layer.corners) == (6, (2, 3), ("BR", "T"))
    assert layer.dilation == (2, 2)
    assert repr(layer) == (
        "InvertibleConv2d(6, kernel_size=(2, 3), corners=('BR', 'T'), dilation=(2, 2), diagonal='learned', bias=True)"
    )
    assert repr(InvertibleConv2d(np.int64(8), np.int32(2))) == repr(InvertibleConv2d(8, 2))
    assert InvertibleConv2d(4, corners="TL").corners == ("TL",)
    assert {type(name) for name in InvertibleConv2d(4, corners=[np.str_("T"), "B"]).corners} == {str}  # files load
    for dimensions, corners in {1: STENCILS[1], 2: CORNERS, 3: CORNERS_3D}.items():
        layer = LAYERS[dimensions](8, 2)
        assert (layer.corners, layer.kernel_size, layer.dilation) == (corners, (2,) * dimensions, (1,) * dimensions)
        assert layer.raw_weight.shape == (8, 8 // len(corners), *[2] * dimensions)


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("diagonal", ["unit", "learned"])
@pytest.mark.parametrize("dimensions", LAYERS)
def test_a_direction_alone_is_one_operator(dimensions: int, diagonal: str, device: str):
    """The operator takes the raw weight and computes no other. A convolution first checks a learned diagonal."""
    layer = trained(LAYERS[dimensions](8, diagonal=diagonal, bias=True)).to(device)
    input = images(layer, size=(3, 4, 2)[:dimensions])
    expected = {"conv": layer(input)[0], "solve": layer.inverse(input)[0]}
    for name, function in (("conv", layer.convolve), ("solve", layer.solve)):
        with Operators() as run, torch.no_grad():
            output = function(input)
        assert torch.equal(output, expected[name])
        views = ("aten::unsqueeze", "aten::select.int", "aten::slice.Tensor")
        computed = [each for each in run.names if each not in views]
        assert computed[-1:] == [f"nflows_kconv::{name}"]
        assert len(computed) == 1 or (name, diagonal) == ("conv", "learned")


@pytest.mark.parametrize("dtype", [torch.float32, *oracles.HALF_PRECISION], ids=str)
def test_a_direction_of_a_unit_diagonal_is_two_operators(dtype: torch.dtype, device: str):
    """The second one makes the log-determinants."""
    layer = InvertibleConv2d(8).to(device, dtype)
    input = images(layer)
    for function in (layer, layer.inverse):
        with Operators() as run, torch.no_grad():
            function(input)
        assert len(run.names) == 2


@pytest.mark.parametrize("channels", [4, 48, 512])
@every_option
def test_starts_close_to_the_identity(options: dict, channels: int, device: str):
    torch.manual_seed(0)
    layer = InvertibleConv2d(channels, **options).to(device)
    input = images(layer, batch=2, size=(8, 8))
    output, log_det = layer(input)
    change = (output - input).std()
    assert 0.01 < change < 0.1
    assert torch.equal(log_det, torch.zeros(2, device=device))


def test_layers_differ_by_the_seed():
    layers = [(torch.manual_seed(seed), InvertibleConv2d(4))[1] for seed in (0, 0, 1)]
    assert torch.equal(layers[0].raw_weight, layers[1].raw_weight)
    assert not torch.equal(layers[0].raw_weight, layers[2].raw_weight)


@pytest.mark.parametrize("options", [{}, dict(corners="TL"), dict(diagonal="learned", bias=True)], ids=str)
def test_a_hundred_layers_invert_to_rounding(options: dict, backend: str, device: str):
    torch.manual_seed(0)
    layers = [InvertibleConv2d(12, **options).to(device) for _ in range(100)]
    input = images(layers[0], size=(8, 8))
    output = input
    with torch.no_grad():
        for layer in layers:
            output = layer(output)[0]
        assert not torch.allclose(output, input, atol=0.1)
        for layer in reversed(layers):
            output = layer.inverse(output)[0]
    # 200 roundings of either sign
    assert_close(output, input)


def test_default_dtype_and_device_are_torchs():
    torch.set_default_dtype(torch.float64)
    try:
        check(InvertibleConv2d(4, diagonal="learned", bias=True))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        layer = InvertibleConv2d(4, diagonal="learned", bias=True, max_inverse_gain=4)
        output, log_det = layer(torch.empty(3, 4, 5, 6))
    assert layer.weight.device.type == output.device.type == log_det.device.type == "meta"
    assert (output.shape, log_det.shape) == ((3, 4, 5, 6), (3,))


def test_inference_mode(backend: str, device: str):
    layer = trained(InvertibleConv2d(4, diagonal="learned")).to(device)
    with torch.inference_mode():
        check(layer)


# The computed layer.weight

IN_PLACE = {
    "init": lambda layer: nn.init.normal_(layer.weight),
    "init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "data": lambda layer: layer.weight.data.normal_(),
    "data, a part": lambda layer: operator.setitem(layer.weight.data, 0, 1.0),
    "new data": lambda layer: setattr(layer.weight, "data", torch.zeros(4, 4, 3, 3)),
    "a part": lambda layer: operator.setitem(layer.weight, 0, 1.0),
    "a view": lambda layer: layer.weight[0].view(-1).zero_(),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(4, 4, 3, 3)),
    "out": lambda layer: torch.add(torch.zeros(4, 4, 3, 3), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "*=": lambda layer: setattr(layer, "weight", operator.imul(layer.weight, 2)),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(torch.zeros(144), [layer.weight]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", IN_PLACE)
def test_the_weight_refuses_changes_in_place(change: str, mode):
    layer = InvertibleConv2d(4, corners="TL", diagonal="learned")
    before = layer.weight.detach().clone()
    with mode(), pytest.raises(RuntimeError, match=r"computed from raw_weight; .* layer.weight|out=\.\.\. argument"):
        IN_PLACE[change](layer)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "tool",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrizations.weight_norm(layer, "weight"),
        lambda layer: parametrizations.spectral_norm(layer, "weight"),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_weight_is_no_parameter(tool):
    layer = InvertibleConv2d(4)
    computed = "computed from the parameter raw_weight"
    with pytest.raises((TypeError, ValueError), match=f"{computed}|does not have a parameter.* 'weight'"):
        tool(layer)
    check(layer)
    assert list(dict(layer.named_parameters())) == ["raw_weight"]


@pytest.mark.parametrize(
    "make", [torch.clone, nn.Parameter, torch.Tensor.double], ids=["tensor", "parameter", "float64"]
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_option
def test_the_weight_can_be_assigned(options: dict, mode, make):
    layer, other = (trained(InvertibleConv2d(4, **options), seed) for seed in (0, 7))
    with mode():
        layer.weight = make(other.weight.detach())
    torch.testing.assert_close(layer.weight, other.weight)
    check(layer)
    layer(images(layer))[0].sum().backward()
    assert layer.raw_weight.grad is not None
    wrong = layer.weight.detach().clone()
    wrong[1] = -7.0
    with pytest.raises(ValueError, match="must be"):
        layer.weight = wrong
    masked = oracles.masked(layer.raw_weight.shape, layer.corners)
    if masked.any():
        with pytest.raises(ValueError, match=f"must be zero where it is masked .* got {masked.sum()} nonzero entries"):
            layer.weight = layer.weight.detach().masked_fill(masked, 0.1)
    with pytest.raises(TypeError, match="weight must be a tensor, got int"):
        layer.weight = 1
    torch.testing.assert_close(layer.weight, other.weight)


def test_what_is_computed_from_the_weight_is_plain():
    layer = trained(InvertibleConv2d(4, corners="TL"))
    input = images(layer)
    assert_close(functional.conv2d(input, layer.weight, corners="TL"), layer(input)[0])
    (gradient,) = torch.autograd.grad(layer.weight.square().sum(), layer.raw_weight)
    assert gradient.abs().max() > 0
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    results = {
        "saved": torch.load(file),
        "copied": copy.deepcopy(layer.weight.detach()),
        "product": layer.weight * 2,
        "detached": layer.weight.detach(),
        "vmap": torch.func.vmap(lambda scale: layer.weight * scale)(torch.ones(2)),
        "compiled": torch.compile(lambda: layer.weight * 2, backend="eager", fullgraph=True)(),
        "of a compiled function": torch.compile(lambda w: w * 2, backend="eager", fullgraph=True)(layer.weight),
    }
    assert {name: type(result) for name, result in results.items()} == dict.fromkeys(results, torch.Tensor)
    (grad,) = torch.func.grad(lambda raw: torch.func.functional_call(_Weight(layer), {"layer.raw_weight": raw}, ()))(
        layer.raw_weight.detach()
    ).unsqueeze(0)
    assert_close(grad, gradient)


class _Weight(nn.Module):
    def __init__(self, layer: InvertibleConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.weight.square().sum()
