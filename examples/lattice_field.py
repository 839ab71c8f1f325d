"""Trains flows to sample a field on a lattice, without and with periodic convolutions.

    python examples/lattice_field.py [--steps 600] [--seeds 0 1 2]

A scalar field phi on an 8 x 8 torus has the density exp(-S(phi)) / Z with the action

    S = sum_x [m^2 phi(x)^2 + lambda phi(x)^4 + sum_mu phi(x) (2 phi(x) - phi(x + mu) - phi(x - mu))]

of Albergo, Kanwar, Shanahan 2019 (arXiv 1904.12072), with m^2 = -4 and lambda = 8. There are no data: a flow maps noise
to fields, and minimises the reverse Kullback-Leibler divergence, E[log q + S]. Weights exp(-S) / q correct its errors.
Prints for each flow the effective sample size, the share of its fields that count; the weighted mean of phi^2, which
must be equal for all flows up to its error; and the seconds of training.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import product

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nflows_kconv import PeriodicConv2d
from nflows_kconv.flows import steps

SIZE = 8
MASS_SQUARED, COUPLING = -4.0, 8.0
CHANNELS = 4  # of the squeezed fields
STEPS_OF_THE_FLOW = 4
HIDDEN_CHANNELS = 32
BATCH = 128
SAMPLES = 10_000


def action(field: Tensor) -> Tensor:
    """Computes S, [B], of fields [B, 1, H, W]."""
    density = MASS_SQUARED * field**2 + COUPLING * field**4
    for axis in (2, 3):
        density = density + field * (2 * field - field.roll(1, axis) - field.roll(-1, axis))
    return density.sum((1, 2, 3))


def build_flow(periodic: bool) -> steps.Sequence:
    """Returns a flow from noise, [B, 4, 4, 4], to fields, [B, 1, 8, 8], whose steps have no borders."""
    modules: list[nn.Module] = []
    for _ in range(STEPS_OF_THE_FLOW):
        network = steps.coupling_network(CHANNELS, HIDDEN_CHANNELS, padding_mode="circular")
        modules += [PeriodicConv2d(CHANNELS)] * periodic
        modules += [steps.ActNorm(CHANNELS), steps.InvertibleConv1x1(CHANNELS), steps.AffineCoupling(network)]
    return steps.Sequence([*modules, steps.Inverse(steps.Squeeze())])


def sample(flow: nn.Module, number: int) -> tuple[Tensor, Tensor]:
    """Draws fields and returns them with their log q, [B]."""
    noise = torch.randn(number, CHANNELS, SIZE // 2, SIZE // 2)
    field, log_abs_det = flow(noise)
    normal = -0.5 * (noise**2 + math.log(2 * math.pi)).sum((1, 2, 3))
    return field, normal - log_abs_det


def train(name: str, flow: nn.Module, number_of_steps: int) -> None:
    """Minimises E[log q + S]."""
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, number_of_steps)
    for _ in tqdm(range(number_of_steps), desc=name, unit="step"):
        field, log_q = sample(flow, BATCH)
        loss = (log_q + action(field)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(flow: nn.Module) -> tuple[float, float]:
    """Returns the effective sample size, as a share, and the mean of phi^2."""
    field, log_q = sample(flow, SAMPLES)
    weights = torch.softmax(-action(field) - log_q, 0)
    return 1 / (SAMPLES * weights.square().sum().item()), (weights @ field.square().mean((1, 2, 3))).item()


def main() -> None:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training, for each flow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more are no faster on such small tensors

    lines = []
    for seed, periodic in product(arguments.seeds, (False, True)):
        torch.manual_seed(seed)
        name, flow = "periodic 3x3" if periodic else "1x1 alone", build_flow(periodic)
        start = time.perf_counter()
        train(f"{name}, seed {seed}", flow, arguments.steps)
        seconds = time.perf_counter() - start
        size, square = evaluate(flow.eval())
        lines.append(f"{seed:4}  {name:12}  {size:21.4f}  {square:13.4f}  {seconds:7.1f}")
    print("seed  convolution   effective sample size  mean of phi^2  seconds", *lines, sep="\n")


if __name__ == "__main__":
    main()
