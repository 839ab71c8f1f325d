"""State_dicts: saved ones load anywhere, refused ones change nothing, and unusual ones give a warning."""

import copy
import io
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.torchflows
from nflows_kconv import InvertibleConv2d, InvertibleConv3d, functional
from nflows_kconv.flows import steps

LAYERS = {
    "unit": {},
    "learned, bias": dict(diagonal="learned", bias=True),
    "one corner, bounded": dict(corners="BR", max_inverse_gain=2),
    "sides, dilated": dict(corners=("T", "R"), dilation=(2, 1)),
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
CLASSES = [
    InvertibleConv2d,
    *(getattr(nflows_kconv, name).InvertibleConv2d for name in ("distributions", "nflows", "normflows")),
]


def trained(layer: InvertibleConv2d) -> InvertibleConv2d:
    """Returns the layer after steps with weight decay."""
    optimizer = torch.optim.AdamW(layer.parameters(), 0.05, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(2, layer.num_channels, 5, 5))[0].square().mean().backward()
        optimizer.step()
    return layer


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors_alone(layer: nn.Module) -> dict[str, Any]:
    """Returns the state_dict as in files of earlier versions without metadata."""
    return {name: value for name, value in layer.state_dict().items() if name != "_extra_state"}


def refused(module: nn.Module, state_dict: dict[str, Any], match: str, **options: Any) -> None:
    """Asserts that loading raises only this error and leaves the module unchanged."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=match) as raised:
        module.load_state_dict(state_dict, **options)
    assert len(str(raised.value).splitlines()) == 2  # torch's heading and ours
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@every_layer
@pytest.mark.parametrize("saving", CLASSES, ids=lambda each: each.__module__)
@pytest.mark.parametrize("loading", CLASSES, ids=lambda each: each.__module__)
def test_files_move_between_libraries(saving: type, loading: type, options: dict):
    layer = trained(InvertibleConv2d(4, **options))
    saved = saving(4, **options)
    saved.load_state_dict(layer.state_dict())
    names = [*dict(layer.named_parameters()), "_extra_state"]
    for state_dict in (through_a_file(saved.state_dict()), tensors_alone(saved)):
        other = loading(4, **options)
        other.load_state_dict(state_dict)
        assert torch.equal(other.weight, layer.weight)
        assert list(other.state_dict()) == list(saved.state_dict()) == names


@every_layer
def test_the_metadata_says_what_the_tensors_do_not(options: dict):
    layer = InvertibleConv2d(4, **options)
    for state_dict in (layer.state_dict(), through_a_file(layer.state_dict())):
        assert state_dict._metadata[""] == dict(
            version=1, corners=layer.corners, dilation=layer.dilation, max_inverse_gain=layer.max_inverse_gain
        )


OTHERS = {
    "corners": (dict(corners="TL"), "corners must match the layer's ('BR',), got ('TL',)"),
    "side": (dict(corners="T"), "corners must match the layer's ('BR',), got ('T',)"),
    "dilation": (dict(corners="BR", dilation=(1, 2)), "dilation must match the layer's (1, 1), got (1, 2)"),
}


@pytest.mark.parametrize("saving", CLASSES, ids=lambda each: each.__module__)
@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_safetensors_keep_corners_and_dilation(saving: type, options: dict, message: str, tmp_path: Path):
    save_file(saving(4, 1, **options).state_dict(), tmp_path / "layer")  # its zeros do not identify the corner
    saved = load_file(tmp_path / "layer")
    InvertibleConv2d(4, 1, **options).load_state_dict(saved)
    refused(InvertibleConv2d(4, 1, corners="BR"), saved, re.escape(message))


NO_JSON = [torch.zeros(3), torch.tensor([255], dtype=torch.uint8), {}, torch.tensor(7)]


@pytest.mark.parametrize("extra", NO_JSON, ids=str)
def test_damaged_extra_states_are_refused(extra: Any):
    layer = InvertibleConv2d(4)
    saved = dict(layer.state_dict(), _extra_state=extra)
    refused(layer, saved, "state_dict: extra state must be JSON bytes, got damaged data")


def test_masked_entries_are_ignored_with_a_warning():
    layer, other = trained(InvertibleConv2d(4, corners="TL")), nn.Sequential(InvertibleConv2d(4, corners="TL"))
    state_dict = layer.state_dict()
    masked = oracles.masked((4, 4, 3, 3), ["TL"])
    state_dict["raw_weight"] = torch.where(masked, 0.1, state_dict["raw_weight"])
    state_dict["raw_weight"][2, 2, 2, 2] = 0.9  # on the diagonal
    with pytest.warns(UserWarning, match=r"^0\.raw_weight has 7 nonzero entries that the layer ignores"):
        other.load_state_dict({f"0.{name}": value for name, value in state_dict.items()})
    assert torch.equal(other[0].weight, layer.weight)


@pytest.mark.parametrize(("saved", "loading"), [(2, None), (None, 2), (2, 3)])
def test_another_bound_is_loaded_with_a_warning(saved: float | None, loading: float | None):
    layer, other = (InvertibleConv2d(4, max_inverse_gain=gain) for gain in (saved, loading))
    with pytest.warns(UserWarning, match=r"^raw_weight was saved with max_inverse_gain=.* but is loaded with"):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(other.raw_weight, layer.raw_weight)


# A weight as F.conv2d takes it


def plain(layer: InvertibleConv2d) -> OrderedDict[str, Tensor]:
    """Returns the state_dict of a module with `functional.conv2d` and a parameter `weight`."""
    weight = layer.weight.detach() + 0.1 * oracles.masked(layer.raw_weight.shape, layer.corners)
    return OrderedDict(weight=weight) if layer.bias is None else OrderedDict(weight=weight, bias=layer.bias.detach())


@every_layer
@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights(options: dict, strict: bool):
    layer, other = trained(InvertibleConv2d(8, **options)), nn.Sequential(InvertibleConv2d(8, **options))
    state_dict = {f"0.{name}": value for name, value in plain(layer).items()}
    masked = int(oracles.masked(layer.raw_weight.shape, layer.corners).sum())
    with pytest.warns(UserWarning, match=rf"^0\.raw_weight has {masked} nonzero entries"):
        other.load_state_dict(state_dict, strict=strict)
    assert "0.weight" in state_dict  # the caller's dictionary is unchanged
    torch.testing.assert_close(other[0].weight, layer.weight)
    input = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(
        other[0](input)[0],
        functional.conv2d(input, state_dict["0.weight"], layer.bias, corners=layer.corners, dilation=layer.dilation),
    )


@pytest.mark.parametrize(
    ("diagonal", "value", "required"), [("unit", 0.9, "1"), ("learned", 0.0, "positive"), ("learned", -1.0, "positive")]
)
def test_plain_weights_of_another_diagonal(diagonal: str, value: float, required: str):
    layer = InvertibleConv2d(4, corners="TL", diagonal=diagonal)
    state_dict = plain(layer)
    state_dict["weight"][1, 1, 2, 2] = value
    message = f"the pivot's diagonal must be {required} for diagonal='{diagonal}', got {value:g}"
    refused(layer, state_dict, message)


# What cannot be loaded

REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "kernel": (
        lambda: InvertibleConv2d(4, 2, bias=True).state_dict(),
        "shapes must be {'raw_weight': (4, 1, 3, 3), 'bias': (4,)} for InvertibleConv2d(4, kernel_size=(3, 3), "
        "corners=('TL', 'TR', 'BL', 'BR'), diagonal='unit', bias=True), got {'raw_weight': (4, 1, 2, 2), 'bias': (4,)}",
    ),
    "channels": (lambda: InvertibleConv2d(8, bias=True).state_dict(), "got {'raw_weight': (8, 2, 3, 3), 'bias': (8,)}"),
    "groups": (lambda: tensors_alone(InvertibleConv2d(4, corners="TL", bias=True)), "got {'raw_weight': (4, 4, 3, 3)"),
    "corners": (
        lambda: InvertibleConv2d(4, corners=("TL", "TR", "BR", "BL"), bias=True).state_dict(),
        "corners must match the layer's ('TL', 'TR', 'BL', 'BR'), got ('TL', 'TR', 'BR', 'BL')",
    ),
    "sides": (
        lambda: InvertibleConv2d(4, corners=("T", "TR", "BL", "BR"), bias=True).state_dict(),
        "corners must match the layer's ('TL', 'TR', 'BL', 'BR'), got ('T', 'TR', 'BL', 'BR')",
    ),
    "dilation": (
        lambda: InvertibleConv2d(4, dilation=(1, 2), bias=True).state_dict(),
        "dilation must match the layer's (1, 1), got (1, 2)",
    ),
    "dimensions": (
        lambda: tensors_alone(InvertibleConv3d(4, corners=("NTL",) * 4, bias=True)),
        "got {'raw_weight': (4, 1, 3, 3, 3), 'bias': (4,)}",
    ),
    "plain weight": (
        lambda: {"weight": torch.zeros(4, 4, 3, 3), "bias": torch.zeros(4)},
        "weight must have shape (4, 1, 3, 3), got (4, 4, 3, 3)",
    ),
    "no weight": (lambda: {"weight": None, "bias": torch.zeros(4)}, "weight must be a tensor, got NoneType"),
    "array": (lambda: {"raw_weight": torch.zeros(4, 1, 3, 3).numpy()}, "raw_weight must be a tensor, got ndarray"),
    "sparse": (
        lambda: {"raw_weight": torch.zeros(4, 1, 3, 3).to_sparse(), "bias": torch.zeros(4)},
        "raw_weight must be a dense tensor, got layout torch.sparse_coo",
    ),
    "sparse weight": (
        lambda: {"weight": torch.zeros(4, 1, 3, 3).to_sparse()},
        "weight must be a dense tensor, got layout torch.sparse_coo",
    ),
    "weight without values": (
        lambda: {"weight": torch.zeros(4, 1, 3, 3, device="meta")},
        "weight must have values, got a meta tensor",
    ),
}


@pytest.mark.parametrize(("state_dict", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(state_dict: Callable[[], dict[str, Any]], message: str):
    refused(trained(InvertibleConv2d(4, bias=True)), state_dict(), re.escape(message))


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ("TL", "BR"),
        (("TL", "TR", "BL", "BR"), ("TL", "TR", "BR", "BL")),
        (("BL", "TL"), ("BL", "BL")),
        (("T", "L"), ("T", "B")),
        (("TL", "T"), ("TL", "R")),
    ],
)
def test_other_corners_are_known_without_metadata(saved, loading, prefix: str):
    """Zeros at the pivot show where it is."""
    saved_tensors = tensors_alone(trained(InvertibleConv2d(8, corners=saved)))
    state_dict = {prefix + name: value for name, value in saved_tensors.items()}
    layer = InvertibleConv2d(8, corners=loading)
    names = (saved,) if isinstance(saved, str) else saved
    message = re.escape(f"corners must match the layer's {layer.corners}, got a raw_weight with the zeros of {names}")
    refused(nn.Sequential(layer) if prefix else layer, state_dict, message)


@pytest.mark.parametrize("raw", [torch.zeros(4, 4, 3, 3), torch.ones(4, 4, 3, 3)], ids=["zeros", "none"])
def test_zeros_that_tell_nothing(raw: Tensor):
    layer = InvertibleConv2d(4, corners="BR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.load_state_dict({"raw_weight": raw})
    assert torch.equal(layer.raw_weight, raw)


@pytest.mark.parametrize("dilation", [1, 2])
def test_files_from_before_there_was_dilation(dilation: int):
    """Their metadata has only the corners, and their layers were not dilated."""
    layer, other = trained(InvertibleConv2d(4)), InvertibleConv2d(4, dilation=dilation)
    state_dict = layer.state_dict()
    del state_dict._metadata[""]["dilation"]
    if dilation == 1:
        other.load_state_dict(state_dict)
        assert torch.equal(other.weight, layer.weight)
    else:
        refused(other, state_dict, re.escape("dilation must match the layer's (2, 2), got (1, 1)"))


def test_versions_of_later_releases_are_refused():
    layer = InvertibleConv2d(4)
    state_dict = trained(InvertibleConv2d(4)).state_dict()
    state_dict._metadata[""]["version"] = 2
    message = "state_dict: version must be at most 1, got 2, from a later release of nflows-kconv"
    for each in (state_dict, through_a_file(state_dict)):
        refused(layer, each, message)
        refused(layer, each, message, strict=False)


def test_missing_and_further_names_are_torchs_errors():
    layer, other = trained(InvertibleConv2d(4, bias=True)), InvertibleConv2d(4, bias=True)
    state_dict = {"raw_weight": layer.raw_weight, "other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.* "bias".*Unexpected key.* "other"'):
        other.load_state_dict(state_dict)
    other.load_state_dict(state_dict, strict=False)
    assert torch.equal(other.weight, layer.weight)
    assert not other.bias.any()


# The layer follows the parameters, however they are set

OPTIONS = dict(diagonal="learned", bias=True)
ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "core": lambda: InvertibleConv2d(4, **OPTIONS),
    "nflows": lambda: nflows_kconv.nflows.InvertibleConv2d(4, **OPTIONS),
    "normflows": lambda: nflows_kconv.normflows.InvertibleConv2d(4, **OPTIONS),
    "freia": lambda: nflows_kconv.freia.InvertibleConv2d([(4, 5, 5)], **OPTIONS),
    "torchflows": lambda: nflows_kconv.torchflows.InvertibleConv2d((4, 5, 5), **OPTIONS),
    "distributions": lambda: nflows_kconv.distributions.InvertibleConv2d(4, cache_size=1, **OPTIONS),
    "steps": lambda: steps.Sequence([steps.ActNorm(4), steps.InvertibleConv1x1(4), steps.learned_prior(4)]),
    **{
        f"flow of {library.__name__}": lambda library=library, **options: library.finc_flow(
            (4, 4, 4), 1, 1, hidden_channels=4, preprocessing=None, **options
        )
        for library in (nflows_kconv.nflows, nflows_kconv.normflows)
    },
}
ADAPTERS |= {f"{name}, classes": partial(build, num_classes=3) for name, build in ADAPTERS.items() if "flow of" in name}


def both_directions(module: nn.Module) -> list[Tensor]:
    input = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(next(module.parameters()))
    if isinstance(module, torch.distributions.Transform):
        return [module(input), module.inv(input), module.log_abs_det_jacobian(input, input)]
    if isinstance(module, nflows_kconv.freia.InvertibleConv2d):
        (output,), log_abs_det = module([input])
        return [output, module([input], rev=True)[0][0], log_abs_det]
    if hasattr(module, "architecture"):  # an image flow
        input = input[..., :4, :4]
        classes = None if module.architecture.num_classes is None else torch.tensor([0, 2, 1])
        latent, log_abs_det = module.encode(input, classes)
        torch.manual_seed(2)
        samples = copy.deepcopy(module).float().sample(3, classes)
        samples = samples[0] if isinstance(samples, tuple) else samples  # normflows also returns the log-density
        return [latent, log_abs_det, module.decode(latent, classes), module.log_prob(input, classes), samples.detach()]
    return [*module(input), *module.inverse(input)]


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def fake(build: Callable[[], nn.Module]) -> nn.Module:
    with FakeTensorMode():
        return build()


def emptied(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a module with uninitialised memory."""
    module = on_meta(build).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
    return module


def in_place(module: nn.Module, source: nn.Module) -> nn.Module:
    with torch.no_grad():
        for one, two in zip(tensors_of(module), tensors_of(source), strict=True):
            one.copy_(two)
    return module


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def loaded(module: nn.Module, source: nn.Module, **options: Any) -> nn.Module:
    module.load_state_dict(source.state_dict(), **options)
    return module


def used_in_inference_mode(module: nn.Module) -> nn.Module:
    with torch.inference_mode():
        both_directions(module)
    both_directions(module)[0].sum().backward()
    return module


WAYS: dict[str, Callable[[Callable[[], nn.Module], nn.Module], nn.Module]] = {
    "to_empty": lambda build, source: loaded(emptied(build), source),
    "assigned to meta": lambda build, source: loaded(on_meta(build), source, assign=True),
    "assigned": lambda build, source: loaded(build(), source, assign=True),
    "assigned, float64": lambda build, source: loaded(build(), copy.deepcopy(source).double(), assign=True),
    "fake": lambda build, source: loaded(fake(build), source, assign=True),
    "in place": lambda build, source: in_place(build(), source),
    "in place after to_empty": lambda build, source: in_place(emptied(build), source),
    "float64 and back": lambda build, source: loaded(build(), source).double().float(),
    "deepcopy": lambda build, source: copy.deepcopy(source),
    # In float64, for which a layer makes its masks at the first call.
    "inference mode": lambda build, source: used_in_inference_mode(loaded(build(), source).double()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_but_the_state_counts(adapter: str, way: str):
    torch.manual_seed(0)
    build = ADAPTERS[adapter]
    source = build()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masked entries are nonzero
        other = WAYS[way](build, source)
    both_directions(other)  # the first call may initialise
    expected = both_directions(source)
    for actual, value in zip(both_directions(other), expected, strict=True):
        torch.testing.assert_close(actual.float(), value, atol=1e-5, rtol=1e-4)


def test_files_of_earlier_versions():
    """Their layers had masks as unsaved buffers, and their ActNorm had another flag."""
    keys = {
        InvertibleConv2d(4, **OPTIONS): ["raw_weight", "log_diagonal", "bias", "_extra_state"],
        steps.ActNorm(4): ["log_scale", "shift", "initialized"],
        steps.InvertibleConv1x1(4): ["lower", "upper", "log_scale", "permutation", "sign"],
    }
    for module, names in keys.items():
        assert sorted(module.state_dict()) == sorted(names)


def of_earlier_versions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the state_dict as it was when ActNorm had a boolean, and the 1 x 1 convolution indices."""
    return {
        name: value.bool() if name.endswith("initialized") else value.argmax(1) if "permutation" in name else value
        for name, value in state_dict.items()
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name == "steps" or "flow of" in name])
def test_buffers_of_earlier_versions(adapter: str, assign: bool):
    source, other = ADAPTERS[adapter](), ADAPTERS[adapter]()
    both_directions(source)
    saved = of_earlier_versions(through_a_file(source.state_dict()))
    assert {value.dtype for value in saved.values()} >= {torch.bool, torch.int64}
    other.load_state_dict(saved, assign=assign)
    assert all(map(torch.equal, both_directions(other), both_directions(source)))
    for name, value in other.state_dict().items():
        assert value.dtype == source.state_dict()[name].dtype, name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_emptied_modules_can_be_reset(adapter: str):
    module = emptied(ADAPTERS[adapter])
    for each in module.modules():
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    if adapter.startswith("flow of nflows_kconv.normflows"):
        return  # its distributions have buffers that nothing resets
    assert all(tensor.isfinite().all() for tensor in both_directions(module))
    assert not any(
        norm.initialized and norm.shift.eq(0).all() for norm in module.modules() if isinstance(norm, steps.ActNorm)
    )


def test_meta_takes_meta():
    layer = InvertibleConv2d(4, diagonal="learned").to("meta")
    layer.load_state_dict(layer.state_dict(), assign=True)
