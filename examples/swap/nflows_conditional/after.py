"""A flow of digits in nflows, conditioned on the digit: steps of [ActNorm -> 1x1 -> affine coupling] with a context.

    python examples/swap/nflows_conditional/{before,after}.py [--steps 100]

after.py has a 3x3 convolution in each step, which ignores the context; nothing else differs. Prints the test bits per
dimension, with the digits' own classes and with wrong ones. Small digits do not show which model is better.
"""

import argparse
import math

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    CompositeTransform,
    OneByOneConvolution,
    PointwiseAffineTransform,
    SqueezeTransform,
)
from nflows.utils import create_mid_split_binary_mask
from sklearn.datasets import load_digits
from torch.nn import functional as F

from nflows_kconv.nflows import InvertibleConv2d

CHANNELS, SIDE = 4, 4  # after the squeeze
CLASSES = 10
FLOW_STEPS = 4


def network(in_channels, out_channels):
    """Returns the network for a coupling's scale and shift."""
    return ConvResidualNet(in_channels, out_channels, hidden_channels=32, context_channels=CLASSES)


def build_flow():
    """Builds the flow, from data to noise."""
    transforms = [PointwiseAffineTransform(shift=-0.5, scale=1 / 17), SqueezeTransform()]
    for _ in range(FLOW_STEPS):
        transforms += [
            InvertibleConv2d(CHANNELS, corners="TL"),
            InvertibleConv2d(CHANNELS, corners="BR"),
            ActNorm(CHANNELS),
            OneByOneConvolution(CHANNELS),
            AffineCouplingTransform(create_mid_split_binary_mask(CHANNELS), network),
        ]
    return Flow(CompositeTransform(transforms), StandardNormal([CHANNELS, SIDE, SIDE]))


def load():
    """Loads images, [B, 1, 8, 8], whole numbers 0 to 16, and their classes as maps, [B, 10, 4, 4]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    classes = F.one_hot(torch.tensor(digits.target), CLASSES).float()
    return images, classes[:, :, None, None].expand(-1, -1, SIDE, SIDE)


def bits_per_dim(flow, images, context):
    """Returns bits per dimension of images with uniform noise inside each gray level."""
    log_prob = flow.log_prob(images + torch.rand_like(images), context)
    return -log_prob.mean() / (images[0].numel() * math.log(2))


def main(steps):
    """Trains, evaluates and samples."""
    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, context = load()
    flow = build_flow()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(steps):
        batch = torch.randint(1400, (100,))
        loss = bits_per_dim(flow, images[batch], context[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        right = bits_per_dim(flow, images[1400:], context[1400:])
        wrong = bits_per_dim(flow, images[1400:], context[1400:].roll(1, dims=1))
        samples = flow.sample(2, context[:3])
    print(f"test bits per dimension: {right:.3f}, with wrong classes {wrong:.3f}")
    print(f"2 samples for each of 3 contexts: {tuple(samples.shape)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    main(parser.parse_args().steps)
