"""FlopCounterMode counts every operator as torch counts the convolution with the same weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, over_cases
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nflows_kconv import InvertibleConv2d

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def operations(function: Callable[..., Any], *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def of_torch(case: Case) -> int:
    """Counts two per multiply-add, including the border and masked entries."""
    if 0 in case.size:  # torch's convolutions refuse images without pixels
        return 0
    axes = zip(case.size, case.kernel_size, case.steps, strict=True)
    padded = torch.empty(*case.input_shape[:2], *(n + (k - 1) * step for n, k, step in axes), device="meta")
    weight, groups = torch.empty(case.weight_shape, device="meta"), len(case.corners)
    return operations(lambda: CONVOLUTIONS[case.dimensions](padded, weight, groups=groups, dilation=case.steps))


@over_cases()
def test_operators_and_gradients(case: Case, device: str):
    """The gradient of the input is one transpose; that of the weight takes as many operations."""

    def step(function: Callable[..., Tensor], input: Tensor, weight: Tensor) -> None:
        output = function(input, weight, case.bias(device))
        if output.requires_grad:
            output.sum().backward()

    input, weight, expected = case.input(device), case.weight(device), of_torch(case)
    for function in (case.conv, case.inverse):
        for needs_grad in ((False, False), (True, False), (True, True)):
            for tensor, needs in zip((input, weight), needs_grad, strict=True):
                tensor.requires_grad_(needs)
            assert operations(step, function, input, weight) == (1 + sum(needs_grad)) * expected


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_vmap_and_programs(inverse: bool, device: str):
    layer, input = InvertibleConv2d(8, (3, 2), bias=True, device=device), torch.randn(5, 8, 7, 6, device=device)
    function = layer.solve if inverse else layer.convolve
    expected = 2 * 5 * 7 * 6 * layer.raw_weight.numel()
    assert operations(torch.func.vmap(lambda image: function(image[None])), input) == expected
    program = torch.export.export(layer, (input, None), {"inverse": inverse})
    for each in (program, program.run_decompositions()):
        assert operations(lambda each=each: each.module()(input, None, inverse=inverse)) == expected
