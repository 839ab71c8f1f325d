"""Trains the multiscale flow of FInC Flow on images, on one device or many, and evaluates it.

    python examples/train_image_flow.py --data cifar10 --data-root DATA --output runs/cifar10 [--devices 8]
    torchrun --nproc-per-node 8 examples/train_image_flow.py --data cifar10 --data-root DATA --output runs/cifar10
    python examples/train_image_flow.py --output runs/digits --training-steps 2000 --validate-every 500

The same command with --resume goes on from the last checkpoint; on the CPU the parameters are bit for bit those of a
training without the break. On one device Ctrl-C ends the training with a checkpoint. A training that has taken all its
steps is evaluated again. sample_checkpoint.py draws images from a checkpoint. --kernel-size 0 trains Glow, the
baseline. TensorBoard shows the learning curves: tensorboard --logdir runs

At the end the averaged weights are evaluated in float32 on the test images: bits per dimension, round-trip error, time
of sampling; samples.png, temperatures.png (a row for each temperature), interpolations.png (between test images)
and levels.png (test images; below them, for each level, the images with the latent variables of that level drawn
again; samples). The checkpoint is the last one: the test images select nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import image_data  # before lightning, which imports the torchvision that this may have to help
import numpy as np
import torch
from image_flow_evaluation import evaluate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv.images import bits_per_dim

# The workers that Lightning misses would slow the reading of tensors in memory.
warnings.filterwarnings("ignore", message=".*does not have many workers")

LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}
# What may change from one part of a training to the next; all else is the configuration of a checkpoint.
FREE = {
    "data_root",
    "download",
    "training_steps",
    "validate_every",
    "importance_samples",
    "devices",
    "accelerator",
    "output",
    "resume",
}
CHECKPOINT = "last.ckpt"


class Architecture(NamedTuple):
    """L, K and the width of the couplings' networks."""

    levels: int
    steps: int
    hidden_channels: int


# Those of FInC Flow, or nearest to them; where images may be few, ones that a CPU trains in minutes.
ARCHITECTURES = {
    "digits": Architecture(2, 4, 64),
    "photographs": Architecture(3, 4, 64),
    "fashion-mnist": Architecture(2, 16, 512),
    "cifar10": Architecture(3, 32, 512),
    "imagenet32": Architecture(4, 48, 512),
    "imagenet64": Architecture(3, 32, 512),
    "celeba": Architecture(3, 32, 512),
    "directory": Architecture(3, 4, 64),
}


def seed_noise(seed: int, index: int) -> None:
    """Makes the noise of a batch a function of its index, so that a resumed training has the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


class ImageFlow(LightningModule):
    """Maximum likelihood: Adam with a linear warm-up, then a constant learning rate.

    Args:
        configuration: What a checkpoint belongs to, see `configuration_of`.
    """

    def __init__(self, configuration: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(configuration)
        self.flow = build_flow(configuration)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Bits per dimension of the batch's share of this process."""
        images, classes = batch
        seed_noise(self.hparams.seed, self.trainer.global_step)
        if self.hparams.flip:
            flipped = torch.rand(self.trainer.world_size, len(images), device=self.device)[self.global_rank] < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        # The processes draw one after the other from the same noise, so that one process alone would have the same.
        torch.rand(self.global_rank, *images.shape, device=self.device)
        loss = self._bits_per_dim(images, classes)
        self.log("train_bits_per_dim", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The same noise each time, and in each process."""
        seed_noise(self.hparams.seed, batch_idx)
        images, classes = batch
        value = self._bits_per_dim(images, classes)
        self.log("validation_bits_per_dim", value, prog_bar=True, batch_size=len(images), sync_dist=True)

    def _bits_per_dim(self, images: Tensor, classes: Tensor) -> Tensor:
        log_prob = self.flow.log_prob(images.float(), classes if self.hparams.conditional else None)
        return bits_per_dim(log_prob, self.hparams.image_shape).mean()

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam with a linear warm-up."""
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.learning_rate)
        steps = self.hparams.warm_up
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches(Sampler[list[int]]):
    """The batches of a process from a training step on, without end: a function of the seed and the step alone.

    The images of all epochs, each in an order of its own, follow one another; a step takes the next of them, and each
    process its share.

    Args:
        num_images: Of the training set.
        batch_size: Of all processes together.
        seed: Of the order.
        first_step: Where to begin.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, *, seed: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.first_step, self.rank, self.world_size = first_step, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of images."""

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> list[int]:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_images).tolist()

        share = self.batch_size // self.world_size
        for step in itertools.count(self.first_step):
            start = step * self.batch_size + self.rank * share
            yield [order(n // self.num_images)[n % self.num_images] for n in range(start, start + share)]


class Loaders(LightningDataModule):
    """Batches for the training and the validation.

    Args:
        data: The data set.
        batch_size: Of all processes together.
        seed: Of the order.
    """

    def __init__(self, data: image_data.ImageData, batch_size: int, seed: int) -> None:
        super().__init__()
        self.data, self.batch_size, self.seed = data, batch_size, seed
        in_memory = isinstance(data.train, TensorDataset)
        self.workers = 0 if in_memory else min(8, os.cpu_count() or 1)  # processes that read files

    def train_dataloader(self) -> DataLoader:
        """From the step on at which the training is."""
        batches = Batches(
            len(self.data.train),
            self.batch_size,
            seed=self.seed,
            first_step=self.trainer.global_step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return DataLoader(self.data.train, batch_sampler=batches, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """The same images in each process."""
        return DataLoader(self.data.validation, self.batch_size, num_workers=self.workers)


def growing_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """An exponential moving average whose decay grows to its value, so that short trainings forget their beginning.

    Raises:
        ValueError: If the decay is not between 0 and 1.
    """
    get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update


class LastCheckpoint(Checkpoint):
    """Saves the state in place of the one before, at regular steps and after the last, or that on which it stops.

    Args:
        path: The file.
        every: Number of steps between.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves, if it is time to."""
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if last or trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


class StepProgressBar(TQDMProgressBar):
    """A bar over the whole training, which to Lightning is one epoch without end."""

    @property
    def total_train_batches(self) -> int:
        """Number of training steps."""
        return self.trainer.max_steps


@contextmanager
def stopped_by_interrupts(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends the training after its step, the second at once.

    Several processes would have to agree on the step; there the first one ends them.
    """
    if trainer.world_size > 1:
        yield
        return

    def stop(*_: Any) -> None:
        trainer.should_stop = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def build_flow(configuration: dict[str, Any]) -> nn.Module:
    """The flow of a configuration, from its seed.

    Raises:
        ValueError: If the images do not fit the flow.
    """
    torch.manual_seed(configuration["seed"])
    corners = tuple(tuple(layer.split(",")) for layer in configuration["corners"])
    return LIBRARIES[configuration["library"]](
        configuration["image_shape"],
        configuration["levels"],
        configuration["flow_steps"],
        hidden_channels=configuration["hidden_channels"],
        kernel_size=configuration["kernel_size"] or None,
        corners=corners,
        diagonal=configuration["diagonal"],
        direction=configuration["direction"],
        reversible=configuration["reversible"],
        num_classes=configuration["num_classes"] if configuration["conditional"] else None,
    )


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, with the architecture of the data set filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--output", type=Path, help="folder of the run: checkpoint, curves, pictures")
    either.add_argument("--download", action="store_true", help="only fetch the data set into --data-root")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")

    group = parser.add_argument_group("images")
    group.add_argument("--data", choices=image_data.SOURCES, default="digits")
    group.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets")
    group.add_argument("--image-size", type=int, help="to which celeba (64) and directory (as is) crop and resize")
    group.add_argument(
        "--flip", action="store_true", help="mirror half of the training images, as is usual for cifar10"
    )

    group = parser.add_argument_group("flow, by default that of FInC Flow for the data set")
    group.add_argument("--library", choices=LIBRARIES, default="nflows")
    group.add_argument("--levels", type=int, help="L; height and width must be multiples of 2^L")
    group.add_argument("--flow-steps", type=int, help="K, in each level")
    group.add_argument("--hidden-channels", type=int, help="width of the couplings' networks")
    group.add_argument("--kernel-size", type=int, default=3, help="0 leaves the k x k convolution out: Glow")
    group.add_argument(
        "--corners",
        nargs="+",
        default=["TL,TR,BL,BR"],
        help="one convolution each, in sequence: TL BR is a pair of full ones, TL,TR,BL,BR the FInC unit",
    )
    group.add_argument("--diagonal", choices=("unit", "learned"), default="unit")
    group.add_argument("--direction", choices=("forward", "inverse"), default="forward")
    group.add_argument("--conditional", action="store_true", help="on the classes of the images")
    group.add_argument("--reversible", action="store_true", help="train in less memory and some more time")

    group = parser.add_argument_group("training")
    group.add_argument("--training-steps", type=int, default=100_000, help="since the beginning, also with --resume")
    group.add_argument("--batch-size", type=int, default=64, help="of all devices together")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam, after the warm-up")
    group.add_argument("--warm-up", type=int, default=1000, help="steps over which the learning rate grows")
    group.add_argument("--gradient-clip", type=float, default=1.0, help="largest norm of the gradient; 0 for any")
    group.add_argument(
        "--ema-decay", type=float, default=0.999, help="of the averaged weights, which are evaluated; less at first"
    )
    group.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--validate-every", type=int, default=5000, help="steps between validations, and between checkpoints"
    )
    group.add_argument("--importance-samples", type=int, default=1, help="of the evaluation, for each image")
    group.add_argument("--accelerator", default="auto", help="as Lightning's Trainer takes it: cpu, gpu, ...")
    group.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), help="of a machine")

    parsed = parser.parse_args(arguments)
    for name, value in zip(("levels", "flow_steps", "hidden_channels"), ARCHITECTURES[parsed.data], strict=True):
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    return parser, parsed


def configuration_of(arguments: argparse.Namespace, data: image_data.ImageData) -> dict[str, Any]:
    """What a checkpoint belongs to: all that decides about the parameters after a number of steps."""
    return {name: value for name, value in vars(arguments).items() if name not in FREE} | {
        "image_shape": list(data.image_shape),
        "num_classes": data.num_classes,
        "training_images": len(data.train),
    }


def number_of_machines() -> int:
    """As torchrun tells."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def check(arguments: argparse.Namespace, data: image_data.ImageData) -> None:
    """Checks what neither the data set nor the flow does.

    Raises:
        FileNotFoundError: If there is nothing to resume.
        ValueError: If an option does not fit the others, or the run in the folder.
    """
    for name in ("training_steps", "batch_size", "validate_every", "importance_samples", "devices"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if not arguments.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {arguments.learning_rate}")
    processes = arguments.devices * number_of_machines()
    if arguments.batch_size % processes:
        raise ValueError(
            f"--batch-size must be a multiple of the number of devices, got {arguments.batch_size} for {processes}"
        )
    if arguments.conditional and data.num_classes is None:
        raise ValueError(f"--conditional needs classes, and {arguments.data} has none")
    if arguments.resume:
        check_checkpoint(arguments.output / CHECKPOINT, configuration_of(arguments, data))
    # The other processes start when the first one has made the folder.
    elif rank_zero_only.rank == 0 and arguments.output.exists():
        raise ValueError(f"--output must be a new folder, or come with --resume, and {arguments.output} exists")


def check_checkpoint(path: Path, configuration: dict[str, Any]) -> None:
    """Checks that a checkpoint is of a configuration.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another one.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"--resume needs {path}, which does not exist: begin a training with another --output, without --resume"
        )
    saved = torch.load(path, map_location="cpu", mmap=True).get("hyper_parameters", {})
    different = [
        f"{name} is {saved.get(name)!r} there, {configuration.get(name)!r} here"
        for name in sorted(saved.keys() | configuration.keys())
        if saved.get(name) != configuration.get(name)
    ]
    if different:
        raise ValueError(f"{path} is of another configuration: {'; '.join(different)}")


def build_trainer(arguments: argparse.Namespace) -> Trainer:
    """What trains to the last step.

    Raises:
        MisconfigurationException: If the accelerator is not there.
        ValueError: If a number is out of its range.
    """
    machines = number_of_machines()
    return Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=machines,
        strategy="auto" if arguments.devices * machines == 1 else "ddp",
        precision=arguments.precision,
        max_steps=arguments.training_steps,
        gradient_clip_val=arguments.gradient_clip,
        logger=TensorBoardLogger(
            arguments.output.parent, name=arguments.output.name, version="", default_hp_metric=False
        ),
        log_every_n_steps=10,
        callbacks=[
            StepProgressBar(),
            LearningRateMonitor(),
            # Buffers are copied: what they hold are no averages.
            WeightAveraging(use_buffers=False, multi_avg_fn=growing_average(arguments.ema_decay)),
            LastCheckpoint(arguments.output / CHECKPOINT, arguments.validate_every),
        ],
        val_check_interval=arguments.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,  # ActNorm starts from the first training batch
        use_distributed_sampler=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and evaluates."""
    parser, options = parse_arguments(arguments)
    try:
        if options.download:
            image_data.download(options.data, options.data_root)
            return
        data = image_data.load(options.data, options.data_root, options.image_size)
        check(options, data)
        module = ImageFlow(configuration_of(options, data))
        trainer = build_trainer(options)
    except (MisconfigurationException, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    checkpoint = options.output / CHECKPOINT
    loaders = Loaders(data, options.batch_size, options.seed)
    with stopped_by_interrupts(trainer):
        trainer.fit(module, loaders, ckpt_path=checkpoint if options.resume else None)
    if not trainer.is_global_zero:
        return
    if trainer.global_step < options.training_steps:
        print(f"stopped after step {trainer.global_step}; the same command with --resume goes on")
        return
    if trainer.global_step > options.training_steps:
        print(f"{checkpoint} has taken {trainer.global_step} steps already; it is evaluated")

    # The averaged weights, which Lightning saves in the place of those that are trained.
    module.load_state_dict(torch.load(checkpoint, map_location="cpu")["state_dict"])
    evaluate(
        module.flow.to(trainer.strategy.root_device),
        options.library,
        options.levels,
        data,
        options.output,
        conditional=options.conditional,
        batch_size=options.batch_size,
        importance_samples=options.importance_samples,
    )


if __name__ == "__main__":
    main()
