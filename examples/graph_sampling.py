"""Samples from a class-conditional image flow by replaying a CUDA graph, or without a GPU by running the flow.

    python examples/graph_sampling.py [--calls 10]

Prints which of the two it uses, and the time of a call next to that of the flow's own `sample`. The sampler follows the
weights, without a new capture after a training step.
"""

import argparse
import time

import torch

from nflows_kconv.flows.sampling import GraphSampler
from nflows_kconv.nflows import finc_flow


def milliseconds(function, calls):
    """Returns the mean time of several calls."""
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def main(calls):
    """Draws samples in both ways."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("a CUDA graph" if device == "cuda" else "no GPU here: every call runs the flow, as its own sample does")
    torch.manual_seed(0)
    flow = finc_flow((3, 16, 16), levels=2, steps=4, hidden_channels=64, num_classes=10).to(device).eval()
    labels = torch.arange(10, device=device)
    sampler = GraphSampler(flow, num_samples=10)
    with torch.no_grad():
        print(f"flow.sample: {milliseconds(lambda: flow.sample(1, context=labels), calls):.1f} ms")
    print(f"GraphSampler: {milliseconds(lambda: sampler(labels=labels), calls):.1f} ms")

    torch.manual_seed(1)
    before = sampler(labels=labels, temperature=0.7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01)
    torch.manual_seed(1)
    after = sampler(labels=labels, temperature=0.7)
    print(f"{len(after)} images, changed by {(after - before).abs().mean():.1f} of 255 on average with the weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10, help="to take the mean time of")
    main(parser.parse_args().calls)
