"""Trains two multiscale flows on scikit-learn's digits: Glow with and without invertible 3x3 convolutions.

    python examples/train_digits.py [--library nflows|normflows] [--steps 2000] [--seed 0] [--output demo]

A step of the first model is [3x3 from the top left -> 3x3 from the bottom right -> ActNorm -> 1x1 -> affine coupling];
the second, the baseline, lacks the 3x3s. Both start from the same other parameters and see the same batches with the
same noise for the same number of steps. Prints the bits per dimension of the test set, the round-trip error and the
sampling time of both; writes samples.png and learning_curve.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import torch
from matplotlib.figure import Figure
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import nflows_kconv
import nflows_kconv.nflows
import nflows_kconv.normflows

# Both libraries call functions that PyTorch will remove: nflows in the inverse of its 1x1, normflows in its 1x1.
warnings.filterwarnings("ignore", message="torch.(triangular_solve|lu) is deprecated")

# The digits have 8x8 pixels, which the two squeezes would reduce to 4x4 and 2x2. A coupling's network sees all of them
# at once, and the 3x3s did not help there. So the digits are upscaled; bits per dimension are for the upscaled images.
SIZE = 16
GRAY_LEVELS = 17
DIMENSIONS = SIZE * SIZE

LEVELS = 2  # of the multiscale flow
STEPS = 2  # of the flow per level; with 4, both models are equally good
WIDTH = 32  # of the coupling networks
LOGIT_MARGIN = 0.05

BATCH = 64
LEARNING_RATE = 2e-3
CORNERS = {"3x3 + 1x1": ("TL", "BR"), "1x1 (Glow)": ()}


class Model(NamedTuple):
    """A flow of either library with common method names."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    encode: Callable[[Tensor], Tensor | list[Tensor]]
    decode: Callable[[Tensor | list[Tensor]], Tensor]


def load_images() -> tuple[Tensor, Tensor]:
    """Loads training and test images, [B, 1, SIZE, SIZE], whole numbers from 0 to 16."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, (SIZE, SIZE), mode="bicubic").round().clamp(0, GRAY_LEVELS - 1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1400], images[1400:]


def dequantize(images: Tensor) -> Tensor:
    """Adds uniform noise inside each gray level, which turns probabilities into a density; values in [0, 1)."""
    return (images + torch.rand_like(images)) / GRAY_LEVELS


def bits_per_dim(log_prob: Tensor) -> Tensor:
    """Returns -log2 of the probability of an image, per pixel.

    By Jensen's inequality log P(image) >= E log p(dequantized image) - DIMENSIONS log GRAY_LEVELS.
    """
    return -log_prob / (DIMENSIONS * math.log(2)) + math.log2(GRAY_LEVELS)


def convolutions(layer: Callable[..., nn.Module], channels: int, corners: Sequence[str]) -> list[nn.Module]:
    """Builds the k x k convolutions of a step with separate random numbers, so the rest starts as without them."""
    with torch.random.fork_rng():
        return [layer(channels, kernel_size=3, corners=corner) for corner in corners]


class CouplingNet(nn.Sequential):
    """The network of normflows' GlowBlock for nflows: 3x3 -> ReLU -> 1x1 -> ReLU -> 3x3, which starts at 0."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        last = nn.Conv2d(WIDTH, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Conv2d(in_channels, WIDTH, 3, padding=1)
        super().__init__(first, nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), last)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Ignores the context, which nflows passes."""
        return super().forward(inputs)


def nflows_model(corners: Sequence[str]) -> Model:
    """Builds the nflows model, which lists transforms from data to noise."""
    levels = transforms.MultiscaleCompositeTransform(LEVELS)
    channels, size = 1, SIZE
    for _ in range(LEVELS):
        channels, size = 4 * channels, size // 2
        level = [transforms.SqueezeTransform()]
        mask = [index % 2 for index in range(channels)]
        for _ in range(STEPS):
            level += convolutions(nflows_kconv.nflows.InvertibleConv2d, channels, corners)
            level += [
                transforms.ActNorm(channels),
                transforms.OneByOneConvolution(channels),
                transforms.AffineCouplingTransform(mask, CouplingNet),
            ]
        levels.add_transform(transforms.CompositeTransform(level), (channels, size, size))
        channels //= 2  # one half leaves, the other continues
    margin = transforms.PointwiseAffineTransform(LOGIT_MARGIN, 1 - 2 * LOGIT_MARGIN)
    transform = transforms.CompositeTransform([margin, transforms.Logit(), levels])
    flow = Flow(transform, StandardNormal([DIMENSIONS]))
    return Model(flow, flow.log_prob, flow.sample, lambda x: transform(x)[0], lambda z: transform.inverse(z)[0])


def normflows_model(corners: Sequence[str]) -> Model:
    """Builds the normflows model, which lists flows from latent to data, the last level first."""
    bases, levels = [], []
    channels, size = 1, SIZE
    for index in range(LEVELS):
        channels, size = 4 * channels, size // 2
        level = []
        for _ in range(STEPS):
            level += convolutions(nflows_kconv.normflows.InvertibleConv2d, channels, corners)
            # From the data, against the flow's direction: ActNorm -> 1x1 -> coupling.
            level.append(nf.flows.GlowBlock(channels, WIDTH))
        levels.insert(0, [*reversed(level), nf.flows.Squeeze()])
        channels //= 1 if index == LEVELS - 1 else 2  # one half leaves, the other continues
        bases.insert(0, nf.distributions.DiagGaussian((channels, size, size), trainable=False))
    merges = [nf.flows.Merge() for _ in range(LEVELS - 1)]
    logit = nf.transforms.Logit(LOGIT_MARGIN)
    flow = nf.MultiscaleFlow(bases, levels, merges, transform=logit, class_cond=False)
    return Model(
        flow,
        lambda x: flow.log_prob(x, None),
        lambda number: flow.sample(number)[0],
        lambda x: flow.inverse_and_log_det(x)[0],
        lambda z: flow.forward_and_log_det(z)[0],
    )


LIBRARIES = {"nflows": nflows_model, "normflows": normflows_model}


@torch.no_grad()
def evaluate(model: Model, images: Tensor, draws: int) -> Tensor:
    """Returns bits per dimension of each image, the mean over draws of the noise, equal at every call."""
    model.module.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [bits_per_dim(model.log_prob(dequantize(images))) for _ in range(draws)]
    model.module.train()
    return torch.stack(values).mean(0)


def train(name: str, model: Model, images: Tensor, test_images: Tensor, steps: int) -> list[tuple[int, float]]:
    """Trains by maximum likelihood and returns the learning curve: (step, test bits per dimension)."""
    optimizer = torch.optim.Adam(model.module.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    curve = []
    progress = tqdm(range(1, steps + 1), desc=name, unit="step")
    for step in progress:
        batch = dequantize(images[torch.randint(len(images), (BATCH,))])
        loss = bits_per_dim(model.log_prob(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(bpd=f"{loss.item():.3f}", refresh=False)
        if step % max(1, steps // 20) == 0 or step == steps:
            curve.append((step, evaluate(model, test_images, draws=1).mean().item()))
    return curve


@torch.no_grad()
def sampling_time(model: Model) -> float:
    """Returns the seconds for 100 images, the median of several runs."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        model.sample(100)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plot_samples(kinds: dict[str, Tensor], path: Path) -> None:
    """Draws 60 images of each kind, side by side."""
    figure = Figure(figsize=(4 * len(kinds), 3), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        tiles = F.pad(images[:60, 0], (1, 1, 1, 1)).unflatten(0, (6, 10))
        grid = tiles.transpose(1, 2).reshape(6 * tiles.shape[-1], -1)
        axes.imshow(grid, cmap="gray_r", vmin=0, vmax=GRAY_LEVELS - 1)
        axes.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draws the learning curves."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=name)
    axes.set(xlabel="training step", ylabel="test bits per dimension")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, default="nflows")
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the pictures")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")

    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    images, test_images = load_images()
    print(nflows_kconv.available_backends()["cpu"])
    print(
        f"digits at {SIZE}x{SIZE}; guessing takes log2 {GRAY_LEVELS} = {math.log2(GRAY_LEVELS):.2f} bits per dimension"
    )
    curves, results, drawn = {}, {}, {"digits": test_images}
    for name, corners in CORNERS.items():
        torch.manual_seed(arguments.seed)
        model = LIBRARIES[arguments.library](corners)
        torch.manual_seed(arguments.seed)
        start = time.perf_counter()
        curves[name] = train(name, model, images, test_images, arguments.steps)
        seconds = time.perf_counter() - start
        model.module.eval()
        results[name] = evaluate(model, test_images, draws=10)
        with torch.no_grad():
            noisy = dequantize(test_images)
            error = (model.decode(model.encode(noisy)) - noisy).abs().max()
            drawn[name] = (model.sample(60) * GRAY_LEVELS).floor().clamp(0, GRAY_LEVELS - 1)
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        print(
            f"{name:<11} test bits per dimension {mean_and_error(results[name])}, round-trip error {error:.1e}, "
            f"100 samples in {1000 * sampling_time(model):.0f} ms, {arguments.steps} steps in {seconds:.0f} s, "
            f"{parameters} parameters"
        )
    ours, glow = results.values()
    print(f"difference, image by image: {mean_and_error(ours - glow)}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    plot_samples(drawn, arguments.output / "samples.png")
    plot_curves(curves, arguments.output / "learning_curve.png")
    print(f"wrote {arguments.output / 'samples.png'} and {arguments.output / 'learning_curve.png'}")


def mean_and_error(values: Tensor) -> str:
    """Returns the mean and its standard error."""
    return f"{values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
