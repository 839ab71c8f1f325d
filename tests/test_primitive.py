"""conv, solve and weight_gradient against the formula and dense linear algebra, on every backend."""

from dataclasses import replace

import oracles
import pytest
import torch
from cases import BL, BR, TL, TR, Case, cases, over_cases
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close

from nflows_kconv import geometry, ops, reference

BOTH = (False, True)


def operators(case: Case, device: str, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None):
    """The operator of a case and its inverse as functions of (input, transpose)."""
    weight = case.weight(device) if weight is None else weight
    corners = geometry.parse_corners(case.corners)
    return (
        lambda input, transpose=False: ops.conv(input, weight, bias, corners, transpose),
        lambda input, transpose=False: ops.solve(input, weight, bias, corners, transpose),
    )


@over_cases()
def test_oracles_agree(case: Case):
    input, weight = case.input(), case.weight()
    assert_close(oracles.multiply(input, weight, case.corners), oracles.conv(input, weight, case.corners))
    for matrix in oracles.matrices(weight, case.corners, case.height, case.width):
        assert not matrix.triu(1).any()


# With a bias: half precision rounds once, bias included. An output that was rounded before its bias was added is off by
# up to all of its value. Gradients, round trips and most other properties have none.


@over_cases()
def test_conv_is_conv2d(case: Case, backend: str, device: str):
    conv, _ = operators(case, device, bias=case.bias(device))
    input, bias = case.input(device), case.bias().double()[:, None, None]
    assert_close(conv(input), oracles.conv(input, case.weight(), case.corners) + bias)


@over_cases()
def test_transposed_conv_is_the_dense_product(case: Case, backend: str, device: str):
    conv, _ = operators(case, device, bias=case.bias(device))
    input, bias = case.input(device), case.bias().double()[:, None, None]
    assert_close(conv(input, True), oracles.multiply(input, case.weight(), case.corners, transpose=True) + bias)


@over_cases()
def test_solve_is_the_dense_solution(case: Case, backend: str, device: str):
    _, solve = operators(case, device, bias=case.bias(device))
    input, bias = case.input(device), case.bias().double()[:, None, None]
    for transpose in BOTH:
        expected = oracles.solve(input.cpu().double() - bias, case.weight(), case.corners, transpose)
        assert_close(solve(input, transpose), expected)


@over_cases()
def test_weight_gradient_is_conv2ds(case: Case, backend: str, device: str):
    input, grad = case.input(device), case.input(device, seed=2)
    gradient = ops.weight_gradient(input, grad, geometry.parse_corners(case.corners), case.kernel_size)
    expected = oracles.weight_gradient(input, grad, case.weight(), case.corners)
    assert gradient.shape == expected.shape
    assert_close(gradient, expected, factor=4)  # F.conv2d's own weight gradient sums all pixels of the batch in float32


@over_cases()
def test_round_trips(case: Case, backend: str, device: str):
    case = replace(case, dtype=torch.promote_types(case.dtype, torch.float32))
    conv, solve = operators(case, device)
    input = case.input(device)
    for transpose in BOTH:
        assert_close(solve(conv(input, transpose), transpose), input)
        assert_close(conv(solve(input, transpose), transpose), input)


@given(case=cases(max_unknowns=40), wide=st.booleans())
def test_small_integers_are_exact(case: Case, wide: bool, backend: str, device: str):
    case = replace(
        case,
        dtype=torch.float64 if wide else torch.float32,
        per_group=min(case.per_group, 3),
        kernel_size=tuple(min(size, 3) for size in case.kernel_size),
        height=min(case.height, 4),
        width=min(case.width, 4),
    )
    input, weight = case.integers(device)
    conv, solve = operators(case, device, weight)
    for transpose in BOTH:
        output = conv(input, transpose)
        expected = oracles.multiply(input, weight, case.corners, transpose)
        assert torch.equal(output.to("cpu", torch.float64), expected)
        assert torch.equal(solve(output, transpose), input)


@over_cases()
def test_output_has_the_inputs_shape_dtype_and_memory_format(case: Case, backend: str, device: str):
    conv, solve = operators(case, device)
    input = case.input(device)
    like = torch.empty_like(input)
    for operator in (conv, solve):
        for transpose in BOTH:
            output = operator(input, transpose)
            assert (output.shape, output.dtype, output.device) == (like.shape, like.dtype, like.device)
            assert output.stride() == like.stride()


@over_cases()
def test_layouts_and_runs_change_nothing(case: Case, backend: str, device: str):
    plain = operators(replace(case, layout="contiguous"), device)
    strided = operators(case, device)
    input = case.input(device)
    copy = input.contiguous(memory_format=torch.contiguous_format)
    for plain_operator, strided_operator in zip(plain, strided, strict=True):
        for transpose in BOTH:
            output = strided_operator(input, transpose)
            assert torch.equal(output, strided_operator(input, transpose))
            assert_close(output, plain_operator(copy, transpose))


@over_cases()
def test_arguments_are_only_read(case: Case, backend: str, device: str):
    input, weight = case.input(device), case.weight(device)
    bias = case.bias(device)
    before = input.clone(), weight.clone(), bias.clone()
    for operator in operators(case, device, weight, bias):
        for transpose in BOTH:
            output = operator(input, transpose)
            assert not output.numel() or output.data_ptr() != input.data_ptr()
    assert torch.equal(input, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(bias, before[2])


@over_cases()
def test_images_of_a_batch_do_not_meet(case: Case, backend: str, device: str):
    input = case.input(device)
    for operator in operators(case, device):
        for transpose in BOTH:
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
    for operator in operators(case, device):
        for transpose in BOTH:
            assert_close(operator(broken, transpose)[others], operator(input, transpose)[others])


@pytest.mark.parametrize("value", [100.0, float("nan"), -float("inf")])
@over_cases()
def test_a_pixel_changes_only_its_quadrant(case: Case, value: float, backend: str, device: str):
    """Non-finite ones like all others, as in F.conv2d."""
    input = case.input(device)
    if not input.numel():
        return
    row, column = case.height // 2, case.width // 3
    changed = input.clone()
    changed[:, :, row, column] = value
    rows, columns = torch.arange(case.height)[:, None], torch.arange(case.width)
    for operator in operators(case, device):
        for transpose in BOTH:
            differs = (operator(changed, transpose) != operator(input, transpose)).cpu()
            for group, corner in zip(differs.chunk(len(case.corners), 1), case.corners, strict=True):
                # Read by the pixels on the far side from the corner; the transposed operator has the opposite one.
                below = (rows <= row) if ("B" in corner) != transpose else (rows >= row)
                right = (columns <= column) if ("R" in corner) != transpose else (columns >= column)
                assert not group[:, :, ~(below & right)].any()
                assert group[:, :, row, column].any()


@over_cases()
def test_mirror_images(case: Case, backend: str, device: str):
    for dim, mirrored in ((-1, "columns"), (-2, "rows")):
        corners = tuple(oracles.MIRRORED[mirrored][corner] for corner in case.corners)
        input, weight = case.input(device), case.weight(device)
        here = operators(case, device, weight)
        there = operators(replace(case, corners=corners), device, weight.flip(dim))
        for operator, mirror_image in zip(here, there, strict=True):
            for transpose in BOTH:
                assert_close(mirror_image(input.flip(dim), transpose), operator(input, transpose).flip(dim))


@over_cases()
def test_one_by_one_kernels_are_triangular_matrices(case: Case, backend: str, device: str):
    case = replace(case, kernel_size=(1, 1))
    conv, solve = operators(case, device)
    input = case.input(device)
    matrix = torch.block_diag(*(w.tril() for w in case.weight()[..., 0, 0].double().chunk(len(case.corners))))
    pixels = input.cpu().double().permute(1, 0, 2, 3).flatten(1)

    def images(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unflatten(1, (case.batch, case.height, case.width)).permute(1, 0, 2, 3)

    assert_close(conv(input), images(matrix @ pixels))
    assert_close(conv(input, True), images(matrix.mT @ pixels))
    assert_close(solve(input), images(torch.linalg.solve_triangular(matrix, pixels, upper=False)))
    assert_close(solve(input, True), images(torch.linalg.solve_triangular(matrix.mT, pixels, upper=True)))


@pytest.mark.parametrize("exponent", [-100, -13, 13, 100])
@over_cases()
def test_diagonals_of_any_size(case: Case, exponent: int, backend: str, device: str):
    case = replace(case, dtype=torch.promote_types(case.dtype, torch.float32))
    size, diagonal = 2.0**exponent, torch.linspace(1, 3, case.channels)
    weight = torch.zeros_like(case.weight(device))
    oracles.set_diagonal(weight, case.corners, diagonal * size)
    conv, solve = operators(case, device, weight)
    input, diagonal = case.input(device), diagonal.to(device, case.dtype)[:, None, None]
    for transpose in BOTH:
        assert_close(conv(input, transpose) / size, input * diagonal)
        assert_close(solve(input, transpose) * size, input / diagonal)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@over_cases()
def test_masked_entries_are_never_read(case: Case, value: float, backend: str, device: str):
    masked = oracles.masked(case.weight_shape, case.corners).to(device)
    clean = operators(case, device, case.weight(device).masked_fill(masked, 0))
    broken = operators(case, device, case.weight(device).masked_fill(masked, value))
    input = case.input(device)
    for with_zeros, with_value in zip(clean, broken, strict=True):
        for transpose in BOTH:
            assert torch.equal(with_zeros(input, transpose), with_value(input, transpose))


LARGE = (
    Case(per_group=3, batch=3, height=32, width=32),
    Case((TL,), per_group=12, batch=2, height=32, width=32),
    Case((BR,), per_group=48, batch=33, height=8, width=8),
    Case((TR, BL), per_group=24, batch=100, height=16, width=16),
    Case((TL,), per_group=128, batch=9, height=8, width=7),
    Case((BL,), per_group=1024, batch=2, height=1, width=3, kernel_size=(1, 2)),
    Case((BR,), per_group=2, batch=2, height=1, width=4096),
    Case((TR,), per_group=2, batch=2, height=1024, width=3),
    Case((TL,), per_group=1, batch=1, height=129, width=127, kernel_size=(5, 5)),
    Case((BL,), per_group=1, batch=20_000, height=3, width=2),
    # Rows too large for a cache, and kernels higher than a vector has lanes
    Case((BR,), per_group=64, batch=33, height=20, width=24, kernel_size=(5, 2)),
    Case((TL,), per_group=128, batch=17, height=3, width=40, kernel_size=(1, 2)),
    Case((TR,), per_group=1, batch=1, height=40, width=30, kernel_size=(11, 3), dtype=torch.float64),
    Case((BL,), per_group=1, batch=1, height=70, width=90, kernel_size=(20, 18)),
)


@pytest.mark.parametrize("transpose", BOTH, ids=["plain", "transposed"])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "x".join(map(str, case.input_shape)))
def test_large_images(case: Case, transpose: bool, backend: str, device: str):
    conv, solve = operators(case, device)
    input = case.input(device)
    output = conv(input, transpose)
    if not transpose:
        assert_close(output, oracles.conv(input, case.weight(), case.corners))
        assert_close(oracles.conv(solve(input), case.weight(), case.corners).to(case.dtype), input)
    assert_close(solve(output, transpose), input)


THREADED = (
    Case(per_group=3, batch=100, height=16, width=16),
    Case((TL,), per_group=12, batch=33, height=16, width=16),
    Case((BR,), per_group=64, batch=5, height=8, width=8),
    Case((BR,), per_group=2, batch=1, height=64, width=64),
)


@over_cases(*THREADED)
def test_threads_and_runs_change_no_bit(case: Case, backend: str, device: str):
    if device != "cpu" or backend == "reference":
        pytest.skip("about threads of the native kernels; what torch itself computes may depend on them")
    before, input = torch.get_num_threads(), case.input()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            biased = operators(case, device, bias=case.bias())
            results.append([operator(input, t) for operator in biased for t in BOTH])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_reference_switches_tf32_off_and_leaves_the_setting(setting: str, own_precision: None):
    operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    for operation in operations:
        operation.fp32_precision = setting
    with pytest.raises(KeyError), reference._in_own_precision(torch.device("cuda")):
        assert [operation.fp32_precision for operation in operations] == ["ieee", "ieee"]
        raise KeyError
    with reference._in_own_precision(torch.device("cpu")):
        assert [operation.fp32_precision for operation in operations] == [setting, setting]
