"""Times the layer against the libraries' 1 x 1 convolutions, as ratios within one run.

    python -m benchmarks.one_by_one                       prints the tables of the CPU, with one thread and with two
    python -m benchmarks.one_by_one --output FILE.json    and writes them, with machine, versions and date
    python -m benchmarks.one_by_one --device cuda         prints the tables of the GPU, of eager calls

The baselines are nflows' OneByOneConvolution and normflows' Invertible1x1Conv, with the LU decomposition as in its
GlowBlock. The others are this package's, in nflows: InvertibleConv1x1, InvertibleConv2d with 3 x 3 kernels in four
groups and in one, and ConditionalInvertibleConv2d in four, with contexts of eight numbers. All are called as modules,
so times include log-determinants. "forward" goes from data to latent and "inverse" back, whatever the library
calls them; "with backward" adds the gradients in input and parameters. The contestants of a row take turns; times are
medians.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import normflows
import torch
from nflows.transforms import OneByOneConvolution
from torch import Tensor, nn

from benchmarks import command_line, layer, timing, workloads
from benchmarks.contestants import Contestants
from nflows_kconv.nflows import ConditionalInvertibleConv2d, InvertibleConv1x1, InvertibleConv2d

Direction = Callable[[Tensor], tuple[Tensor, Tensor]]

YARDSTICKS: dict[str, Callable[[int], nn.Module]] = {
    "nflows": OneByOneConvolution,
    "normflows": partial(normflows.flows.Invertible1x1Conv, use_lu=True),
}
OURS: dict[str, Callable[[int], nn.Module]] = {
    "1x1": InvertibleConv1x1,
    "3x3, four groups": InvertibleConv2d,
    "3x3, one group": partial(InvertibleConv2d, corners="TL"),
    "3x3, conditional": partial(ConditionalInvertibleConv2d, context_features=8),
}
OPERATIONS = ("forward", "inverse", "forward with backward", "inverse with backward")
SHAPES: list[workloads.Shape] = [*workloads.PAPER_SHAPES, (48, 32, 32)]
BATCHES = (100, 1)
THREADS = {"cpu": (1, 2), "cuda": (1,)}
CLOCKS = {"cpu": timing.wall, "cuda": timing.eager}


def contestants(batch: int, shape: workloads.Shape, device: str) -> dict[str, Contestants]:
    """Returns the calls of all layers by operation."""
    x = torch.randn(batch, *shape, device=device)
    leaf = x.clone().requires_grad_()
    calls: dict[str, Contestants] = {operation: {} for operation in OPERATIONS}
    for name, build in (YARDSTICKS | OURS).items():
        module = build(shape[0]).to(device)
        for operation, direction in directions(module, batch).items():
            calls[operation][name] = partial(torch.no_grad()(direction), x)
            leaves = [leaf, *module.parameters()]
            calls[f"{operation} with backward"][name] = partial(with_backward, direction, leaves, x)
    return calls


def directions(module: nn.Module, batch: int) -> dict[str, Direction]:
    """Returns both directions by their names here, for a batch of this size."""
    forward, inverse = module, module.inverse
    if isinstance(module, ConditionalInvertibleConv2d):
        context = torch.randn(batch, module.context_features).to(module.raw_weight)
        forward, inverse = partial(forward, context=context), partial(inverse, context=context)
    if isinstance(module, normflows.flows.Flow):
        forward, inverse = inverse, forward
    return {"forward": forward, "inverse": inverse}


def with_backward(direction: Direction, leaves: list[Tensor], gradient: Tensor) -> None:
    """Computes the output for the first leaf, and the gradients in all leaves from a gradient of the output."""
    torch.autograd.grad(direction(leaves[0])[0], leaves, gradient)


def sections(device: str, seconds: float, *, tiny: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measures and prints; yields the rows so far after each table."""
    batches, shapes = ((2,), [(4, 3, 5)]) if tiny else (BATCHES, SHAPES)
    before, rows = torch.get_num_threads(), []
    for threads in THREADS[device]:
        torch.set_num_threads(threads)
        for operation in OPERATIONS:
            print(f"\n{operation}, {threads} thread{'s' * (threads > 1)}; ratios to nflows' and to normflows' 1x1\n")
            print("batch  (C, H, W)          nflows   normflows" + "".join(f"{name:>20s}" for name in OURS))
            for batch in batches:
                for shape in shapes:
                    times = CLOCKS[device](contestants(batch, shape, device)[operation], seconds)
                    rows.append(
                        {"threads": threads, "operation": operation, "batch": batch, "shape": shape}
                        | {"microseconds": times}
                    )
                    print(describe(rows[-1]), flush=True)
            yield "1x1", rows
    torch.set_num_threads(before)


def describe(row: dict[str, Any]) -> str:
    """Returns a line of a table."""
    times = row["microseconds"]
    yardsticks = "".join(f"{times[name]:9.0f} us" for name in YARDSTICKS)
    ratios = "".join("".join(f"{times[name] / times[yardstick]:9.2f}x" for yardstick in YARDSTICKS) for name in OURS)
    return f"{row['batch']:5d}  {row['shape']!s:14s} {yardsticks}{ratios}"


def main() -> None:
    """Parses the arguments and prints the tables."""
    warnings.filterwarnings("ignore", "torch.(lu|triangular_solve) is deprecated")  # of nflows and normflows
    arguments = command_line.parse(__doc__, seconds=2.0)
    torch.manual_seed(0)
    layer.run(arguments, lambda _: sections(arguments.device, arguments.seconds, tiny=arguments.tiny))


if __name__ == "__main__":
    main()
