"""Shows what the layer does to a density of two numbers, as an image of two channels or of two pixels.

    python examples/two_dimensions.py [--steps 200]

Prints the layer's Jacobian for both kinds of image, and how well flows with it fit two moons, in nats per test point.
The Jacobian is triangular. One pixel has an entry for each pair of channels, so the layer reaches the best Gaussian;
two pixels share one kernel, and so the diagonal. The layer itself is linear; only couplings bend. It adds little to
them here, because every coupling sees all of the data; on images no coupling does.
"""

import argparse

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import ActNorm, AffineCouplingTransform, CompositeTransform
from sklearn.datasets import make_moons
from torch import nn

from nflows_kconv.nflows import InvertibleConv2d

SHAPES = {"2 channels, 1 pixel": (2, 1, 1), "1 channel, 2 pixels": (1, 1, 2)}


class Network(nn.Sequential):
    """The network for a coupling's scale and shift."""

    def __init__(self, in_channels, out_channels):
        super().__init__(nn.Conv2d(in_channels, 32, 1), nn.ReLU(), nn.Conv2d(32, out_channels, 1))

    def forward(self, inputs, context=None):
        """Ignores the context."""
        return super().forward(inputs)


def build_layer(shape):
    """Returns a 3x3 convolution with all learnable parameters."""
    return InvertibleConv2d(shape[0], corners="TL", diagonal="learned", bias=True)


def build_step(index, *between):
    """Returns a step that alternates the transformed channel, with ActNorm because couplings can only shrink."""
    coupling = AffineCouplingTransform([index % 2, 1 - index % 2], Network)
    return CompositeTransform([ActNorm(2), *between, coupling])


def fit(transform, shape, points, steps):
    """Trains a flow on half of the points, and returns nats per point of the other half."""
    flow = Flow(transform, StandardNormal(shape))
    training, test = points.reshape(-1, *shape).chunk(2)
    optimizer = torch.optim.Adam(flow.parameters(), 0.03)
    for _ in range(steps):
        loss = -flow.log_prob(training).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return -flow.log_prob(test).mean()


def main(steps):
    """Prints Jacobians and fits."""
    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    points = torch.tensor(make_moons(1000, noise=0.1, random_state=0)[0], dtype=torch.float32)
    training, test = points.chunk(2)
    gaussian = torch.distributions.MultivariateNormal(training.mean(0), training.T.cov())
    print(f"{-gaussian.log_prob(test).mean():.3f} nats: the best Gaussian")
    for name, shape in SHAPES.items():
        layer = build_layer(shape)
        print(f"{fit(layer, shape, points, steps):.3f} nats: the layer alone, {name}")
        with torch.no_grad():
            origin, *columns = layer(torch.tensor([[0.0, 0], [1, 0], [0, 1]]).view(3, *shape))[0].flatten(1)
        for row in (torch.stack(columns, 1) - origin[:, None]).tolist():
            print("    " + " ".join(f"{entry:6.3f}" for entry in row))
    pixel = SHAPES["2 channels, 1 pixel"]
    couplings = CompositeTransform([build_step(index) for index in range(4)])
    print(f"{fit(couplings, pixel, points, steps):.3f} nats: 4 couplings")
    both = CompositeTransform([build_step(index, build_layer(pixel)) for index in range(4)])
    print(f"{fit(both, pixel, points, steps):.3f} nats: 4 couplings, the layer before each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training, for each flow")
    main(parser.parse_args().steps)
