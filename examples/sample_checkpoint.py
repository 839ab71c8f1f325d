"""Draws images from a checkpoint of train_image_flow.py.

python examples/sample_checkpoint.py runs/digits/last.ckpt --output samples.png [--count 64] [--temperature 0.7]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from image_data import save_picture
from image_flow_training import build_flow
from torch import nn

from nflows_kconv.flows.images import grid
from nflows_kconv.flows.sampling import GraphSampler


def load_flow(checkpoint: Path) -> nn.Module:
    """Returns the flow with the averaged weights, ready to sample."""
    saved = torch.load(checkpoint, map_location="cpu")
    flow = build_flow(saved["hyper_parameters"])
    flow.load_state_dict({name.removeprefix("flow."): value for name, value in saved["state_dict"].items()})
    return flow.eval()


def main() -> None:
    """Parses the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the picture to write")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="what the noise is multiplied with")
    parser.add_argument("--label", type=int, help="of all images, if the flow was trained with --conditional")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.checkpoint.exists():
        parser.error(f"{options.checkpoint} does not exist")
    conditional = torch.load(options.checkpoint, map_location="cpu", mmap=True)["hyper_parameters"]["conditional"]
    if conditional and options.label is None:
        parser.error("--label must be given, as the flow was trained with --conditional")
    if options.label is not None and not conditional:
        parser.error(f"--label needs a flow that was trained with --conditional, got {options.checkpoint}")
    flow = load_flow(options.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    labels = None if options.label is None else torch.full((options.count,), options.label)
    torch.manual_seed(options.seed)
    try:
        images = GraphSampler(flow, min(options.count, 64))(
            options.count, labels=labels, temperature=options.temperature
        )
    except ValueError as error:
        parser.error(str(error))
    save_picture(grid(images, columns=8).cpu(), options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
