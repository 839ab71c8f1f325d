"""The layer as a torch.distributions transform: learns a density of images from samples and recovers its parameters.

    python examples/torch_distributions.py [--steps 300]

Draws data from a `TransformedDistribution` with random weights, and fits another one to them. Prints the nats per image
of fresh data under both, and the largest difference of a weight.
"""

import argparse

import torch
from torch.distributions import Normal, TransformedDistribution

from nflows_kconv.distributions import InvertibleConv2d

SHAPE = (2, 8, 8)


def build(transform):
    """Returns the distribution of x with transform(x) normal: the inverse runs from noise to images."""
    return TransformedDistribution(Normal(torch.zeros(SHAPE), torch.ones(SHAPE)), [transform.inv])


def main(steps):
    """Draws, fits and compares."""
    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    true = InvertibleConv2d(2, corners="TL", diagonal="learned")
    fitted = InvertibleConv2d(2, corners="TL", diagonal="learned")
    with torch.no_grad():
        for parameter in true.parameters():
            parameter.normal_(std=0.2)
    data, fresh = build(true).sample((2, 1000))
    density = build(fitted)
    optimizer = torch.optim.Adam(fitted.parameters(), 0.03)
    for _ in range(steps):
        loss = -density.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        print(f"true density:   {-build(true).log_prob(fresh).mean():.2f} nats per image")
        print(f"fitted density: {-density.log_prob(fresh).mean():.2f} nats per image")
        print(f"largest difference of a weight: {(true.weight - fitted.weight).abs().max():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    main(parser.parse_args().steps)
