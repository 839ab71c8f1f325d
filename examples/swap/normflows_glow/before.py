"""The class-conditional Glow of normflows' notebook, on digits.

    python examples/swap/normflows_glow/{before,after}.py [--steps 100]

The multiscale model of its examples/glow.ipynb, with 2 levels of 2 steps instead of 3 of 16. after.py uses the
GlowBlock with a 3x3 convolution inside; nothing else differs. Prints the test bits per dimension, with the digits' own
classes and with wrong ones. Small digits do not show which model is better.
"""

import argparse
import math

import normflows as nf
import torch
from sklearn.datasets import load_digits

IMAGE = (1, 8, 8)
LEVELS = 2
STEPS_PER_LEVEL = 2
HIDDEN_CHANNELS = 32
CLASSES = 10


def build_flow():
    """Builds the flow, from latent to data."""
    channels, height, width = IMAGE
    bases, flows, merges = [], [], []
    for level in range(LEVELS, 0, -1):  # the level with the smallest images first
        blocks = [
            nf.flows.GlowBlock(channels * 2 ** (level + 1), HIDDEN_CHANNELS, split_mode="channel", scale=True)
            for _ in range(STEPS_PER_LEVEL)
        ]
        flows.append([*blocks, nf.flows.Squeeze()])
        latent_channels = channels * 2 ** (level + 1 if level == LEVELS else level)
        latent_shape = (latent_channels, height // 2**level, width // 2**level)
        bases.append(nf.distributions.ClassCondDiagGaussian(latent_shape, CLASSES))
        if level < LEVELS:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(bases, flows, merges)


def bits_per_dim(flow, images, classes):
    """Returns bits per dimension of images, whole numbers 0 to 16, with uniform noise inside each gray level."""
    loss = flow.forward_kld((images + torch.rand_like(images)) / 17, classes)
    return loss / (math.prod(IMAGE) * math.log(2)) + math.log2(17)


def main(steps):
    """Trains, evaluates and samples."""
    # Two threads are no faster on such small tensors, and ten times slower if another program uses a core.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    images, classes = torch.tensor(digits.images, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    flow = build_flow()
    optimizer = torch.optim.Adamax(flow.parameters(), 1e-3, weight_decay=1e-5)
    for _ in range(steps):
        batch = torch.randint(1400, (100,))
        loss = bits_per_dim(flow, images[batch], classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = bits_per_dim(flow, images[1400:], classes[1400:])
        wrong = bits_per_dim(flow, images[1400:], (classes[1400:] + 1) % CLASSES)
        samples, _ = flow.sample(y=torch.arange(CLASSES))
    print(f"test bits per dimension: {right:.3f}, with wrong classes {wrong:.3f}")
    print(f"a sample of each class: {tuple(samples.shape)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    main(parser.parse_args().steps)
