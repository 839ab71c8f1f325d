"""The image model of Neural Spline Flows in nflows, on digits: multiscale, with rational-quadratic spline couplings.

    python examples/swap/nflows_spline/{before,after}.py [--steps 100]

Each level squeezes, takes steps of [ActNorm -> 1x1 -> spline coupling], ends with a 1x1, and moves half of its channels
to the latent variable (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv 1906.04032), as in experiments/images.py of
its repository, bayesiains/nsf, whose default is 3 levels of 10 steps. after.py has a 3x3 convolution in each step;
nothing else differs. Prints the test bits per dimension and the error of a round trip. Small digits do not show which
model is better.
"""

import argparse
import math

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    ActNorm,
    CompositeTransform,
    MultiscaleCompositeTransform,
    OneByOneConvolution,
    PiecewiseRationalQuadraticCouplingTransform,
    PointwiseAffineTransform,
    SqueezeTransform,
)
from nflows.utils import create_mid_split_binary_mask
from sklearn.datasets import load_digits
from torch import nn

from nflows_kconv.nflows import InvertibleConv2d

IMAGE = (1, 8, 8)
LEVELS = 2
STEPS_PER_LEVEL = 2


class ConvNet(nn.Sequential):
    """The network for a coupling's splines."""

    hidden_channels = 32  # the coupling divides bin sizes by its root

    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.Conv2d(in_channels, self.hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.hidden_channels, self.hidden_channels, 1),
            nn.ReLU(),
            nn.Conv2d(self.hidden_channels, out_channels, 3, padding=1),
        )

    def forward(self, inputs, context=None):
        """Ignores the context."""
        return super().forward(inputs)


def build_step(channels):
    """Returns one step of a level."""
    coupling = PiecewiseRationalQuadraticCouplingTransform(
        create_mid_split_binary_mask(channels), ConvNet, num_bins=4, tails="linear", tail_bound=1.0
    )
    return CompositeTransform(
        [
            InvertibleConv2d(channels, corners="TL"),
            InvertibleConv2d(channels, corners="BR"),
            ActNorm(channels),
            OneByOneConvolution(channels),
            coupling,
        ]
    )


def build_flow():
    """Builds the flow, from data to noise."""
    multiscale = MultiscaleCompositeTransform(LEVELS)
    shape = IMAGE
    for _ in range(LEVELS):
        squeeze = SqueezeTransform()
        shape = squeeze.get_output_shape(*shape)
        channels = shape[0]
        steps = [build_step(channels) for _ in range(STEPS_PER_LEVEL)]
        level = CompositeTransform([squeeze, *steps, OneByOneConvolution(channels)])
        shape = multiscale.add_transform(level, shape)  # the shape for the next level
    preprocessing = PointwiseAffineTransform(shift=-0.5, scale=1 / 17)
    return Flow(CompositeTransform([preprocessing, multiscale]), StandardNormal([math.prod(IMAGE)]))


def bits_per_dim(flow, images):
    """Returns bits per dimension of images with uniform noise inside each gray level."""
    return -flow.log_prob(images + torch.rand_like(images)).mean() / (math.prod(IMAGE) * math.log(2))


def main(steps):
    """Trains and evaluates."""
    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]  # whole numbers from 0 to 16
    flow = build_flow()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(steps):
        loss = bits_per_dim(flow, images[torch.randint(1400, (100,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        test = images[1400:]
        restored = flow._transform.inverse(flow.transform_to_noise(test))[0]
        print(f"test bits per dimension: {bits_per_dim(flow, test):.3f}")
        print(f"round-trip error: {(restored - test).abs().max():.1e} gray levels of 17")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    main(parser.parse_args().steps)
