"""Trains a flow of the evidence for a given time and evaluates it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from examples import image_data
from nflows_kconv import InvertibleConv2d
from nflows_kconv.diagnostics import round_trip
from nflows_kconv.flows.images import bits_per_dim, grid
from nflows_kconv.flows.sampling import GraphSampler
from nflows_kconv.nflows import finc_flow

UNIT = ("TL", "TR", "BL", "BR")
PAIR = (("TL",), ("BR",))
# Arguments of finc_flow; the kernel size, where it is not among them, is that of the configuration. Those of the first
# dictionary are trained with all seeds, the others with one.
MAIN_METHODS: dict[str, dict[str, Any]] = {
    "Glow": {"kernel_size": None},
    "FInC unit": {"corners": UNIT},
    "pair": {"corners": PAIR},
    "pair of sides": {"corners": (("T",), ("B",)), "kernel_size": (2, 3)},  # what a masked 3 x 3 kernel of Emerging has
}
METHODS = MAIN_METHODS | {
    "FInC unit, inverse": {"corners": UNIT, "direction": "inverse"},
    "pair, inverse": {"corners": PAIR, "direction": "inverse"},
    "pair, dilated": {"corners": PAIR},  # by 2 in every second step
}
BATCH = 64
LEARNING_RATE = 1e-3  # of Adam; rises over the first 2 % of the steps, falls to zero over the last 30 %
LARGEST_GRADIENT = 1.0  # norm of the gradient of bits per dimension
POINTS = 20  # on a learning curve
VALIDATION = 512  # most images, from the last tenth of the training set, which is held out
SAMPLES = 100
WARM_UP, ROUNDS = 2, 7  # of `time_all`


class Configuration(NamedTuple):
    """A flow to train.

    Attributes:
        method: A key of `METHODS`.
        levels: L.
        steps: K, in each level.
        width: Width of the coupling networks.
        kernel: Kernel size of the convolutions; 0 for Glow.
        seed: Seed of weights, batches and noise.
    """

    method: str
    levels: int
    steps: int
    width: int
    kernel: int
    seed: int

    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """Returns the untrained flow."""
        torch.manual_seed(self.seed)
        options = {"kernel_size": self.kernel, **METHODS[self.method]}
        flow = finc_flow(image_shape, self.levels, self.steps, hidden_channels=self.width, **options)
        if self.method == "pair, dilated":
            layers = [module for module in flow.modules() if isinstance(module, InvertibleConv2d)]
            for layer in (*layers[2::4], *layers[3::4]):
                layer.dilation = (2, 2)
        return flow


class Timing(NamedTuple):
    """The times of a flow of some size.

    Attributes:
        step_seconds: Time of a training step.
        sampling_seconds: Time to draw `SAMPLES` images.
    """

    step_seconds: float
    sampling_seconds: float


def time_all(
    configurations: Sequence[Configuration], data_name: str, data_root: Path, device: str
) -> dict[Configuration, Timing]:
    """Returns the times of all flows, measured in turns, so other load slows all of them.

    On the CPU they are CPU times of one thread.
    """
    torch.set_num_threads(1)
    clock = time.process_time if device == "cpu" else _gpu_clock
    data = image_data.load(data_name, data_root)
    images = default_collate([data.train[index][0] for index in range(BATCH)]).to(device)
    functions = []
    for configuration in configurations:
        flow = configuration.build(data.image_shape).to(device)
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.0)
        functions += [partial(_step, flow, optimizer, images), GraphSampler(flow, SAMPLES)]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(WARM_UP + ROUNDS):
        for function, values in zip(functions, samples, strict=True):
            values.append(_time(function, clock))
    medians = [statistics.median(values[WARM_UP:]) for values in samples]
    return dict(zip(configurations, map(Timing, medians[::2], medians[1::2]), strict=True))


def run(configuration: Configuration, data_name: str, data_root: Path, steps: int, device: str) -> dict[str, Any]:
    """Trains for a number of steps and returns the measurements.

    Tests the weights that were best on the validation images, because small data sets overfit soon.
    """
    torch.set_num_threads(1)
    data = image_data.load(data_name, data_root)
    train, held_out = _split(data.train.tensors[0].to(device))  # type: ignore[attr-defined]
    test = default_collate([image for image, _ in data.test]).to(device)
    flow = configuration.build(data.image_shape).to(device)
    optimizer = torch.optim.Adam(flow.parameters())
    curve: list[dict[str, float]] = []
    least, best = math.inf, copy.deepcopy(flow.state_dict())
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step / steps)
        _step(flow, optimizer, train[torch.randint(len(train), (BATCH,), device=device)])
        if step >= steps * (len(curve) + 1) / POINTS:
            value = _bits(flow, held_out).mean().item()
            curve.append({"step": step, "bits_per_dim": value})
            if value < least:
                least, best = value, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(best)
    values = _bits(flow, test)
    torch.manual_seed(0)
    return {
        **configuration._asdict(),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "training_steps": steps,
        "bits_per_dim": values.mean().item(),
        "standard_error": (values.std() / len(values) ** 0.5).item(),
        "round_trip_error": round_trip(flow, test[:SAMPLES]).error,
        "curve": curve,
        "samples": grid(GraphSampler(flow, SAMPLES)(), 10).cpu(),
    }


def _step(flow: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    flow.train()
    optimizer.zero_grad()
    bits_per_dim(flow.log_prob(images), images.shape[1:]).mean().backward()
    nn.utils.clip_grad_norm_(flow.parameters(), LARGEST_GRADIENT)
    optimizer.step()


def _split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the training images, and validation images evenly spaced over the last tenth.

    Patches of photographs overlap only with patches near them in this order.
    """
    number = len(images) - len(images) // 10
    held_out = images[number:]
    return images[:number], held_out[:: -(-len(held_out) // VALIDATION)]


def _schedule(fraction: float) -> float:
    return min(1.0, fraction / 0.02, (1 - fraction) / 0.3)


@torch.no_grad()
def _bits(flow: nn.Module, images: Tensor) -> Tensor:
    """Returns bits per dimension of each image, with the same noise at each call; restores the random state."""
    flow.eval()
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return torch.cat([bits_per_dim(flow.log_prob(batch), batch.shape[1:]) for batch in images.split(256)])


def _time(function: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
