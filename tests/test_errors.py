"""Errors for wrong arguments: each says in one sentence what must hold and what was got."""

import re
from typing import NamedTuple

import pytest
import torch
from cases import CORNERS, STENCILS

import nflows_kconv.distributions
import nflows_kconv.freia
import nflows_kconv.nflows
import nflows_kconv.normflows
import nflows_kconv.torchflows
from nflows_kconv import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d, use_backend
from nflows_kconv.diagnostics import round_trip
from nflows_kconv.flows import reversible, steps
from nflows_kconv.flows.images import Logit, bits_per_dim, to_uint8
from nflows_kconv.flows.sampling import GraphSampler
from nflows_kconv.functional import conv1d, conv1d_inverse, conv2d, conv2d_inverse, conv3d, conv3d_inverse, log_abs_det

NAN, INF = float("nan"), float("inf")


class Wrong(NamedTuple):
    """An argument to replace, and what the error must be."""

    arguments: dict
    error: type[Exception]
    match: str


def images(channels: int = 8, **options) -> torch.Tensor:
    return torch.zeros(2, channels, 4, 5, **options)


def weight(per_group: int = 2, **options) -> torch.Tensor:
    return torch.eye(per_group, **options).repeat(4, 1)[..., None, None].repeat(1, 1, 3, 3)


_STENCILS = STENCILS[2]
CORNERS_ERRORS = {
    "unknown name": Wrong(
        dict(corners=("TL", "M", "BL", "BR")),
        ValueError,
        f"one or more of {_STENCILS} in 2 dimensions, got ('TL', 'M', 'BL', ",
    ),
    "lower case": Wrong(dict(corners="tl"), ValueError, f"one or more of {_STENCILS} in 2 dimensions, got 'tl'"),
    "concatenated corners": Wrong(dict(corners="TLBR"), ValueError, "got 'TLBR'"),
    "of three dimensions": Wrong(dict(corners="NTL"), ValueError, "in 2 dimensions, got 'NTL'"),
    "no corner": Wrong(dict(corners=()), ValueError, f"one or more of {_STENCILS} in .*, got ()"),
    "empty string": Wrong(dict(corners=""), ValueError, f"one or more of {_STENCILS} in .*, got ''"),
    "integers": Wrong(
        dict(corners=(0, 1, 2, 3)), TypeError, f"a sequence of strings out of {_STENCILS}, got (0, 1, 2, 3)"
    ),
    "one integer": Wrong(dict(corners=0), TypeError, f"a string or a sequence of strings out of {_STENCILS}, got 0"),
    "a set": Wrong(
        dict(corners={"TL"}), TypeError, f"a string or a sequence of strings out of {_STENCILS}, got {{'TL'}}"
    ),
}
# For a layer None means all corners.
NO_CORNERS_ERRORS = {
    "no corners": Wrong(dict(corners=None), TypeError, f"a sequence of strings out of {_STENCILS}, got None")
}
DILATION_ERRORS = {
    "dilation 0": Wrong(dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
    "negative dilation": Wrong(dict(dilation=(1, -2)), ValueError, "dilation must be at least 1, got -2"),
    "huge dilation": Wrong(dict(dilation=10**30), ValueError, "dilation must be at most 9223372036854775807"),
    "boolean dilation": Wrong(dict(dilation=True), TypeError, "dilation must be an integer, got True"),
    "fractional dilation": Wrong(dict(dilation=2.0), TypeError, "dilation must be an integer, got 2.0"),
    "dilation None": Wrong(dict(dilation=None), TypeError, "dilation must be an integer, got None"),
    "dilation a string": Wrong(dict(dilation="12"), TypeError, "dilation must be an integer, got '12'"),
    "dilation of one axis": Wrong(
        dict(dilation=(2,)), ValueError, "dilation must be an integer or one per axis, 2 in all, got (2,)"
    ),
    "dilation of three axes": Wrong(dict(dilation=(1, 1, 1)), ValueError, "one per axis, 2 in all, got (1, 1, 1)"),
}
WEIGHT_ERRORS = {
    "weight a number": Wrong(dict(weight=1.0), TypeError, "weight must be a tensor, got float"),
    "weight None": Wrong(dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    "weight of integers": Wrong(
        dict(weight=weight(dtype=torch.int32)), TypeError, "weight must have one of the dtypes .*, got torch.int32"
    ),
    "weight without taps": Wrong(dict(weight=weight()[..., :0]), ValueError, "no size 0, .*, got (8, 2, 3, 0)"),
    "weight without channels": Wrong(dict(weight=weight()[:0]), ValueError, "no size 0, .*, got (0, 2, 3, 3)"),
    "corners of other groups": Wrong(
        dict(corners=("TL", "BR")), ValueError, "[C, C/G, kh, kw], .*, for G = 2 corners, got (8, 2, 3, 3)"
    ),
}
INPUT_ERRORS = {
    "weight of rank 3": Wrong(
        dict(weight=weight()[..., 0]), ValueError, "weight must have shape [C, C/G, kh, kw], .*, got (8, 2, 3)"
    ),
    "input of rank 3": Wrong(
        dict(input=images()[0]), ValueError, "input must have the 4 dimensions [B, C, H, W], got shape (8, 4, 5)"
    ),
    "input of rank 5": Wrong(dict(input=images()[None]), ValueError, "[B, C, H, W], got shape (1, 2, 8, 4, 5)"),
    "input's channels": Wrong(
        dict(input=images(4), bias=torch.zeros(4)),
        ValueError,
        "input must have the weight's 8 channels, got 4 in shape (2, 4, 4, 5)",
    ),
    "input an array": Wrong(dict(input=images().numpy()), TypeError, "input must be a tensor, got ndarray"),
    "input a list": Wrong(dict(input=[1.0]), TypeError, "input must be a tensor, got list"),
    "input of integers": Wrong(
        dict(input=images(dtype=torch.int64)), TypeError, "input must have one of the dtypes .*, got torch.int64"
    ),
    "input of booleans": Wrong(
        dict(input=images(dtype=torch.bool)), TypeError, "input must have one of the dtypes .*, got torch.bool"
    ),
    "complex input": Wrong(
        dict(input=images(dtype=torch.complex64)), TypeError, "one of the dtypes torch.float32, .*, got torch.complex64"
    ),
    "weight's dtype": Wrong(
        dict(weight=weight(dtype=torch.float64)),
        TypeError,
        "input and weight must have the same dtype, got torch.float32 and torch.float64",
    ),
    "weight's half precision": Wrong(
        dict(weight=weight(dtype=torch.float16)),
        TypeError,
        "input and weight must have the same dtype, got torch.float32 and torch.float16",
    ),
    "weight's device": Wrong(
        dict(weight=weight(device="meta")), ValueError, "input and weight must be on the same device, got cpu and meta"
    ),
    "bias of rank 2": Wrong(dict(bias=torch.zeros(8, 1)), ValueError, "bias must have shape (8,), got (8, 1)"),
    "bias of other channels": Wrong(dict(bias=torch.zeros(2)), ValueError, "bias must have shape (8,), got (2,)"),
    "bias of rank 0": Wrong(dict(bias=torch.tensor(1.0)), ValueError, "bias must have shape (8,), got ()"),
    "bias a number": Wrong(dict(bias=1.0), TypeError, "bias must be a tensor, got float"),
    "bias of integers": Wrong(
        dict(bias=torch.arange(8)), TypeError, "bias must have one of the dtypes .*, got torch.int64"
    ),
    "bias's dtype": Wrong(
        dict(bias=torch.zeros(8).double()),
        TypeError,
        "input and bias must have the same dtype, got torch.float32 and torch.float64",
    ),
    "bias's device": Wrong(
        dict(bias=torch.zeros(8, device="meta")),
        ValueError,
        "input and bias must be on the same device, got cpu and meta",
    ),
}
LOG_DET_ERRORS = {
    "weight of rank 2": Wrong(
        dict(weight=weight()[..., 0, 0]), ValueError, "weight must have 3, 4 or 5 dimensions, .*, got shape (8, 2)"
    ),
    "weight of rank 3": Wrong(
        dict(weight=weight()[..., 0]),
        ValueError,
        "one or more of ('L', 'R') in 1 dimension, got ('TL', 'TR', 'BL', 'BR')",
    ),
    "negative height": Wrong(dict(size=(-1, 5)), ValueError, "size must not be negative, got (-1, 5)"),
    "one size": Wrong(dict(size=(4,)), ValueError, "size must have the 2 numbers H, W for this weight, got (4,)"),
    "size a number": Wrong(dict(size=4), ValueError, "size must have the 2 numbers H, W for this weight, got 4"),
}
LAYER_ERRORS = {
    "channels not divisible": Wrong(
        dict(num_channels=6),
        ValueError,
        "a multiple of the number of corners, got 6 channels and the 4 corners ('TL', ",
    ),
    "no channels": Wrong(dict(num_channels=0), ValueError, "num_channels must be at least 1, got 0"),
    "negative channels": Wrong(dict(num_channels=-4), ValueError, "num_channels must be at least 1, got -4"),
    "boolean channels": Wrong(dict(num_channels=True), TypeError, "num_channels must be an integer, got True"),
    "fractional channels": Wrong(dict(num_channels=4.0), TypeError, "num_channels must be an integer, got 4.0"),
    "kernel of size 0": Wrong(dict(kernel_size=0), ValueError, "kernel_size must be at least 1, got 0"),
    "negative kernel": Wrong(dict(kernel_size=(3, -1)), ValueError, "kernel_size must be at least 1, got -1"),
    "fractional kernel": Wrong(dict(kernel_size=3.0), TypeError, "kernel_size must be an integer, got 3.0"),
    "boolean kernel": Wrong(dict(kernel_size=True), TypeError, "kernel_size must be an integer, got True"),
    "kernel of rank 3": Wrong(
        dict(kernel_size=(3, 3, 3)), ValueError, "an integer or one per axis, 2 in all, got (3, 3, 3)"
    ),
    "kernel of rank 1": Wrong(dict(kernel_size=(3,)), ValueError, "an integer or one per axis, 2 in all, got (3,)"),
    "kernel a string": Wrong(dict(kernel_size="33"), TypeError, "kernel_size must be an integer, got '33'"),
    "kernel a pair of strings": Wrong(
        dict(kernel_size=("3", "3")), TypeError, "kernel_size must be an integer, got '3'"
    ),
    "kernel None": Wrong(dict(kernel_size=None), TypeError, "kernel_size must be an integer, got None"),
    "unknown diagonal": Wrong(dict(diagonal="free"), ValueError, 'diagonal must be "unit" or "learned", got \'free\''),
    "boolean diagonal": Wrong(dict(diagonal=True), ValueError, 'diagonal must be "unit" or "learned", got True'),
}


def over(errors: dict[str, Wrong]):
    return pytest.mark.parametrize("wrong", errors.values(), ids=errors.keys())


def message(match: str) -> str:
    """Returns the pattern for a message in which `.*` stands for anything."""
    return re.escape(match).replace(r"\.\*", ".*")


@pytest.mark.parametrize("function", [conv2d, conv2d_inverse], ids=lambda function: function.__name__)
@over(CORNERS_ERRORS | NO_CORNERS_ERRORS | DILATION_ERRORS | WEIGHT_ERRORS | INPUT_ERRORS)
def test_functions(function, wrong: Wrong):
    arguments = dict(input=images(), weight=weight(), corners=CORNERS, bias=torch.zeros(8))
    function(**arguments)
    with pytest.raises(wrong.error, match=message(wrong.match)):
        function(**arguments | wrong.arguments)


@over(CORNERS_ERRORS | NO_CORNERS_ERRORS | WEIGHT_ERRORS | LOG_DET_ERRORS)
def test_log_abs_det(wrong: Wrong):
    arguments = dict(weight=weight(), corners=CORNERS, size=(4, 5))
    log_abs_det(**arguments)
    with pytest.raises(wrong.error, match=message(wrong.match)):
        log_abs_det(**arguments | wrong.arguments)


@over(CORNERS_ERRORS | DILATION_ERRORS | LAYER_ERRORS)
def test_layer(wrong: Wrong):
    arguments = dict(num_channels=8, kernel_size=3)
    InvertibleConv2d(**arguments)
    with pytest.raises(wrong.error, match=message(wrong.match)):
        InvertibleConv2d(**arguments | wrong.arguments)


OTHER_DIMENSIONS = [
    (1, dict(corners="TL"), ValueError, "one or more of ('L', 'R') in 1 dimension, got 'TL'"),
    (1, dict(corners="T"), ValueError, "one or more of ('L', 'R') in 1 dimension, got 'T'; sides need two dimensions"),
    (3, dict(corners="TL"), ValueError, "'FBL', 'FBR') in 3 dimensions, got 'TL'"),
    (3, dict(corners=("NTL", "L")), ValueError, "got ('NTL', 'L'); sides need two dimensions"),
    (1, dict(dilation=(1, 2)), ValueError, "dilation must be an integer or one per axis, got (1, 2)"),
    (3, dict(dilation=(1, 2)), ValueError, "dilation must be an integer or one per axis, 3 in all, got (1, 2)"),
    (1, dict(input=torch.zeros(2, 1, 4, 5)), ValueError, "the 3 dimensions [B, C, L], got shape (2, 1, 4, 5)"),
    (3, dict(input=torch.zeros(2, 1, 4, 5)), ValueError, "the 5 dimensions [B, C, D, H, W], got shape (2, 1, 4, 5)"),
]


@pytest.mark.parametrize(("dimensions", "wrong", "error", "match"), OTHER_DIMENSIONS)
def test_one_dimension_and_three(dimensions: int, wrong: dict, error: type[Exception], match: str):
    layer, functions = {
        1: (InvertibleConv1d, (conv1d, conv1d_inverse)),
        3: (InvertibleConv3d, (conv3d, conv3d_inverse)),
    }[dimensions]
    weight = torch.ones(1, 1, *[1] * dimensions)
    arguments = dict(input=torch.zeros(2, 1, *[4] * dimensions), corners=STENCILS[dimensions][0])
    for function in functions:
        function(weight=weight, **arguments)
        with pytest.raises(error, match=message(match)):
            function(weight=weight, **arguments | wrong)
    arguments = arguments | wrong
    input = arguments.pop("input")
    with pytest.raises(error, match=message(match)):
        layer(1, **arguments)(input)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_layers_check_their_input(inverse: bool):
    layer = InvertibleConv2d(8)
    function = layer.inverse if inverse else layer
    for input, error, match in (
        (images(6), ValueError, "input must have the weight's 8 channels, got 6"),
        (images()[0], ValueError, "input must have the 4 dimensions [B, C, H, W], got shape (8, 4, 5)"),
        (
            images(dtype=torch.float64),
            TypeError,
            "input and weight must have the same dtype, got torch.float64 and torch.float32",
        ),
        (images(device="meta"), ValueError, "input and weight must be on the same device, got meta and cpu"),
    ):
        with pytest.raises(error, match=message(match)):
            function(input)


@pytest.mark.parametrize("value", [0.0, -0.0, NAN, INF, -INF])
@pytest.mark.parametrize("channel", [0, 5, 7])
def test_diagonals_without_an_inverse(channel: int, value: float, backend: str):
    broken = weight()
    row, column = ((2, 2), (2, 0), (0, 2), (0, 0))[channel // 2]
    broken[channel, channel % 2, row, column] = value
    match = message(
        f"diagonal and its reciprocal must be finite and nonzero .*, got {value:.0f}.* in channel {channel}"
    )
    with pytest.raises(ValueError, match=match):
        log_abs_det(broken, corners=CORNERS, size=(4, 5))
    with pytest.raises(ValueError, match=match):
        conv2d_inverse(images(), broken, corners=CORNERS)
    with pytest.raises(ValueError, match=match):
        conv2d_inverse(images().double(), broken.double().requires_grad_(), corners=CORNERS)
    conv2d(images(), broken, corners=CORNERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_diagonals_without_an_inverse_in_any_dtype(dtype: torch.dtype, backend: str):
    broken = weight(dtype=dtype)
    broken[3, 1, 2, 0] = 0
    with pytest.raises(ValueError, match=message("finite and nonzero .*, got 0.* in channel 3")):
        conv2d_inverse(images(dtype=dtype), broken, corners=CORNERS)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1000.0, -1000.0])
def test_layers_with_a_broken_log_diagonal(value: float, backend: str):
    """Covers NaN and values for which the diagonal overflows or vanishes."""
    layer = InvertibleConv2d(8, diagonal="learned")
    with torch.no_grad():
        layer.log_diagonal[3] = value
    for function in (layer, layer.inverse):
        with pytest.raises(
            ValueError, match=message("diagonal and its reciprocal must be finite and nonzero .* in channel 3")
        ):
            function(images())


def test_diagonals_of_other_signs_and_sizes_are_fine():
    odd = weight()
    odd[0, 0, 2, 2], odd[1, 1, 2, 2] = -3.0, 1e-30
    conv2d_inverse(images(), odd, corners=CORNERS)
    assert log_abs_det(odd, corners=CORNERS, size=(1, 1)).isfinite()


STEPS = {
    "coupling": steps.learned_prior(4),
    "squeeze": steps.Squeeze(),
    "actnorm": steps.ActNorm(4),
    "1x1": steps.InvertibleConv1x1(4),
    "sequence": steps.Sequence([steps.InvertibleConv1x1(4), steps.ActNorm(4)]),
    "nothing": steps.Sequence([]),
    "reversible": reversible.Chain([steps.ActNorm(4)]),
    "nflows": nflows_kconv.nflows.Step(steps.ActNorm(4)),
    "nflows' 1x1": nflows_kconv.nflows.InvertibleConv1x1(4),
    "normflows": nflows_kconv.normflows.Step(steps.learned_prior(4)),
    "normflows' 1x1": nflows_kconv.normflows.InvertibleConv1x1(4),
}
INPUTS = {
    "None": None,
    "a list": [1.0],
    "an array": images(4).numpy(),
    "sparse": images(4).to_sparse(),
    "complex": images(4, dtype=torch.complex64),
    "integers": images(4, dtype=torch.int64),
    "a number": torch.tensor(1.0),
    "one dimension": torch.zeros(4),
    "other channels": images(3),
    "another device": images(4, device="meta"),
}
NO_ERRORS = {  # they have no parameters and take any number of channels
    ("squeeze", "integers"),
    ("squeeze", "another device"),
    ("nothing", "one dimension"),
    ("nothing", "other channels"),
    ("nothing", "another device"),
    ("coupling", "another device"),  # an error of its network
    ("normflows", "another device"),
}


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("name", STEPS)
def test_steps_check_their_input(name: str, input: str, inverse: bool):
    if (name, input) in NO_ERRORS:
        return
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=r"^(input must|sizes must|channels must) .*, got "):
        (STEPS[name].inverse if inverse else STEPS[name])(INPUTS[input])
    assert torch.equal(torch.get_rng_state(), state)


CONTEXTS = {
    "None": (None, TypeError, "context must be a tensor, got NoneType"),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "context must be real, got torch.complex64"),
    "one dimension": (torch.zeros(3), ValueError, "context must have shape [2, 3] or [2, 3, ...] .*, got (3,)"),
    "rows": (torch.zeros(3, 3), ValueError, "context must have shape [2, 3] or .*, got (3, 3)"),
    "length": (torch.zeros(2, 4), ValueError, "context must have shape [2, 3] or .*, got (2, 4)"),
    "sizes": (torch.zeros(2, 3, 5), ValueError, "context must have shape .* with 2 sizes, got (2, 3, 5)"),
}


@pytest.mark.parametrize(("context", "error", "match"), CONTEXTS.values(), ids=CONTEXTS.keys())
def test_couplings_check_their_context(context, error: type[Exception], match: str):
    coupling = steps.learned_prior(4, context_channels=3)
    for function in (coupling, coupling.inverse):
        with pytest.raises(error, match=message(match)):
            function(images(4), context)


def test_couplings_check_their_network():
    """One log-scale for all pixels would broadcast, and count once in the log-determinant."""
    pooled = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 1), torch.nn.AdaptiveAvgPool2d(1))
    for network, error, match in (
        (pooled, ValueError, "network must return shape (2, 4, 4, 5), got (2, 4, 1, 1)"),
        (torch.nn.Conv2d(2, 2, 1), ValueError, "network must return shape (2, 4, 4, 5), got (2, 2, 4, 5)"),
        (STEPS["nothing"], TypeError, "the output of network must be a tensor, got tuple"),
    ):
        with pytest.raises(error, match=message(match)):
            steps.AffineCoupling(network)(images(4))


ENTRIES = {
    "distributions": nflows_kconv.distributions.InvertibleConv2d(4),
    "distributions, inverse": nflows_kconv.distributions.InvertibleConv2d(4).inv,
    "torchflows": nflows_kconv.torchflows.InvertibleConv2d((4, 4, 5)),
    "FrEIA": lambda value: nflows_kconv.freia.InvertibleConv2d([(4, 4, 5)])(value),
    "FrEIA, condition": lambda value: nflows_kconv.freia.InvertibleConv2d([(4, 4, 5)])(
        [images(4)], c=1.0 if value is None else value
    ),
    "use_backend": lambda value: use_backend(value).__enter__(),
    "Logit": lambda value: Logit(value),
    "context": lambda value: nflows_kconv.distributions.ConditionalInvertibleConv2d(4, context_features=5).condition(
        value
    )(images(4)),
    "to_uint8": to_uint8,
    "bits_per_dim": lambda value: bits_per_dim(torch.zeros(2), value),
    "round_trip": lambda value: round_trip(InvertibleConv2d(4), value),
    "warmup": lambda value: nflows_kconv.warmup(InvertibleConv2d(4), value),
    "labels": lambda value: GraphSampler(nflows_kconv.nflows.finc_flow((1, 4, 4), 1, 1, num_classes=2), 2)(
        labels=torch.zeros(()) if value is None else value
    ),
}


@pytest.mark.parametrize("input", ["None", "an array", "sparse", "complex"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_other_entries_check_what_they_take(entry: str, input: str):
    with pytest.raises((TypeError, ValueError), match=r"must .*, got "):
        ENTRIES[entry](INPUTS[input])


@pytest.mark.parametrize("library", [nflows_kconv.nflows, nflows_kconv.normflows], ids=["nflows", "normflows"])
@pytest.mark.parametrize("state_dict", [None, [1.0], torch.zeros(3)], ids=repr)
def test_a_state_dict_is_one(library, state_dict):
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like"):
        library.finc_flow((1, 4, 4), 1, 1, hidden_channels=2).load_state_dict(state_dict)


def test_labels_have_values():
    with pytest.raises(ValueError, match="labels must have values, got a meta tensor"):
        ENTRIES["labels"](torch.zeros(2, dtype=torch.int64, device="meta"))
