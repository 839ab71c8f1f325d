"""The CUDA kernels against the formula, in the emulator on the CPU.

Shapes, for which kernels are compiled, come from the table here, because compiling takes longer than running;
hypothesis draws the rest. The profile "thorough" adds the table of `cases`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import cuda_emulator as emulator
import oracles
import pytest
import torch
from cases import BL, BR, CASES, CORNERS, DTYPES, LAYOUTS, MAX_UNKNOWNS, TL, TR, Case
from cuda_emulator import DECREASING, H100
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close
from torch import Tensor

from nflows_kconv.backends import reference
from nflows_kconv.backends.cuda import compiler, planning
from nflows_kconv.backends.cuda.plan import Device
from nflows_kconv.backends.registry import OperatorCall

pytestmark = emulator.needs_compiler

BOTH = (False, True)
# So small that plans need several bands, chunks and tiles for images small enough for the emulator.
SMALL = Device((8, 0), multiprocessors=2, shared_memory=48 * 1024)
FOUR = replace(H100, multiprocessors=4)

TABLE = (
    (Case(), H100),
    # Several output channels, or parts of them, per thread
    (Case((TL,), per_group=12, batch=3, size=(9, 7), biased=True), H100),
    (Case((BR, TL, TR), per_group=6, kernel_size=(2, 2), batch=9, size=(4, 4)), H100),
    (Case((BR, TL), per_group=7, batch=9, size=(6, 5), biased=True), SMALL),
    (Case((BL, TR), per_group=11, kernel_size=(5, 7), batch=3, size=(5, 6), dtype=torch.float64), SMALL),
    # Bands and chunks
    (Case((BR, TL, BL, TR, TL), per_group=3, kernel_size=(2, 3), batch=1, size=(70, 5)), H100),
    (Case((TL, BL), per_group=2, kernel_size=(3, 2), size=(1, 70), dtype=torch.float16, biased=True), H100),
    (Case((TR,), per_group=4, batch=1, size=(33, 34), dtype=torch.float64, biased=True), SMALL),
    # Clipped kernels, and kernels of many taps
    (Case((BL, TR), per_group=3, kernel_size=(9, 4), size=(3, 2), dtype=torch.bfloat16, biased=True), H100),
    (Case((BR,), per_group=1, kernel_size=(11, 9), batch=2, size=(17, 33), dtype=torch.float64), H100),
    # The smallest case
    (Case((TR,), per_group=1, kernel_size=(1, 1), batch=1, size=(1, 1)), H100),
    (Case((BL,), per_group=5, kernel_size=(1, 1), batch=33, size=(2, 3)), H100),
    # More corners than a word holds: kernels have one period of them
    (Case((TL, BR, TR) * 6, per_group=1, batch=13, size=(3, 3), biased=True), H100),
    (Case((*CORNERS * 4, BR), per_group=1, kernel_size=(2, 2), batch=1, size=(2, 3)), H100),
    # Many channels
    (Case((TL,), per_group=48, batch=2, size=(6, 5), biased=True), H100),
    (Case((TL, BR, BL, TR, TL), per_group=18, kernel_size=(2, 2), batch=2, size=(3, 4)), H100),
    (Case((BL,), per_group=18, batch=2, size=(19, 22), dtype=torch.float64), SMALL),
    (Case((BR,), per_group=33, kernel_size=(2, 2), batch=1, size=(11, 7), dtype=torch.float64), SMALL),
    (Case((BR, TL), per_group=12, kernel_size=(5, 7), batch=2, size=(5, 6), dtype=torch.float64), H100),
    (Case((BL,), per_group=68, kernel_size=(2, 1), batch=2, size=(3, 5), dtype=torch.bfloat16, biased=True), H100),
    (Case((TR,), per_group=66, kernel_size=(1, 2), batch=9, size=(5, 7), biased=True), SMALL),
    (Case((TL,), per_group=74, kernel_size=(2, 3), batch=9, size=(5, 4), biased=True), FOUR),
    (Case((BR, TL, TR, BL, BR), per_group=49, kernel_size=(3, 4), batch=1, size=(3, 4)), FOUR),
    (Case((BR,), per_group=34, kernel_size=(5, 7), batch=2, size=(5, 6), dtype=torch.float16), H100),
)
WITH_SIDES = (
    (Case(("T", "B"), kernel_size=(2, 3), biased=True), H100),
    (Case(("B",), per_group=12, kernel_size=(2, 3), size=(9, 6)), H100),
    # Bands and chunks
    (Case(("T",), kernel_size=(2, 3), batch=1, size=(70, 9)), H100),
    (Case(("B",), per_group=3, kernel_size=(3, 4), batch=1, size=(37, 34), dtype=torch.float64, biased=True), SMALL),
    (Case(("T",), per_group=1, kernel_size=(4, 5), batch=1, size=(41, 40)), SMALL),
    # Clipped kernels, and one that does not read to the right
    (Case(("T", "B"), kernel_size=(3, 7), size=(4, 3), dtype=torch.bfloat16), H100),
    (Case(("T",), kernel_size=(3, 3), size=(6, 1)), H100),
    (Case(("B",), kernel_size=(1, 5), size=(40, 6)), H100),
)
thorough = settings.default.max_examples > 100
if thorough:
    # The emulator takes minutes for these
    TABLE += tuple(
        (case, device)
        for case in CASES
        if 0 not in case.input_shape and case.per_group <= 128 and set(case.corners) <= set(CORNERS)
        if not case.dilated
        for device in (H100, SMALL)
    )


def named(value: object) -> str | None:
    if isinstance(value, Case):
        return "x".join(map(str, value.input_shape))
    return f"{value.multiprocessors}SMs" if isinstance(value, Device) else None


# A row runs A or A^T, which differ in the strides that a kernel sees: `test_sources_know_transposes_in_one_place`.
OPERATORS = tuple(
    (case, device, operation, transpose)
    for number, (case, device) in enumerate(TABLE + WITH_SIDES)
    for operation, transpose in product(("solve", "conv"), BOTH)
    if thorough or transpose == (number % 2 == (operation == "conv"))
)
OF_CORNERS = tuple(row for row in OPERATORS if not row[0].has_sides)
over_table = pytest.mark.parametrize(("case", "device"), TABLE, ids=named)


def over(operators: Sequence[tuple[Case, Device, str, bool]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "device", "operation", "transpose"), operators, ids=named)


@st.composite
def variants(draw: st.DrawFn, case: Case) -> Case:
    """Returns the case with other corners, strides and values: the kernels stay the same up to 16 groups."""
    count, family = len(case.corners), ("T", "B") if case.has_sides else CORNERS
    return replace(
        case,
        corners=tuple(draw(st.lists(st.sampled_from(family), min_size=count, max_size=count))),
        layout=draw(st.sampled_from(tuple(LAYOUTS))),
        seed=draw(st.integers(0, 10**6)),
    )


orders = st.sampled_from((DECREASING, *range(10)))
few_examples = settings(max_examples=10 if thorough else 3)


def call_of(operation: str, case: Case, **changes: Any) -> OperatorCall:
    weights = operation == "weight_gradient"
    own = OperatorCall(
        operation,
        case.input(),
        case.input(seed=2) if weights else case.weight(),
        case.stencils,
        bias=case.bias() if case.biased and not weights else None,
        kernel_size=case.kernel_size,
    )
    return own._replace(**changes)


def expected(operation: str, case: Case, weight: Tensor, transpose: bool) -> Tensor:
    """Computes the result by dense linear algebra, or for large matrices by the reference, in float64."""
    input, solves = case.input().double(), operation == "solve"
    bias = case.bias().double() if case.biased else torch.zeros(case.channels, dtype=torch.float64)
    bias = bias[:, None, None]
    if case.unknowns > MAX_UNKNOWNS:
        given = input - bias if solves else input
        output = reference.run(call_of(operation, case, input=given, other=weight, bias=None, transpose=transpose))
    elif solves:
        output = oracles.solve(input - bias, weight, case.corners, transpose=transpose)
    else:
        output = oracles.multiply(input, weight, case.corners, transpose=transpose)
    return output if solves else output + bias


@over(OPERATORS)
@given(data=st.data(), diagonal=st.sampled_from(["own", "unit", "learned"]))
@few_examples
def test_operators(case: Case, device: Device, operation: str, transpose: bool, diagonal: str, data: st.DataObject):
    case, order = data.draw(variants(case)), data.draw(orders)
    asked, weight = call_of(operation, case, transpose=transpose), case.weight().double()
    broken = asked.other.masked_fill(oracles.masked(case.weight_shape, case.corners), float("nan"))
    if diagonal != "own":
        log_diagonal = torch.zeros(case.channels) if diagonal == "unit" else case.bias() / 8
        oracles.set_diagonal(weight, case.corners, log_diagonal.double().exp())
        oracles.set_diagonal(broken, case.corners, torch.full((case.channels,), float("nan")))
        is_unit = diagonal == "unit"
        asked = asked._replace(unit_diagonal=is_unit, log_diagonal=None if is_unit else log_diagonal)
    # In any order of threads, and with ignored entries that would show in results.
    output = emulator.call(asked._replace(other=broken), device=device, seed=order)
    assert_close(output, expected(operation, case, weight, transpose))
    assert output.stride() == torch.empty_like(asked.input).stride()
    if diagonal == "own":  # as it is in the first example
        assert torch.equal(emulator.call(asked, device=device), output)


@over_table
@given(data=st.data())
@few_examples
def test_weight_gradient(case: Case, device: Device, data: st.DataObject):
    case, order = data.draw(variants(case)), data.draw(orders)
    asked = call_of("weight_gradient", case)
    gradient = emulator.call(asked, device=device)
    assert_close(gradient, oracles.weight_gradient(asked.input, asked.other, case.weight(), case.corners), factor=4)
    oracles.set_diagonal(gradient, case.corners, torch.zeros(case.channels))
    without_diagonal = emulator.call(asked._replace(unit_diagonal=True), device=device, seed=order)
    assert torch.equal(without_diagonal, gradient)


@pytest.mark.parametrize("solves", BOTH, ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("log_diagonal", "batch", "pixels"),
    [((3,), 1, 1), ((70,), 70, 35), ((100,), 2, 3 * 2**31), ((5, 33), 5, 6), ((1, 32), 1, 12)],
    ids=str,
)
def test_log_abs_det(log_diagonal: tuple[int, ...], batch: int, pixels: int, dtype: torch.dtype, solves: bool):
    values = torch.randn(*log_diagonal, 2).to(dtype)[..., 0]  # with a stride
    images = values[..., None, None].expand(batch, -1, pixels, 1)
    asked = OperatorCall("log_abs_det", images, images, (0,), transpose=solves, kernel_size=(1, 1))
    sums = values.double().sum(-1).expand(batch) * (-pixels if solves else pixels)
    for order in emulator.ORDERS:
        found = emulator.call(asked, seed=order)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(found, sums)
    assert_close(reference.run(asked), sums)


def test_scratch_of_a_weight_gradient_is_capped():
    """Twelve groups have the kernels of six, but more partial sums."""
    case = Case(CORNERS * 3, per_group=64, batch=8, size=(16, 16))
    plan = planning.plan(emulator.planned(call_of("weight_gradient", case)), H100)
    assert plan.scratch <= 32 * 2**20


@over(OF_CORNERS)
def test_a_non_finite_pixel_changes_only_its_quadrant(case: Case, device: Device, operation: str, transpose: bool):
    """The change also stays in its own image."""
    input = case.input()
    changed, (image, row, column) = input.clone(), (size // 2 for size in (case.batch, *case.size))
    changed[image, :, row, column] = -float("inf")
    before, after = (
        emulator.call(call_of(operation, case, input=each, transpose=transpose), device=device, seed=DECREASING)
        for each in (input, changed)
    )
    differs = before != after
    assert not differs[:image].any()
    assert not differs[image + 1 :].any()
    for group, corner in zip(differs[image].chunk(len(case.corners)), case.corners, strict=True):
        # Read by the pixels on the far side from the corner; the transposed operator has the opposite one.
        down, right = ("B" in corner) == transpose, ("R" in corner) == transpose
        assert not group[:, : row if down else None][:, 0 if down else row + 1 :].any()
        assert not group[:, :, : column if right else None][:, :, 0 if right else column + 1 :].any()
        assert group[:, row, column].any()


@pytest.mark.parametrize("which", ["input", "grad"])
@over_table
def test_non_finite_values_stay_in_their_weights(case: Case, device: Device, which: str):
    asked, channel = call_of("weight_gradient", case), case.channels // 2
    {"input": asked.input, "grad": asked.other}[which][0, channel] = float("inf")
    gradient = emulator.call(asked, device=device)
    finite = gradient.isfinite().flatten(2).all(2)
    own = torch.zeros_like(finite)
    if which == "grad":
        own[channel] = True
    else:
        group, index = divmod(channel, case.per_group)
        own.unflatten(0, (-1, case.per_group))[group, :, index] = True
    assert finite[~own].all()
    assert not finite[own].all()


# Constants that select branches of a kernel, and sizes that do not always divide others.
BRANCHES = {
    "solve_rows": ("BANDED", "CHUNKED", "CORNERS", "GROUPS", "BIAS", "TAU"),
    "solve_channels": ("BANDED", "CHUNKED", "GROUPS", "REPLICAS", "BIAS"),
    "solve_tiles": ("GROUPS", "PADDED", "BIAS"),
    "convolution": ("IMAGES", "SPLITS", "PIXELS", "OUTPUTS", "BIAS", "TAU"),
    "weight_gradient_parts": ("PARTS", "SPLITS", "WIDTH_REMAINDER"),
}
PARTS = {
    "convolution": ("IMAGES", "ROWS", "COLUMNS", "TAPS_H", "TAPS_W", "CHUNK", "TILE_OUTPUTS"),
    "weight_gradient_parts": ("IMAGES", "ROWS", "COLUMNS", "TAPS_H", "TAPS_W"),
}
WHOLES = dict(IMAGES="BATCH", ROWS="HEIGHT", COLUMNS="WIDTH", TAPS_H="KERNEL_H", TAPS_W="KERNEL_W") | dict.fromkeys(
    ("CHUNK", "TILE_OUTPUTS"), "CHANNELS"
)


def test_the_table_reaches_every_kernel_and_branch():
    launched: dict[str, list[dict[str, Any]]] = defaultdict(list)
    gradients = [(case, device, "weight_gradient", False) for case, device in TABLE]
    for case, device, operation, transpose in (*OPERATORS, *gradients):
        sizes = dict(BATCH=case.batch, HEIGHT=case.size[0], WIDTH=case.size[1])
        asked = call_of(operation, case, transpose=transpose)
        for launch in planning.plan(emulator.planned(asked), device).launches:
            launched[launch.kernel.name].append(dict(launch.kernel.constants) | sizes)
    sources = "".join(path.read_text() for path in compiler.source_directory().glob("*.cu"))
    kernels = {*launched, "log_abs_det"}  # has one shape, and a test of its own
    assert kernels == set(re.findall(r'extern "C" __global__ void __launch_bounds__\(.*\)\s+(\w+)\(', sources))
    for kernel in kernels - {"log_abs_det", "weight_gradient", "weight_gradient_parts"}:
        assert {values["TRANSPOSE"] for values in launched[kernel]} == {0, 1}, kernel
    for kernel, constants in BRANCHES.items():
        for constant in constants:
            assert len({values[constant] for values in launched[kernel]}) > 1, (kernel, constant)
        if "GROUPS" in constants:
            assert "arguments.groups" in {values["GROUPS"] for values in launched[kernel]}, kernel
    channels = launched["solve_channels"]
    assert {values["SLICES"] for values in channels} == {4, 8, 16, 32}
    # Rows of a replica, which solves up to four at once, or two
    shares = {
        (values["BANDED"] and values["VECTORS_EACH"] > 4, -(-values["ROWS"] // values["REPLICAS"]))
        for values in channels
    }
    assert shares >= {(False, 2), (False, 3), (False, 5), (True, 3)}
    sides = [values for values in launched["solve_rows"] if values["TAU"] > 1]
    for constant in ("BANDED", "CHUNKED"):
        assert len({values[constant] for values in sides}) == 2, constant
    for kernel, parts in PARTS.items():
        for part in parts:
            assert any(values[WHOLES[part]] % values[part] for values in launched[kernel]), (kernel, part)
