"""Trains the multiscale image flow on patches of one photograph, and evaluates it on another.

    python examples/image_flow.py [--steps 100] [--output demo/image_flow.png]

Prints the bits per dimension of the other photograph (guessing takes 8), and writes a grid of samples.
`kernel_size=None` would make the flow Glow. examples/train_image_flow.py trains on standard data sets.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from nflows_kconv.flows import images
from nflows_kconv.nflows import finc_flow

SHAPE = (3, 16, 16)


def load_patches(name):
    """Cuts all patches side by side, uint8 [B, 3, 16, 16]."""
    photograph = torch.tensor(load_sample_image(name)).permute(2, 0, 1)
    _, height, width = SHAPE
    return photograph.unfold(1, height, height).unfold(2, width, width).flatten(1, 2).transpose(0, 1)


def main(steps, output):
    """Trains, evaluates and samples."""
    torch.manual_seed(0)
    training, test = load_patches("china.jpg"), load_patches("flower.jpg")
    flow = finc_flow(SHAPE, levels=2, steps=4, hidden_channels=64)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for step in range(steps):
        batch = training[torch.randint(len(training), (64,))]
        loss = images.bits_per_dim(flow.log_prob(batch), SHAPE).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: {loss:.2f} bits per dimension")
    flow.eval()
    with torch.no_grad():
        print(f"other photograph: {images.bits_per_dim(flow.log_prob(test), SHAPE).mean():.2f} bits per dimension")
        picture = images.grid(images.to_uint8(flow.sample(40)), columns=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.fromarray(picture.permute(1, 2, 0).numpy())
    ImageOps.scale(pixels, 4, Image.Resampling.NEAREST).save(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--output", type=Path, default=Path("demo/image_flow.png"), help="for the grid of samples")
    main(**vars(parser.parse_args()))
