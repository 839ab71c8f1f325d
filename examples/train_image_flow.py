"""Trains the multiscale flow of FInC Flow on images, on one device or many, and evaluates it.

    python examples/train_image_flow.py --output runs/digits
    python examples/train_image_flow.py --data cifar10 --data-root DATA --output runs/cifar10 --minutes 600 --devices 8
    torchrun --nproc-per-node 8 examples/train_image_flow.py --data cifar10 --data-root DATA --output runs/cifar10

It ends after --minutes, after --training-steps, or at Ctrl-C (under torchrun, Ctrl-C ends it without an evaluation).
Then it saves the checkpoint last.ckpt, draws pictures, and evaluates the averaged weights in float32 on the test
images, which select nothing: round-trip error, sampling time, bits per dimension. The pictures are samples.png,
temperatures.png (a row per temperature), interpolations.png (between test images) and levels.png (test images; below
them, for each level, the images with the latent variables of that level redrawn; samples).

The same command with --resume continues from the checkpoint; on the CPU the parameters are bitwise those of an
uninterrupted training. sample_checkpoint.py draws images from a checkpoint. --kernel-size 0 trains Glow, the baseline.
TensorBoard shows the learning curves: tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
import math
import os
import pkgutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import image_data  # before lightning, which imports torchvision, for which it may define schemas
import torch
from image_flow_evaluation import evaluate
from image_flow_training import Budget, ImageFlow, LastCheckpoint, growing_average
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# Lightning recommends workers, which would slow down reading tensors in memory.
warnings.filterwarnings("ignore", message=".*does not have many workers")

CHECKPOINT = "last.ckpt"
MINUTES = 10.0
MACHINES = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # set by torchrun
# Options that may change between parts of a training; all others are the configuration of a checkpoint.
FREE = {
    "data_root",
    "download",
    "minutes",
    "training_steps",
    "validate_every",
    "importance_samples",
    "devices",
    "accelerator",
    "output",
    "resume",
}
# Data sets for which two threads are no faster than one, and ten times slower if another program uses a core.
SMALL_IMAGES = {"digits"}
POSITIVE = "minutes training_steps batch_size learning_rate validate_every importance_samples devices".split()


class Architecture(NamedTuple):
    """L, K and the width of the coupling networks."""

    levels: int
    flow_steps: int
    hidden_channels: int


# The architectures of FInC Flow, or nearest to them; for small data sets, ones that a CPU trains in minutes.
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


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Returns the command line, with the architecture of the data set and the limits filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--output", type=Path, help="folder of the run: checkpoint, curves, pictures")
    either.add_argument("--download", action="store_true", help="only fetch the data set into --data-root")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")

    group = parser.add_argument_group("end of the training: whichever comes first")
    group.add_argument("--minutes", type=float, help=f"of this command; {MINUTES:g} unless --training-steps is given")
    group.add_argument("--training-steps", type=int, help="since the beginning, also with --resume")

    group = parser.add_argument_group("images")
    group.add_argument("--data", choices=image_data.SOURCES, default="digits")
    group.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets")
    group.add_argument("--image-size", type=int, help="to which celeba (64) and directory (as is) crop and resize")
    group.add_argument(
        "--flip", action="store_true", help="mirror half of the training images, as is usual for cifar10"
    )

    group = parser.add_argument_group("flow, by default that of FInC Flow for the data set")
    group.add_argument(
        "--flow",
        type=function_name,
        default="nflows_kconv.nflows.finc_flow",
        help="what builds it",
    )
    group.add_argument("--levels", type=int, help="L; height and width must be multiples of 2^L")
    group.add_argument("--flow-steps", type=int, help="K, in each level")
    group.add_argument("--hidden-channels", type=int, help="width of the couplings' networks")
    group.add_argument("--kernel-size", type=int, default=3, help="0 leaves the k x k convolution out: Glow")
    group.add_argument(
        "--corners",
        nargs="+",
        default=["TL", "BR"],
        help="one convolution each, in sequence: TL BR is a pair of full ones, TL,TR,BL,BR the FInC unit",
    )
    group.add_argument("--diagonal", choices=("unit", "learned"), default="unit")
    group.add_argument("--direction", choices=("forward", "inverse"), default="forward")
    group.add_argument("--conditional", action="store_true", help="on the classes of the images")
    group.add_argument("--reversible", action="store_true", help="train in less memory and some more time")

    group = parser.add_argument_group("training")
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
        "--validate-every", type=int, default=1000, help="steps between validations, and between checkpoints"
    )
    group.add_argument("--importance-samples", type=int, default=1, help="of the evaluation, for each image")
    group.add_argument("--accelerator", default="auto", help="as Lightning's Trainer takes it: cpu, gpu, ...")
    group.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), help="of a machine")

    parsed = parser.parse_args(arguments)
    if parsed.minutes is None:
        parsed.minutes = MINUTES if parsed.training_steps is None else math.inf
    for name, value in ARCHITECTURES[parsed.data]._asdict().items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    return parser, parsed


def function_name(name: str) -> str:
    """Checks that the function exists, and returns its name for the checkpoint."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def configuration_of(arguments: argparse.Namespace, data: image_data.ImageData) -> dict[str, Any]:
    """Returns the configuration of a checkpoint: all options that determine the parameters after a number of steps."""
    return {name: value for name, value in vars(arguments).items() if name not in FREE} | {
        "image_shape": list(data.image_shape),
        "num_classes": data.num_classes,
        "training_images": len(data.train),
    }


def check(arguments: argparse.Namespace, data: image_data.ImageData) -> None:
    """Checks what neither the data set nor the flow checks.

    Raises:
        FileNotFoundError: If there is nothing to resume.
        ValueError: If an option does not fit the others or the run in the folder.
    """
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    processes = arguments.devices * MACHINES
    if arguments.batch_size % processes:
        raise ValueError(
            f"--batch-size must be a multiple of the number of devices, got {arguments.batch_size} for {processes}"
        )
    if arguments.conditional and data.num_classes is None:
        raise ValueError(f"--conditional needs classes, and {arguments.data} has none")
    if arguments.resume:
        check_checkpoint(arguments.output / CHECKPOINT, configuration_of(arguments, data))
    # Other processes start after the first one has made the folder.
    elif rank_zero_only.rank == 0 and arguments.output.exists():
        raise ValueError(f"--output must be a new folder, or come with --resume, and {arguments.output} exists")


def check_checkpoint(path: Path, configuration: dict[str, Any]) -> None:
    """Checks that a checkpoint has a configuration.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it has another one.
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
    """Returns the Trainer.

    Raises:
        MisconfigurationException: If the accelerator is not available.
        ValueError: If a number is out of range.
    """
    return Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=MACHINES,
        strategy="auto" if arguments.devices * MACHINES == 1 else "ddp",
        precision=arguments.precision,
        max_epochs=-1,
        max_steps=arguments.training_steps or -1,
        gradient_clip_val=arguments.gradient_clip,
        logger=TensorBoardLogger(
            arguments.output.parent, name=arguments.output.name, version="", default_hp_metric=False
        ),
        log_every_n_steps=10,
        enable_progress_bar=False,
        callbacks=[
            Budget(arguments.minutes),
            LearningRateMonitor(),
            # Copies buffers, because averages of them mean nothing.
            WeightAveraging(use_buffers=False, multi_avg_fn=growing_average(arguments.ema_decay)),
            LastCheckpoint(arguments.output / CHECKPOINT, arguments.validate_every),
        ],
        val_check_interval=arguments.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,  # the first training batch must initialise ActNorm
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
        module = ImageFlow(configuration_of(options, data), data)
        trainer = build_trainer(options)
    except (MisconfigurationException, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if options.data in SMALL_IMAGES:
        torch.set_num_threads(1)
    checkpoint = options.output / CHECKPOINT
    trainer.fit(module, ckpt_path=checkpoint if options.resume else None)
    if not trainer.is_global_zero:
        return
    print(f"{trainer.global_step} steps are in {checkpoint}; the same command with --resume goes on")
    # The averaged weights, which Lightning saves instead of the trained ones.
    module.load_state_dict(torch.load(checkpoint, map_location="cpu")["state_dict"])
    evaluate(
        module.flow.to(trainer.strategy.root_device),
        data,
        options.output,
        conditional=options.conditional,
        batch_size=options.batch_size,
        importance_samples=options.importance_samples,
    )


if __name__ == "__main__":
    main()
