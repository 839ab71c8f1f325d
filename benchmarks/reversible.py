"""Measures memory and time of a training step over the number of steps K: ordinary, reversible and checkpointed.

    python -m benchmarks.reversible                                  prints the table of the CPU, on one thread
    python -m benchmarks.reversible --output FILE.json               and writes it, with machine, versions and date
    python -m benchmarks.reversible --device cuda --output FILE.json the same on the GPU

The model is a stack of K steps [k x k convolution -> ActNorm -> 1 x 1 convolution -> affine coupling], forward and
backward. "checkpoint" is `torch.utils.checkpoint` around each step, which keeps every step's input and needs no
inverse.

Memory is PyTorch's peak during the training step above the memory before it. It includes the gradients of the
parameters, which every method needs and which grow with K. Time is the shortest of several turns, as the least
disturbed; on the CPU it is the CPU time of one thread.

Gradients are compared as one vector with the ordinary ones, and with those of float64, which show the error of float32
itself. A ReLU whose input rounds to the other side of zero changes them more than rounding; the same stack with SiLU
shows the rest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import command_line, layer, memory
from nflows_kconv import InvertibleConv2d
from nflows_kconv.flows import reversible, steps

LEAST_TURNS = 5


class Size(NamedTuple):
    """The trained model.

    Attributes:
        batch: Number of images.
        shape: (C, H, W), as in the first level of a flow of 32 x 32 colour images.
        hidden_channels: Width of the coupling networks.
        steps: Values of K.
    """

    batch: int
    shape: tuple[int, int, int]
    hidden_channels: int
    steps: tuple[int, ...]


SIZES = {
    "cpu": Size(16, (12, 16, 16), 128, (8, 16, 32, 64)),
    "cuda": Size(64, (12, 16, 16), 512, (8, 16, 32, 64)),
    "tiny": Size(2, (4, 2, 2), 4, (9,)),
}


class Checkpointed(steps.Sequence):
    """A stack that keeps the input of each step."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms data to latent."""
        total = input.new_zeros(len(input))
        for module in self.steps:
            input, log_abs_det = checkpoint(module, input, use_reentrant=False, preserve_rng_state=False)
            total = total + log_abs_det
        return input, total


STACKS = {"ordinary": steps.Sequence, "reversible": reversible.Chain, "checkpoint": Checkpointed}


def build(size: Size, count: int, device: str) -> tuple[list[nn.Module], Tensor]:
    """Returns the steps, with ActNorm initialised, and a batch."""
    torch.manual_seed(0)
    channels = size.shape[0]
    modules: list[nn.Module] = []
    for _ in range(count):
        network = steps.coupling_network(channels, size.hidden_channels)
        nn.init.normal_(network[-1].weight, std=0.02)  # at zero the other gradients of the network are zero
        layers = [InvertibleConv2d(channels), steps.ActNorm(channels), steps.InvertibleConv1x1(channels)]
        modules.append(steps.Sequence([*layers, steps.AffineCoupling(network)]))
    stack = steps.Sequence(modules).to(device)
    batch = torch.randn(size.batch, *size.shape, device=device)
    with torch.no_grad():
        stack(batch)
    return modules, batch


def train(stack: nn.Module, batch: Tensor) -> None:
    """Runs a forward and a backward pass of the negative log-likelihood."""
    stack.zero_grad()
    outputs, log_abs_det = stack(batch)
    (0.5 * outputs.square().sum((1, 2, 3)) - log_abs_det).mean().backward()


def peak_bytes(stack: nn.Module, batch: Tensor) -> int:
    """Returns the bytes that a training step allocates at its peak."""
    train(stack, batch)  # lets libraries allocate what they allocate once
    stack.zero_grad()
    return memory.peak_growth(lambda: train(stack, batch), batch.device.type)


def shortest_times(stacks: dict[str, nn.Module], batch: Tensor, seconds: float) -> dict[str, float]:
    """Returns the seconds of a training step of each stack; they take turns."""
    synchronize, clock = (
        (torch.cuda.synchronize, time.perf_counter) if batch.is_cuda else (lambda: None, time.process_time)
    )
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for stack in stacks.values():
        train(stack, batch)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ordinary"]) < LEAST_TURNS:
        for name, stack in stacks.items():
            synchronize()
            start = clock()
            train(stack, batch)
            synchronize()
            times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def gradient_errors(stacks: dict[str, nn.Module], batch: Tensor) -> dict[str, dict[str, float]]:
    """Compares each stack's gradients with the ordinary ones and with those in float64."""
    gradients = {name: _gradients(stack, batch) for name, stack in stacks.items()}
    references = {
        "ordinary": gradients["ordinary"],
        "float64": _gradients(copy.deepcopy(stacks["ordinary"]).double(), batch.double()),
    }
    return {
        reference: {name: ((found - exact).norm() / exact.norm()).item() for name, found in gradients.items()}
        for reference, exact in references.items()
    }


def measure(size: Size, steps: int, device: str, seconds: float) -> dict[str, Any]:
    """Returns a row of the table."""
    modules, batch = build(size, steps, device)
    stacks = {name: stack(modules) for name, stack in STACKS.items()}
    row = {
        "steps": steps,
        "gradient bytes": sum(parameter.nbytes for parameter in stacks["ordinary"].parameters()),
        "bytes": {name: peak_bytes(stack, batch) for name, stack in stacks.items()},
        "seconds": shortest_times(stacks, batch, seconds),
        "gradient errors": gradient_errors(stacks, batch),
    }
    for module in stacks["ordinary"].modules():
        for name, part in module.named_children():
            if isinstance(part, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return {**row, "gradient errors with SiLU": gradient_errors(stacks, batch)}


def sections(size: Size, device: str, seconds: float) -> Iterator[tuple[str, Any]]:
    """Measures and prints; yields the size, and the rows so far after each row."""
    yield "size", size._asdict()
    rows = []
    for count in size.steps:
        rows.append(measure(size, count, device, seconds))
        print_row(rows[-1])
        yield "rows", rows


def print_row(row: dict[str, Any]) -> None:
    """Prints a block of the table."""
    print(f"\nK = {row['steps']}, gradients of the parameters {row['gradient bytes'] / 2**20:.1f} MiB")
    for name in STACKS:
        seconds = row["seconds"][name]
        errors = [
            row[f"gradient errors{kind}"][to][name] for to in ("ordinary", "float64") for kind in ("", " with SiLU")
        ]
        print(
            f"  {name:10s} {row['bytes'][name] / 2**20:7.1f} MiB {1e3 * seconds:7.1f} ms "
            f"({seconds / row['seconds']['ordinary']:4.2f}x), gradients "
            "{:.1e} (SiLU {:.1e}) from ordinary, {:.1e} (SiLU {:.1e}) from float64".format(*errors),
            flush=True,
        )


def _gradients(stack: nn.Module, batch: Tensor) -> Tensor:
    train(stack, batch)
    return torch.cat([parameter.grad.flatten().double() for parameter in stack.parameters()])


def main() -> None:
    """Parses the arguments and prints the table."""
    arguments = command_line.parse(__doc__, seconds=10.0)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    size = SIZES["tiny" if arguments.tiny else arguments.device]
    layer.run(arguments, lambda _: sections(size, arguments.device, arguments.seconds))


if __name__ == "__main__":
    main()
