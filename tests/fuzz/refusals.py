"""Invalid calls, which must be refused with one clear exception."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz.calls import CALLS
from fuzz.oracle import STENCILS, Problem, Wrong
from fuzz.tensors import DTYPES, draw_problem, lay_out
from nflows_kconv import functional, use_backend

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
# Words that indicate a bug, or C++ that lost the reason.
UNREADABLE = ("INTERNAL ASSERT", "Internal error", "please report", "API call failed", "std::")


def functions(random: Random) -> int:
    """Calls the functions with one or two invalid arguments."""
    problem = draw_problem(random, torch.float64)
    for _ in range(CALLS):
        name = random.choice(("conv2d", "conv2d_inverse", "log_abs_det"))
        arguments: dict[str, Any] = {"weight": problem.weight, "corners": problem.corners}
        if name == "log_abs_det":
            arguments |= {"size": (3, 4)}
        else:
            arguments |= {"input": problem.input, "bias": torch.zeros(len(problem.weight), dtype=torch.float64)}
            arguments |= {"dilation": random.choice((1, 2, (1, 3)))}
        for wrong in random.sample(sorted(arguments), random.choice((1, 1, 1, 2))):
            arguments[wrong] = _wrong_argument(random, wrong, arguments[wrong], len(problem.corners))
        try:
            getattr(functional, name)(**arguments)
        except (TypeError, ValueError) as error:
            check_readable(error)
        else:
            raise Wrong(f"{name} accepted {[f'{key}={_brief(value)}' for key, value in arguments.items()]}")
    return CALLS


def _wrong_argument(random: Random, name: str, value: Any, groups: int) -> Any:
    if name == "corners":
        text = ("", "tl", "TLTR", b"TL", ("XX",) * groups, [b"TL"] * groups, [["TL"]] * groups, ["TL", None])
        others = (None, 7, math.nan, {"TL": 1}, {"TL"}, (), [0] * groups, iter(["TL"] * groups), torch.zeros(groups))
        return random.choice((*text, *others, ("TL",) * 997))
    numbers = (-1, -(2**80), 1.5, math.nan, None, "3", [3], True, torch.tensor(3))
    if name == "dilation":
        return random.choice((*numbers, 0, (1, 0), (2,), (1, 1, 1), (2, None)))
    if name == "size":
        return random.choice((*numbers, (3,), (3, 4, 5), *((3, number) for number in (*numbers, 2**63, 10**30))))
    shape = list(value.shape)
    shape[{"input": 1, "weight": random.randrange(2), "bias": 0}[name]] += 1
    shapes = (value[None], value.new_ones(shape), value.new_ones(shape[:-1]))
    dtypes = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.complex128, torch.float8_e5m2)
    types = (value.numpy(), value.tolist(), 0.5, "tensor", object(), b"", slice(None))
    layouts = (value.to_sparse(), torch.nested.nested_tensor([value, value]))
    if value.numel():
        dense = value.float()
        layouts += (torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), dense.to_mkldnn())
    if name == "weight":
        shapes += (value[..., :0], value[:, :, :0])
    if name != "weight":  # log_abs_det gets device and dtype only from it
        shapes += (value.to(torch.float32), value.to("meta"))
    wrong = random.choice((shapes, dtypes, types, layouts))
    return value.to(random.choice(dtypes)) if wrong is dtypes else random.choice(wrong)


def operators(random: Random) -> int:
    """Calls torch.ops directly with invalid arguments."""
    problem = draw_problem(random)
    image, weight = lay_out(random, problem.input), lay_out(random, problem.weight)
    for _ in range(CALLS):
        name = random.choice(("conv", "solve", "weight_gradient"))
        gradient = name == "weight_gradient"
        second, last = (image, list(weight.shape[2:])) if gradient else (weight, random.random() < 0.5)
        arguments = _wrong_operands(random, image, second, problem.numbers, last)
        if not gradient:
            vectors = random.choice((None, problem.bias)), random.choice((None, problem.bias))
            arguments = *arguments[:2], *vectors, arguments[2], [1, 1], random.random() < 0.5, *arguments[3:]
            if random.random() < 0.2:
                wrong = random.sample((_wrong_bias(random, problem.bias), None), 2)
                arguments = image, weight, *wrong, problem.numbers, [1, 1], False, last
        else:
            arguments = *arguments[:3], [1, 1], *arguments[3:], random.random() < 0.5
        try:
            with torch.no_grad(), random.choice((nullcontext(), use_backend("reference"))):
                getattr(torch.ops.nflows_kconv, name)(*arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            check_readable(error)
        else:
            raise Wrong(f"{name} accepted {[_brief(argument) for argument in arguments]}")
    return CALLS


def _wrong_operands(random: Random, first: Tensor, second: Tensor, corners: list[int], last: Any) -> Sequence[Any]:
    pick, gradient = random.choice, isinstance(last, list)
    choice = random.randrange(9)
    if choice == 0:
        return first, second, pick(([], [pick((-1, 4, 7, 12, 16, 64, 2**40, 2**63 - 1)), *corners[1:]])), last
    if choice == 1:
        other = pick([dtype for dtype in (*DTYPES, torch.int64, torch.complex64) if dtype != first.dtype])
        return first, second.detach().to(other), corners, last
    if choice == 2:
        other = pick((torch.int32, torch.bool, torch.complex64))
        return first.detach().to(other), second.detach().to(other), corners, last
    if choice == 3:
        meta = pick((first, second)).detach().to("meta")
        return (meta, second, corners, last) if meta.shape == first.shape else (first, meta, corners, last)
    if choice == 4:
        larger = second.new_ones([size + 1 for size in second.shape])
        return first, pick((second[None], second.flatten(), larger, larger[:, :, 1:, 1:])), corners, last
    if choice == 5:
        return pick((first[None], first.flatten(), first.new_ones(()))), second, corners, last
    if choice == 6:
        if gradient:
            return first, second, corners, pick(([], [3], [0, 3], [3, -1], [3, 3, 3]))
        return first, second[..., :0], corners, last
    if choice == 7:
        sparse = first.detach().as_subclass(Tensor).resolve_neg().contiguous().to_sparse()
        return pick((sparse, [first], "tensor", 1.0)), second, corners, last
    return first, second, pick((None, ["TL"], [0.5] * len(corners), "TL")), last


def _wrong_bias(random: Random, bias: Tensor) -> Any:
    dtypes = [dtype for dtype in (*DTYPES, torch.int64, torch.complex64) if dtype != bias.dtype]
    shapes = bias[None], bias[:, None], bias.new_ones(len(bias) + 1), bias.new_ones(0), bias.new_ones(())
    return random.choice((*shapes, bias.to(random.choice(dtypes)), bias.to("meta"), bias.to_sparse(), 1.0, [bias]))


def sizes(random: Random) -> int:
    """Calls the functions on sizes beyond 32 and 64 bits, on expanded tensors that need no memory."""
    for _ in range(CALLS):
        corners, per_group = tuple(random.choices(STENCILS, k=random.choice((1, 2)))), random.choice((1, 2))
        channels, dtype = len(corners) * per_group, random.choice(DTYPES)
        image, kernel = ([random.choice((1, 2, 3)) for _ in range(n)] for n in (3, 2))
        for _ in range(random.choice((1, 1, 2))):
            image[random.randrange(3)] = random.choice((0, *HUGE))
        if random.random() < 0.3:
            image = [size % 5 for size in image]
            kernel[random.randrange(2)] = random.choice(HUGE)
        function = random.choice((functional.conv2d, functional.conv2d_inverse))
        try:
            input = torch.ones(1, dtype=dtype).as_strided((image[0], channels, *image[1:]), (0, 0, 0, 0))
            weight = torch.ones(1, dtype=dtype).as_strided((channels, per_group, *kernel), (0, 0, 0, 0))
        except RuntimeError:
            continue  # torch has no such tensor
        try:
            got = function(input, weight, corners=corners)
        except RuntimeError as error:  # raised by torch: too many elements, or not enough memory
            check_readable(error)
            if not {*image, *kernel} & set(HUGE):
                raise
            continue
        problem = Problem(corners, input, weight[..., : max(1, image[1]), : max(1, image[2])])
        if got.numel() == 0:
            if got.shape != input.shape:
                raise Wrong(f"got {tuple(got.shape)} for {tuple(input.shape)}")
        elif max(kernel) < 4:
            (problem.check_product if function is functional.conv2d else problem.check_solution)(got, input)
    return CALLS


def check_readable(error: Exception) -> None:
    """Asserts that the message of a refusal is readable."""
    message = str(error)
    if len(message) < 10 or any(words in message for words in UNREADABLE):
        raise Wrong(f"unreadable {type(error).__name__}: {message}") from error


def _brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    shape = "nested" if value.is_nested else str(tuple(value.shape))
    return f"{type(value).__name__}({shape}, {value.dtype}, {value.device}, {value.layout})"
