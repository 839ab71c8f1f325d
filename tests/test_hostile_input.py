"""Hostile calls: a part of `fuzz`, and the faults it has found, by name."""

from __future__ import annotations

import math
import threading
from functools import partial

import fuzz
import numpy as np
import pytest
import torch
from fuzz import oracle
from fuzz.__main__ import run_seeds
from oracles import assert_close
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from nflows_kconv import stencil, use_backend
from nflows_kconv.backends import native
from nflows_kconv.functional import conv2d, conv2d_inverse, log_abs_det

TINY = 1e-39  # a denormal of float32 whose reciprocal overflows


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, 4, 5)


def weight() -> Tensor:
    weight = 0.1 * torch.randn(2, 2, 3, 3)
    weight[[0, 1], [0, 1], 2, 2] = 1
    return weight


def test_a_slice_of_the_fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """The first child is killed by a signal, which is reported with its seed; another runs the later seeds."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "write = pathlib.Path.write_text\n"
        "pathlib.Path.write_text = lambda path, text: write(path, text) and (os.abort() if text == '0' else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    report = run_seeds(0, 121)
    (failure,) = report.failures
    assert failure.startswith("seed 0: the process ended with status -6")
    assert report.counts.total() > 2000


def test_the_oracle_refuses_what_is_wrong():
    x, w = images().double(), weight().double()
    problem = oracle.Problem(("TL",), x, w)
    y = conv2d(x, w, corners="TL")
    problem.check_product(y, x)
    problem.check_solution(x, y)
    for entry in [(0, 0, 0, 0), (1, 1, 3, 4)]:
        for error in (1e-9, math.nan):
            wrong_y, wrong_x = y.clone(), x.clone()
            wrong_y[entry] += error
            wrong_x[entry] += error
            with pytest.raises(oracle.Wrong, match="wrong entries"):
                problem.check_product(wrong_y, x)
            with pytest.raises(oracle.Wrong, match="wrong entries"):
                problem.check_solution(wrong_x, y)


def test_threads_at_once():
    failures = []

    def run(first: int) -> None:
        try:
            for seed in range(first, first + 20):
                fuzz.calls.functions(fuzz.Random(seed))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(0, 80, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def quantized(tensor: Tensor) -> Tensor:
    """Returns a tensor of which `torch.empty_like` makes no other."""
    channels = len(tensor)
    return torch.quantize_per_channel(tensor, torch.ones(channels), torch.zeros(channels), 0, torch.quint8)


NOT_DENSE = {
    "be a dense tensor, got layout torch.sparse_coo": Tensor.to_sparse,
    "be a dense tensor, got layout torch._mkldnn": Tensor.to_mkldnn,
    "be a dense tensor, got a nested tensor": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "have one of the dtypes .*, got torch.quint8": quantized,
}


@pytest.mark.filterwarnings("ignore")  # torch warns about prototypes
@pytest.mark.parametrize("message", NOT_DENSE)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_only_dense_tensors(name: str, message: str):
    arguments = dict(input=images(), weight=weight(), corners="TL", bias=torch.zeros(2))
    arguments[name] = NOT_DENSE[message](arguments[name])
    for function in (conv2d, conv2d_inverse):
        with pytest.raises(TypeError, match=f"{name} must {message}"):
            function(**arguments)


@pytest.mark.parametrize("height", [2.5, True, "3", None, torch.tensor(3), math.nan], ids=repr)
def test_sizes_are_integers(height: object):
    with pytest.raises(TypeError, match="size must be an integer, got "):
        log_abs_det(weight(), corners="TL", size=(height, 3))


def test_pixels_are_counted_without_overflow():
    double = weight() * 2
    for side in (2**31, np.int64(2**31), np.int32(2**30)):
        expected = 2 * int(side) ** 2 * math.log(2)
        assert log_abs_det(double, corners="TL", size=(side, side)).item() == pytest.approx(expected)
    for sides in ((2**32, 2**32), (np.int64(2**62), np.int64(4)), (10**400, 1)):
        with pytest.raises(ValueError, match=r"fewer than 2\*\*63 pixels"):
            log_abs_det(double, corners="TL", size=sides)


@pytest.mark.parametrize("function", [conv2d, conv2d_inverse])
def test_steps_beyond_the_image_do_not_overflow(function, backend: str):
    input, kernel = images().to(memory_format=torch.channels_last), weight()
    far, further = (function(input, kernel, corners="TL", dilation=step) for step in (10, 2**62))
    assert_close(further, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_diagonal_whose_reciprocal_overflows_has_no_inverse(dtype: torch.dtype, backend: str):
    """The kernel multiplies by the reciprocal: 0 / 1e-39 came out as NaN."""
    small = torch.eye(2, dtype=dtype)[:, :, None, None].clone()
    small[1, 1] = TINY
    solve = partial(conv2d_inverse, weight=small, corners="TL")
    for function in (lambda: solve(images().to(dtype)), lambda: log_abs_det(small, corners="TL", size=(1, 1))):
        with pytest.raises(ValueError, match=r"and its reciprocal must be finite .* got 1(\.\d+)?e-39 in channel 1"):
            function()
    small[1, 1] = 4 * TINY  # also denormal
    assert_close(solve(images().to(dtype).fill_(4 * TINY))[:, 1], torch.ones(2, 4, 5), factor=4)


OPERATORS = torch.ops.nflows_kconv


@pytest.mark.parametrize("name", ["conv", "solve", "weight_gradient"])
def test_operators_refuse_tensors_without_memory(name: str):
    """For a CPU and a meta tensor torch calls the meta kernel, which left the result uninitialised."""
    operator = getattr(OPERATORS, name)
    gradient = name == "weight_gradient"
    second, others = (
        (images(), ([0], [1, 1], [3, 3], False)) if gradient else (weight(), (None, None, [0], [1, 1], False, False))
    )
    for operands in ((images(), second.to("meta")), (images().to("meta"), second)):
        with pytest.raises(ValueError, match=r"needs a second tensor of shape .* and (cpu|meta), got"):
            operator(*operands, *others)
    for role in ("bias", "log-diagonal") if not gradient else ():
        vectors = (torch.zeros(2, device="meta"), None) if role == "bias" else (None, torch.zeros(2, device="meta"))
        with pytest.raises(ValueError, match=rf"needs a {role} of shape \(2,\), .* and cpu, got \(2,\), .* and meta"):
            operator(images(), second, *vectors, [0], [1, 1], False, False)


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_operators_check_shapes_and_dtypes(recorded: bool):
    """The reference accepted shapes that F.conv2d and broadcasting accept; kernels read 8-bit data as 64-bit."""
    given = images().requires_grad_(recorded)
    for operator in (OPERATORS.conv, OPERATORS.solve):
        for dtype in (torch.float8_e4m3fn, torch.int32, torch.complex64):
            with pytest.raises(ValueError, match=rf"{dtype}"):
                operator(given.to(dtype), weight().to(dtype), None, None, [0], [1, 1], False, False)
        with pytest.raises(ValueError, match=r"needs a second tensor of shape \(2, 2, 3, 3\)"):
            operator(given, weight()[:1], None, None, [0], [1, 1], False, False)
        with pytest.raises(ValueError, match=r"needs a bias of shape \(2,\), torch.float32 and cpu, got \(1,\)"):
            operator(given, weight(), torch.zeros(1), None, [0], [1, 1], False, False)
        periodic = [stencil.PERIODIC], [1, 1] if operator is OPERATORS.solve else [1, 2], 1
        known = (([0], [1, 1], repeats) for repeats in (0, -1, 3))
        for stencils, dilation, repeats in (periodic, *known, *(([code], [1, 1], 1) for code in (7, 64, 16, -1))):
            with pytest.raises(ValueError, match="one of their stencils for each group of channels"):
                operator(given, weight(), None, None, stencils, dilation, False, False, repeats)
        circular = [stencil.PERIODIC], [1, 1]
        for small, log_diagonal, unit in ((2, None, False), (4, None, True), (4, torch.zeros(2), False)):
            with pytest.raises(ValueError, match="one of their stencils for each group of channels"):
                operator(given[..., :small, :], weight(), None, log_diagonal, *circular, unit, False)
        for dilation in ([0, 1], [1], [1, 1, 1]):
            with pytest.raises(ValueError, match="a kernel of positive size and dilation"):
                operator(given, weight(), None, None, [0], dilation, False, False)
        with pytest.raises(ValueError, match=r"needs images \[B, C, H, W\] .* got \(2,\)"):
            operator(given[:, 0, 0, 0], weight(), None, None, [0], [1, 1], False, False)
    with pytest.raises(ValueError, match="one of their stencils for each group of channels"):
        OPERATORS.weight_gradient(given, given, [stencil.PERIODIC], [1, 1], [3, 3], True)
    with pytest.raises(ValueError, match="of positive size"):
        OPERATORS.weight_gradient(given, given, [0], [1, 1], [0, 3], False)


@pytest.mark.skipif(not native.available, reason="what is freed is seen by the native library")
@pytest.mark.parametrize("freed", ["input", "weight", "bias"])
def test_freed_memory_is_not_read(freed: str):
    """Sharded training frees parameters between uses; most of torch's own operators crash on them."""
    arguments = dict(input=images(), weight=weight(), bias=torch.zeros(2))
    arguments[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="must not have been freed"), torch.no_grad(), use_backend("cpu"):
        conv2d(**arguments, corners="TL")


@pytest.mark.parametrize("function", [conv2d, conv2d_inverse], ids=lambda function: function.__name__)
def test_memory_that_is_not_the_tensors_values_is_not_read(function, backend: str):
    """Covers lazy negatives, zero tensors without memory, and wrapper subclasses."""
    x, w = images(), weight()
    of_negatives = [torch.complex(t, -t).conj().imag for t in (x, w)]
    assert all(t.is_neg() for t in of_negatives)
    assert_close(function(*of_negatives, corners="TL"), function(x, w, corners="TL"))
    assert not function(torch._efficientzerotensor(x.shape), w, corners="TL").any()
    wrapped = function(x, TwoTensor(w, w), corners="TL")
    assert_close(wrapped.a, function(x, w, corners="TL"))


@pytest.mark.parametrize("function", [conv2d, conv2d_inverse], ids=lambda function: function.__name__)
def test_a_tensor_changed_before_the_backward_pass_is_noticed(function, backend: str):
    x, w = images().requires_grad_(), weight().requires_grad_()
    changed_weight, changed_input = w * 1, x * 1
    outputs = function(x, changed_weight, corners="TL"), function(changed_input, w, corners="TL")
    changed_weight.detach().add_(1)
    changed_input.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()
    if function is conv2d:  # the inverse saves its output instead
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[1].sum().backward()
