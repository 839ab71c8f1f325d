"""Files: what is saved can be loaded anywhere, what cannot be loaded changes nothing, and what is strange is said."""

import copy
import io
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d, functional

LAYERS = {
    "unit": {},
    "learned, bias": dict(diagonal="learned", bias=True),
    "one corner, bounded": dict(corners="BR", max_inverse_gain=2),
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
CLASSES = [InvertibleConv2d, nflows_kconv.nflows.InvertibleConv2d, nflows_kconv.normflows.InvertibleConv2d]


def trained(layer: InvertibleConv2d) -> InvertibleConv2d:
    """The layer after steps with weight decay."""
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


def refused(module: nn.Module, state_dict: dict[str, Any], match: str, **options: Any) -> None:
    """Asserts that loading raises this one error and leaves the module as it was."""
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
    layer, other = trained(saving(4, **options)), loading(4, **options)
    other.load_state_dict(through_a_file(layer.state_dict()))
    assert torch.equal(other.weight, layer.weight)
    assert list(other.state_dict()) == list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]


@pytest.mark.parametrize("library", [nflows_kconv.nflows, nflows_kconv.normflows], ids=["nflows", "normflows"])
def test_files_of_image_flows(library):
    options = dict(levels=2, steps=1, hidden_channels=4, corners=(("TL",), ("BR",)), diagonal="learned", num_classes=3)
    flow, other = (library.finc_flow((1, 8, 8), **options) for _ in range(2))
    with torch.no_grad():
        for layer in flow.modules():
            if isinstance(layer, InvertibleConv2d):
                layer.log_diagonal.normal_()
    other.load_state_dict(through_a_file(flow.state_dict()))
    for name, value in other.state_dict().items():
        assert torch.equal(value, flow.state_dict()[name]), name
    wrong = library.finc_flow((1, 8, 8), **options | dict(corners=(("TL",), ("TL",))))
    with pytest.raises(RuntimeError, match=r"0\.steps\.1: the corners must be the layer's \('TL',\), got \('BR',\)"):
        wrong.load_state_dict(through_a_file(flow.state_dict()))


@every_layer
def test_the_metadata_says_what_the_tensors_do_not(options: dict):
    layer = InvertibleConv2d(4, **options)
    for state_dict in (layer.state_dict(), through_a_file(layer.state_dict())):
        assert state_dict._metadata[""] == dict(
            version=1, corners=layer.corners, max_inverse_gain=layer.max_inverse_gain
        )


@every_layer
def test_state_dicts_without_metadata(options: dict):
    """As another file format has them, or a plain dictionary."""
    layer, other = trained(InvertibleConv2d(4, **options)), InvertibleConv2d(4, **options)
    other.load_state_dict(dict(layer.state_dict()))
    assert torch.equal(other.weight, layer.weight)


def test_masked_entries_are_ignored_with_a_warning():
    layer, other = trained(InvertibleConv2d(4, corners="TL")), nn.Sequential(InvertibleConv2d(4, corners="TL"))
    state_dict = layer.state_dict()
    masked = oracles.masked((4, 4, 3, 3), ["TL"])
    state_dict["raw_weight"] = torch.where(masked, 0.1, state_dict["raw_weight"])
    state_dict["raw_weight"][2, 2, 2, 2] = 0.9  # on the diagonal
    with pytest.warns(
        UserWarning, match=r"^0\.raw_weight has 7 entries other than zero on or above the pivot's diagonal"
    ):
        other.load_state_dict({f"0.{name}": value for name, value in state_dict.items()})
    assert torch.equal(other[0].weight, layer.weight)


def test_nothing_is_said_of_ordinary_layers():
    """Weight decay leaves the masked entries at zero."""
    layer = trained(InvertibleConv2d(4, diagonal="learned"))
    InvertibleConv2d(4, diagonal="learned").load_state_dict(layer.state_dict())


@pytest.mark.parametrize(("saved", "loading"), [(2, None), (None, 2), (2, 3)])
def test_another_bound_is_loaded_with_a_warning(saved: float | None, loading: float | None):
    layer, other = (InvertibleConv2d(4, max_inverse_gain=gain) for gain in (saved, loading))
    with pytest.warns(UserWarning, match=r"^raw_weight was saved with max_inverse_gain=.* and is loaded with"):
        other.load_state_dict(layer.state_dict())
    assert torch.equal(other.raw_weight, layer.raw_weight)


# A weight as F.conv2d takes it


def plain(layer: InvertibleConv2d) -> OrderedDict[str, Tensor]:
    """What a module with `functional.conv2d` and a parameter `weight` would save."""
    weight = layer.weight.detach() + 0.1 * oracles.masked(layer.raw_weight.shape, layer.corners)
    return OrderedDict(weight=weight) if layer.bias is None else OrderedDict(weight=weight, bias=layer.bias.detach())


@every_layer
@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights(options: dict, strict: bool):
    layer, other = trained(InvertibleConv2d(8, **options)), nn.Sequential(InvertibleConv2d(8, **options))
    state_dict = {f"0.{name}": value for name, value in plain(layer).items()}
    masked = int(oracles.masked(layer.raw_weight.shape, layer.corners).sum())
    with pytest.warns(UserWarning, match=rf"^0\.raw_weight has {masked} entries other than zero"):
        other.load_state_dict(state_dict, strict=strict)
    assert "0.weight" in state_dict  # the caller's is as it was
    torch.testing.assert_close(other[0].weight, layer.weight)
    input = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(
        other[0](input)[0], functional.conv2d(input, state_dict["0.weight"], layer.corners, layer.bias)
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
    "groups": (
        lambda: dict(InvertibleConv2d(4, corners="TL", bias=True).state_dict()),
        "got {'raw_weight': (4, 4, 3, 3)",
    ),
    "corners": (
        lambda: InvertibleConv2d(4, corners=("TL", "TR", "BR", "BL"), bias=True).state_dict(),
        "the corners must be the layer's ('TL', 'TR', 'BL', 'BR'), got ('TL', 'TR', 'BR', 'BL')",
    ),
    "plain weight": (
        lambda: {"weight": torch.zeros(4, 4, 3, 3), "bias": torch.zeros(4)},
        "weight must have shape (4, 1, 3, 3), got (4, 4, 3, 3)",
    ),
}


@pytest.mark.parametrize(("state_dict", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(state_dict: Callable[[], dict[str, Any]], message: str):
    refused(trained(InvertibleConv2d(4, bias=True)), state_dict(), re.escape(message))


def test_versions_of_later_releases_are_refused():
    layer = InvertibleConv2d(4)
    state_dict = trained(InvertibleConv2d(4)).state_dict()
    state_dict._metadata[""]["version"] = 2
    message = "state_dict: the version must be at most 1, got 2 from a later release of nflows-kconv"
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


def test_layers_on_meta_are_assigned_files():
    layer = trained(InvertibleConv2d(4, diagonal="learned"))
    with torch.device("meta"):
        other = InvertibleConv2d(4, diagonal="learned")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.weight, layer.weight)
    other.to("meta").load_state_dict(
        {name: value.to("meta") for name, value in layer.state_dict().items()}, assign=True
    )
