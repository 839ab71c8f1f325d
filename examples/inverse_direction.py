"""Trains a flow on digits with the inverse of the layer from data to noise, so sampling convolves.

    python examples/inverse_direction.py [--steps 300] [--seed 0]

nflows' InverseTransform around the layer solves for the density and convolves for samples; training differentiates
through the solution (Inverse-Flow, Nagar, Varma 2025, arXiv 2410.14634). Prints the test bits per dimension before and
after, the round-trip error, and the time of the layers in both directions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    CompositeTransform,
    InverseTransform,
    Logit,
    OneByOneConvolution,
    PointwiseAffineTransform,
    SqueezeTransform,
)
from train_digits import (
    LOGIT_MARGIN,
    SIZE,
    CouplingNet,
    Model,
    dequantize,
    evaluate,
    load_images,
    mean_and_error,
    train,
)

from nflows_kconv.nflows import InvertibleConv2d

SIDE = SIZE // 4  # after two squeezes
CHANNELS = 16
FLOW_STEPS = 4


def build_model() -> Model:
    """Builds two squeezes, then steps of [inverse 3x3 from two corners -> ActNorm -> 1x1 -> affine coupling]."""
    transforms = [PointwiseAffineTransform(LOGIT_MARGIN, 1 - 2 * LOGIT_MARGIN), Logit()]
    transforms += [SqueezeTransform(), SqueezeTransform()]
    for _ in range(FLOW_STEPS):
        transforms += [
            InverseTransform(InvertibleConv2d(CHANNELS, corners="TL")),
            InverseTransform(InvertibleConv2d(CHANNELS, corners="BR")),
            ActNorm(CHANNELS),
            OneByOneConvolution(CHANNELS),
            AffineCouplingTransform([index % 2 for index in range(CHANNELS)], CouplingNet),
        ]
    transform = CompositeTransform(transforms)
    flow = Flow(transform, StandardNormal([CHANNELS, SIDE, SIDE]))
    return Model(flow, flow.log_prob, flow.sample, lambda x: transform(x)[0], lambda z: transform.inverse(z)[0])


@torch.no_grad()
def median_ms(function: Callable[[torch.Tensor], object], images: torch.Tensor) -> float:
    """Returns the median milliseconds of many calls."""
    times = []
    for _ in range(100):
        start = time.perf_counter()
        function(images)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Trains and compares the directions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    images, test_images = load_images()
    model = build_model()
    with torch.no_grad():
        model.encode(dequantize(images))  # initialises ActNorm
    print(f"test bits per dimension before training: {mean_and_error(evaluate(model, test_images, draws=1))}")
    train("inverse 3x3", model, images, test_images, arguments.steps)
    print(f"test bits per dimension after training:  {mean_and_error(evaluate(model, test_images, draws=10))}")

    model.module.eval()
    with torch.no_grad():
        noisy = dequantize(test_images)
        error = (model.decode(model.encode(noisy)) - noisy).abs().max()
    print(f"round-trip error: {error:.1e}")
    layer = next(module for module in model.module.modules() if isinstance(module, InvertibleConv2d))
    features = torch.randn(100, CHANNELS, SIDE, SIDE)
    print(
        f"100 images through one layer: {median_ms(layer.inverse, features):.2f} ms for the density (inverse), "
        f"{median_ms(layer, features):.2f} ms for samples (convolution)"
    )


if __name__ == "__main__":
    main()
