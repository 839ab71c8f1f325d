"""Trains flows of blurred images: unconditional, with the blur's width in the couplings, and also in the kernels.

    python examples/conditional_kernels.py [--steps 300] [--seeds 3]

An image is white noise, blurred to a width between 0.3 and 2 pixels, plus a little noise. Pixels have variance 1 at
every width, which affects only their correlations. A convolution undoes correlations, and each width needs another one.
Prints the held-out log-density per pixel of three flows, mean and standard deviation over seeds, and that of the true
distribution, which is known, because it is normal.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from nflows_kconv.nflows import ImageFlow, finc_flow

SIZE = 16
WIDTHS = 0.3, 2.0
NOISE = 0.1  # standard deviation
FEATURES = 4  # features per width
BATCH = 64
TEST_IMAGES = 2000
CONDITIONS = {
    "unconditional": {},
    "context in the couplings": {"context_shape": (FEATURES,)},
    "context in kernels and couplings": {"context_shape": (FEATURES,), "conditional_kernels": True},
}


def blurs(widths: Tensor) -> Tensor:
    """Returns the matrix that blurs columns for each width, [B, SIZE, SIZE], with rows of norm 1."""
    distances = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
    matrices = torch.exp(-0.5 * (distances / widths[:, None, None]) ** 2)
    return matrices / matrices.norm(dim=2, keepdim=True)


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Draws images, [B, 1, SIZE, SIZE], and their widths, [B]."""
    widths = torch.empty(count).uniform_(*WIDTHS)
    matrices = blurs(widths)
    blurred = matrices @ torch.randn(count, SIZE, SIZE) @ matrices.mT
    images = (blurred + NOISE * torch.randn(count, SIZE, SIZE)) / math.sqrt(1 + NOISE**2)
    return images[:, None], widths


def to_features(widths: Tensor) -> Tensor:
    """Returns waves over the range of widths, [B, FEATURES]."""
    low, high = WIDTHS
    return torch.cos(math.pi * (widths[:, None] - low) / (high - low) * torch.arange(1, FEATURES + 1))


def true_log_prob(images: Tensor, widths: Tensor) -> Tensor:
    """Returns the log-density of the distribution of `draw`, [B]."""
    matrices = blurs(widths).double()
    values, vectors = torch.linalg.eigh(matrices @ matrices.mT)
    variances = (values[:, :, None] * values[:, None, :] + NOISE**2) / (1 + NOISE**2)
    coordinates = vectors.mT @ images[:, 0].double() @ vectors
    return -0.5 * (coordinates**2 / variances + (2 * math.pi * variances).log()).sum((1, 2))


def train(name: str, flow: ImageFlow, steps: int) -> None:
    """Trains by maximum likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc=name, unit="step"):
        loss = -log_prob(flow, *draw(BATCH)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        schedule.step()


def log_prob(flow: ImageFlow, images: Tensor, widths: Tensor) -> Tensor:
    """Returns the flow's log-density of images of these widths, [B]."""
    return flow.log_prob(images, None if flow.architecture.context_shape is None else to_features(widths))


def main() -> None:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training, for each flow")
    parser.add_argument("--seeds", type=int, default=3, help="how many times to train each flow")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small

    rows = []
    for name, options in CONDITIONS.items():
        densities, parameters, start = [], 0, time.process_time()
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            flow = finc_flow(
                (1, SIZE, SIZE),
                levels=1,
                steps=2,
                hidden_channels=16,
                corners=(("TL",), ("BR",)),
                preprocessing=None,
                **options,
            )
            train(name, flow, arguments.steps)
            flow.eval()
            torch.manual_seed(1000)  # the same images for all
            images, widths = draw(TEST_IMAGES)
            with torch.no_grad():
                densities.append(log_prob(flow, images, widths).mean().item() / SIZE**2)
            parameters = sum(parameter.numel() for parameter in flow.parameters())
        seconds = (time.process_time() - start) / arguments.seeds
        mean, deviation = torch.tensor(densities).mean(), torch.tensor(densities).std(correction=0)
        rows.append(f"{name:33} {mean:.3f} +- {deviation:.3f}  {parameters:10}  {seconds:11.1f}")
    print("flow                              nats a pixel      parameters  CPU seconds")
    print("\n".join(rows))
    print(f"{'the true distribution':33} {true_log_prob(images, widths).mean() / SIZE**2:.3f}")


if __name__ == "__main__":
    main()
