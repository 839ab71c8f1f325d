"""conv, solve and weight_gradient against the formula and dense linear algebra, on every backend."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import oracles
import pytest
import torch
from cases import BL, BR, TL, TR, Case, cases, one_of, over_cases
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close

from nflows_kconv import functional, ops
from nflows_kconv.backends import reference

BOTH = (False, True)


@over_cases()
def test_oracles_agree(case: Case):
    input, weight = case.input(), case.weight()
    expected = oracles.conv(input, weight, case.corners, case.dilation)
    assert_close(oracles.multiply(input, weight, case.corners, case.dilation), expected)
    for matrix in oracles.matrices(weight, case.corners, case.size, case.dilation):
        assert not matrix.triu(1).any()


# With a bias, half precision must still round once: rounding before adding the bias could lose the whole value.
# Gradients, round trips and most other properties have no bias.


@over_cases()
def test_operators_are_dense_matrices(case: Case, backend: str, device: str):
    """Results are new tensors with the input's shape, dtype and memory format, and the arguments stay as they are."""
    input, weight, bias = arguments = case.input(device), case.weight(device), case.bias(device)
    before, like = [argument.clone() for argument in arguments], torch.empty_like(input)
    conv, solve = case.operators(weight, bias)
    exact, of_channels, stencil = (
        input.cpu().double(),
        case.of_channels(bias.cpu().double()),
        (case.corners, case.dilation),
    )
    for transpose in case.transposes:
        product = oracles.multiply(exact, case.weight(), *stencil, transpose=transpose)
        solution = oracles.solve(exact - of_channels, case.weight(), *stencil, transpose=transpose)
        for operator, expected in ((conv, product + of_channels), (solve, solution)):
            output = operator(input, transpose)
            assert_close(output, expected)
            assert (output.shape, output.dtype, output.device) == (like.shape, like.dtype, like.device)
            assert output.stride() == like.stride()
            assert not output.numel() or output.data_ptr() != input.data_ptr()
    assert all(map(torch.equal, arguments, before))


@over_cases()
def test_weight_gradient_is_torchs(case: Case, backend: str, device: str):
    if case.dimensions == 1 or backend in ("cpu-baseline", "cpu-avx2"):  # torch computes it, with any instruction set
        return
    input, grad = case.input(device), case.input(device, seed=2)
    expected = oracles.weight_gradient(input, grad, case.weight(), case.corners, case.dilation)
    for unit_diagonal in BOTH:
        gradient = ops.weight_gradient(input, grad, case.stencils, case.steps, case.kernel_size, unit_diagonal)
        if unit_diagonal:
            oracles.set_diagonal(expected, case.corners, torch.zeros(()))
        assert gradient.shape == expected.shape
        assert_close(gradient, expected, factor=4)  # torch's own gradient sums all pixels of the batch in float32


@given(case=cases(max_unknowns=40), wide=st.booleans())
def test_small_integers_are_exact(case: Case, wide: bool, backend: str, device: str):
    case = replace(
        case,
        dtype=torch.float64 if wide else torch.float32,
        per_group=min(case.per_group, 3),
        kernel_size=tuple(min(size, 3) for size in case.kernel_size),
        size=tuple(min(size, 4) for size in case.size),
    )
    input, weight = case.integers(device)
    conv, solve = case.operators(weight)
    for transpose in case.transposes:
        output = conv(input, transpose)
        expected = oracles.multiply(input, weight, case.corners, case.dilation, transpose=transpose)
        assert torch.equal(output.to("cpu", torch.float64), expected)
        assert torch.equal(solve(output, transpose), input)


@over_cases()
def test_layouts_and_runs_change_nothing(case: Case, backend: str, device: str):
    plain = case.operators(replace(case, layout="contiguous").weight(device))
    strided = case.operators(case.weight(device))
    input = case.input(device)
    copy = input.contiguous(memory_format=torch.contiguous_format)
    for plain_operator, strided_operator in zip(plain, strided, strict=True):
        for transpose in case.transposes:
            output = strided_operator(input, transpose)
            assert torch.equal(output, strided_operator(input, transpose))
            assert_close(output, plain_operator(copy, transpose))


@over_cases()
def test_images_of_a_batch_do_not_meet(case: Case, kernel: str, device: str):
    input = case.input(device)
    for operator in case.operators(case.weight(device)):
        for transpose in case.transposes:
            together = operator(input, transpose)
            for image in {0, case.batch // 2, case.batch - 1} if case.batch else ():
                assert_close(together[image : image + 1], operator(input[image : image + 1], transpose))


@over_cases()
def test_nan_and_infinity_stay_in_their_image(case: Case, backend: str, device: str):
    if case.batch < 3 or case.layout == "expanded":
        return
    input = case.input(device)
    others = torch.arange(case.batch) % 3 != 1
    broken = input.clone()
    broken[~others] = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)[
        torch.randint(3, broken[~others].shape)
    ].to(case.dtype)
    for operator in case.operators(case.weight(device)):
        for transpose in case.transposes:
            assert_close(operator(broken, transpose)[others], operator(input, transpose)[others])


@over_cases()
def test_a_pixel_changes_only_what_reads_it(case: Case, backend: str, device: str):
    """Non-finite ones like all others, but that a masked tap of a convolution may be computed, too: zero times them."""
    value = one_of((100.0, math.nan), case, backend)
    input, operators = case.input(device), case.operators(case.weight(device))
    if not input.numel():
        return
    if case.has_sides and not math.isfinite(value):
        operators = operators[1:]
    pixel = (..., *(size // 2 for size in case.size[:-1]), case.size[-1] // 3)
    changed, marked = input.clone(), torch.zeros(1, 1, *case.size, dtype=torch.bool)
    changed[pixel], marked[pixel] = value, True
    for operator in operators:
        for transpose in case.transposes:
            differs = (operator(changed, transpose) != operator(input, transpose)).cpu()
            for group, corner in zip(differs.chunk(len(case.corners), 1), case.corners, strict=True):
                may = oracles.followers(marked, _turned(corner) if transpose else corner)
                assert not (group & ~may).any()
                assert group[pixel].any()


def _turned(name: str) -> str:
    return name.translate(str.maketrans("NFTBLR", "FNBTRL"))


SYMMETRIES: dict[str, tuple[Callable[[str], str], Callable[[torch.Tensor], torch.Tensor]]] = {
    "turned": (_turned, lambda t: t.flip(list(range(2, t.dim())))),
    "mirrored": (lambda name: name[:-1] + _turned(name[-1]), lambda t: t.flip(-1)),
    "transposed": (lambda name: name.translate(str.maketrans("TBLR", "LRTB"))[::-1], lambda t: t.mT),
}


@over_cases()
def test_mirror_images(case: Case, kernel: str, device: str):
    of_images = ("transposed",) if case.dimensions == 2 else ()
    symmetry = one_of(("turned", *of_images) if case.has_sides else ("turned", "mirrored", *of_images), case, kernel)
    rename, mirror = SYMMETRIES[symmetry]
    there = replace(case, corners=tuple(map(rename, case.corners)))
    if symmetry == "transposed" and case.dilation != 1:
        there = replace(there, dilation=functional.parse_dilation(case.dilation, 2)[::-1])
    input, weight = case.input(device), case.weight(device)
    for operator, mirrored in zip(case.operators(weight), there.operators(mirror(weight)), strict=True):
        for transpose in case.transposes:
            assert_close(mirrored(mirror(input), transpose), mirror(operator(input, transpose)))


@over_cases()
def test_one_by_one_kernels_are_triangular_matrices(case: Case, kernel: str, device: str):
    case = replace(case, kernel_size=(1,) * case.dimensions)
    conv, solve = case.operators(case.weight(device))
    input = case.input(device)
    matrix = torch.block_diag(*(w.tril() for w in case.weight().flatten(1).double().chunk(len(case.corners))))
    pixels = input.cpu().double().transpose(0, 1).flatten(1)

    def images(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unflatten(1, (case.batch, *case.size)).transpose(0, 1)

    for transpose in case.transposes:
        own = matrix.mT if transpose else matrix
        assert_close(conv(input, transpose), images(own @ pixels))
        assert_close(solve(input, transpose), images(torch.linalg.solve_triangular(own, pixels, upper=transpose)))


@over_cases()
def test_diagonals_of_any_size(case: Case, backend: str, device: str):
    case = replace(case, dtype=torch.promote_types(case.dtype, torch.float32))
    size, diagonal = one_of((2.0**-100, 2.0**100), case, backend), torch.linspace(1, 3, case.channels)
    weight = torch.zeros_like(case.weight(device))
    oracles.set_diagonal(weight, case.corners, diagonal * size)
    conv, solve = case.operators(weight)
    input, diagonal = case.input(device), case.of_channels(diagonal.to(device, case.dtype))
    for transpose in case.transposes:
        assert_close(conv(input, transpose) / size, input * diagonal)
        assert_close(solve(input, transpose) * size, input / diagonal)


@over_cases()
def test_raw_weights(case: Case, backend: str, device: str):
    """Their masked entries are never read, nor is their diagonal where there is another one, whatever lies there."""
    diagonal = one_of(("own", "unit", "learned"), case, backend)
    ignored, log_diagonal = oracles.masked(case.weight_shape, case.corners), torch.zeros(case.channels)
    weight = case.weight().to(torch.promote_types(case.dtype, torch.float32)).masked_fill(ignored, 0)
    if diagonal == "learned":
        log_diagonal = torch.linspace(-0.4, 0.5, case.channels).to(case.dtype)
    if diagonal != "own":
        oracles.set_diagonal(ignored, case.corners, torch.tensor(True))
        oracles.set_diagonal(weight, case.corners, log_diagonal.to(weight.dtype).exp())
    raw = case.weight(device).masked_fill(ignored.to(device), math.nan)
    learned = log_diagonal.to(device) if diagonal == "learned" else None
    functions = case.operators(raw, None, learned, diagonal == "unit"), case.operators(weight.to(device))
    input = case.input(device)
    for function, expected in zip(*functions, strict=True):
        for transpose in case.transposes:
            assert_close(function(input, transpose), expected(input.to(weight.dtype), transpose))


LARGE = (
    Case(per_group=3, batch=3, size=(32, 32)),
    Case((TL,), per_group=12, batch=2, size=(32, 32)),
    Case((BR,), per_group=48, batch=33, size=(8, 8)),
    Case((TR, BL), per_group=24, batch=100, size=(16, 16)),
    Case((TL,), per_group=128, batch=9, size=(8, 7)),
    Case((BL,), per_group=1024, batch=2, size=(1, 3), kernel_size=(1, 2)),
    Case((BR,), per_group=2, batch=2, size=(1, 4096)),
    Case((TR,), per_group=2, batch=2, size=(1024, 3)),
    Case((TL,), per_group=1, batch=1, size=(129, 127), kernel_size=(5, 5)),
    Case((BL,), per_group=1, batch=20_000, size=(3, 2)),
    Case(("T", "L"), per_group=3, batch=3, size=(17, 16)),
    Case(("NTL", "FBR"), per_group=4, batch=9, kernel_size=(3, 3, 3), size=(6, 7, 8)),
    # Rows too large for a cache, and kernels with more rows than a vector has lanes
    Case((BR,), per_group=64, batch=33, size=(20, 24), kernel_size=(5, 2)),
    Case((TL,), per_group=128, batch=17, size=(3, 40), kernel_size=(1, 2)),
    Case((TR,), per_group=1, batch=1, size=(40, 30), kernel_size=(11, 3), dtype=torch.float64),
    Case((BL,), per_group=1, batch=1, size=(70, 90), kernel_size=(20, 18)),
)


@pytest.mark.parametrize("transpose", BOTH, ids=["plain", "transposed"])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "x".join(map(str, case.input_shape)))
def test_large_images(case: Case, transpose: bool, backend: str, device: str):
    if backend == "reference" and max(case.size) < 1000:
        pytest.skip("has no branches for these sizes, and is slow")
    conv, solve = case.operators(case.weight(device))
    input = case.input(device)
    output = conv(input, transpose)
    if not transpose:
        assert_close(output, oracles.conv(input, case.weight(), case.corners))
        assert_close(oracles.conv(solve(input), case.weight(), case.corners).to(case.dtype), input)
    assert_close(solve(output, transpose), input)


# Lanes are images, images and rows, channels, rows, and groups with their own weights.
THREADED = (
    Case(per_group=3, batch=100, size=(16, 16)),
    Case((TL,), per_group=12, batch=33, size=(16, 16)),
    Case((BR,), per_group=64, batch=5, size=(8, 8)),
    Case((BR,), per_group=2, batch=1, size=(64, 64)),
    Case((TL, "T") * 20, per_group=3, batch=1, size=(16, 16)),
)


@pytest.mark.parametrize("case", THREADED, ids=lambda case: "x".join(map(str, case.input_shape)))
def test_threads_change_no_bit(case: Case, kernel: str, device: str):
    if device != "cpu":
        pytest.skip("about threads of the native kernels")
    before, input = torch.get_num_threads(), case.input()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            biased = case.operators(case.weight(), case.bias())
            results.append([operator(input, t) for operator in biased for t in case.transposes])
    finally:
        torch.set_num_threads(before)
    first, *others = results
    assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_reference_switches_tf32_off_and_leaves_the_setting(setting: str, own_precision: None):
    operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    for operation in operations:
        operation.fp32_precision = setting
    with pytest.raises(KeyError), reference.in_own_precision(torch.device("cuda")):
        assert [operation.fp32_precision for operation in operations] == ["ieee", "ieee"]
        raise KeyError
    with reference.in_own_precision(torch.device("cpu")):
        assert [operation.fp32_precision for operation in operations] == [setting, setting]

    @partial(torch.compile, backend="eager", fullgraph=True)
    def compiled(input: torch.Tensor) -> torch.Tensor:
        with reference.in_own_precision(torch.device("cuda")):
            return 2 * input

    assert compiled(torch.ones(1)) == 2


@over_cases()
def test_what_export_leaves_of_a_conv_computes_the_same(case: Case):
    if case.dimensions == 1 or 0 in case.size:  # torch's convolutions refuse images without pixels
        return
    for transpose in BOTH:
        arguments = case.input(), case.weight(), case.bias(), None, case.stencils, case.steps, False, transpose
        with mock.patch.object(torch.compiler, "is_exporting", lambda: True):
            actual = ops.exported_conv(*arguments)
        assert_close(actual, ops.conv(*arguments), factor=2)
