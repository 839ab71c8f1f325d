"""Trains flows without and with a bound on the gain of their inverses, and sends images to noise and back.

    python examples/bounded_inverse.py [--steps 200] [--learning-rates 0.001 0.003 0.01] [--seed 0]

Neighbouring pixels of a photograph are similar. Convolutions that take their differences raise the likelihood, but the
inverse, which sums them up again, amplifies rounding errors; at a high learning rate, so much that images are lost.
`max_inverse_gain` prevents this. Prints for each flow the test bits per dimension, the largest gain of a layer's
inverse, and the relative errors of a round trip of test images and of the flow's samples; then the verdict of
`nflows_kconv.diagnostics`. All flows see the same patches of one photograph, whose right end is the test set.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from tqdm import tqdm

from nflows_kconv import InvertibleConv2d
from nflows_kconv.diagnostics import conditioning, round_trip
from nflows_kconv.flows.images import bits_per_dim
from nflows_kconv.nflows import ImageFlow, finc_flow

SHAPE = (3, 32, 32)
FEATURE_SIZE = (16, 16)  # after the squeeze, where the layers are
TRAINING_SHARE = 0.8  # share of the photograph's width
BATCH = 64
TEST_IMAGES = 200
SAMPLES = 50
BOUNDS = (None, 4)  # max_inverse_gain


def load_photograph() -> tuple[Tensor, Tensor]:
    """Returns the training and test parts, [C, H, W], with values 0..255."""
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    width = int(TRAINING_SHARE * photograph.shape[2])
    return photograph[..., :width], photograph[..., width:]


def patches(photograph: Tensor, number: int) -> Tensor:
    """Returns patches from random places, [B, C, H, W]."""
    _, height, width = SHAPE
    rows = torch.randint(photograph.shape[1] - height + 1, (number,)).tolist()
    columns = torch.randint(photograph.shape[2] - width + 1, (number,)).tolist()
    return torch.stack([photograph[:, r : r + height, c : c + width] for r, c in zip(rows, columns, strict=True)])


def train(name: str, flow: ImageFlow, photograph: Tensor, steps: int, learning_rate: float) -> None:
    """Trains by maximum likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
    for _ in tqdm(range(steps), desc=name, unit="step"):
        loss = bits_per_dim(flow.log_prob(patches(photograph, BATCH)), SHAPE).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()


def largest_gain(flow: ImageFlow) -> float:
    """Returns the largest ||A^-1||_2 of the flow's layers."""
    layers = [module for module in flow.modules() if isinstance(module, InvertibleConv2d)]
    return max(conditioning(layer, FEATURE_SIZE).inverse_gain for layer in layers)


def main() -> None:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training, for each flow")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], metavar="RATE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    training, test = load_photograph()
    lines, sayings = [], []
    for learning_rate, bound in product(arguments.learning_rates, BOUNDS):
        name = f"{learning_rate:g}  {bound!s:5}"
        torch.manual_seed(arguments.seed)
        flow = finc_flow(
            SHAPE,
            levels=1,
            steps=3,
            hidden_channels=32,
            kernel_size=5,
            corners=(("TL",), ("BR",)),
            max_inverse_gain=bound,
        )
        train(name, flow, training, arguments.steps, learning_rate)
        flow.eval()
        images = patches(test, TEST_IMAGES)
        with torch.no_grad():
            bits = bits_per_dim(flow.log_prob(images), SHAPE).mean()
            of_images, of_samples = (round_trip(flow, each) for each in (images, flow.sample(SAMPLES)))
        lines.append(
            f"{learning_rate:13g}  {bound!s:>5}  {bits:18.3f}  {largest_gain(flow):12.3g}"
            f"  {of_images.error:14.0e}  {of_samples.error:15.0e}"
        )
        sayings.append(f"{learning_rate:g}, {bound}: {of_samples.verdict} {of_samples.cure}")
    print("learning rate  bound  bits per dimension  largest gain  error of images  error of samples")
    print("\n".join(lines), "", *sayings, sep="\n")


if __name__ == "__main__":
    main()
