"""Trains by maximum likelihood with Lightning for `train_image_flow.py`; an interruption does not change the result."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import ImageData
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from tqdm import tqdm

from nflows_kconv.flows.images import bits_per_dim


def build_flow(configuration: dict[str, Any]) -> nn.Module:
    """Returns the flow of a configuration, initialised from its seed.

    Raises:
        ValueError: If the images do not fit the flow.
    """
    torch.manual_seed(configuration["seed"])
    corners = tuple(tuple(layer.split(",")) for layer in configuration["corners"])
    build = pkgutil.resolve_name(configuration["flow"])
    return build(
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


def seed_noise(seed: int, index: int) -> None:
    """Makes the noise of a batch a function of its index, so a resumed training repeats it."""
    torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


class ImageFlow(LightningModule):
    """Maximum likelihood: Adam with a linear warm-up, then a constant learning rate.

    Args:
        configuration: The configuration of a checkpoint, see `train_image_flow.configuration_of`.
        data: The data set.
    """

    def __init__(self, configuration: dict[str, Any], data: ImageData) -> None:
        super().__init__()
        self.save_hyperparameters(configuration)
        self.flow = build_flow(configuration)
        self.data = data
        in_memory = isinstance(data.train, TensorDataset)
        self.workers = 0 if in_memory else min(8, os.cpu_count() or 1)  # processes for reading files

    def train_dataloader(self) -> DataLoader:
        """Returns batches from the current step on."""
        batches = Batches(
            len(self.data.train),
            self.hparams.batch_size,
            seed=self.hparams.seed,
            first_step=self.trainer.global_step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return DataLoader(self.data.train, batch_sampler=batches, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """Returns the same validation images in each process."""
        return DataLoader(self.data.validation, self.hparams.batch_size, num_workers=self.workers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns bits per dimension of this process's share of the batch."""
        images, classes = batch
        seed_noise(self.hparams.seed, self.trainer.global_step)
        if self.hparams.flip:
            flipped = torch.rand(self.trainer.world_size, len(images), device=self.device)[self.global_rank] < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        # The processes take consecutive parts of the same noise, so a single process would draw the same.
        torch.rand(self.global_rank, *images.shape, device=self.device)
        loss = self._bits_per_dim(images, classes)
        self.log("train_bits_per_dim", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Evaluates with the same noise each time and in each process."""
        seed_noise(self.hparams.seed, batch_idx)
        images, classes = batch
        value = self._bits_per_dim(images, classes)
        self.log("validation_bits_per_dim", value, prog_bar=True, batch_size=len(images), sync_dist=True)

    def _bits_per_dim(self, images: Tensor, classes: Tensor) -> Tensor:
        log_prob = self.flow.log_prob(images.float(), classes if self.hparams.conditional else None)
        return bits_per_dim(log_prob, self.hparams.image_shape).mean()

    def configure_optimizers(self) -> dict[str, Any]:
        """Builds Adam with a linear warm-up."""
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.learning_rate)
        steps = self.hparams.warm_up
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches(Sampler[list[int]]):
    """The endless batches of a process from a training step on, a function of only the seed and the step.

    The images of all epochs, each in its own order, form one sequence; a step takes the next images, and each process
    its share.

    Args:
        num_images: Size of the training set.
        batch_size: Batch size of all processes together.
        seed: Seed of the order.
        first_step: The first training step.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, *, seed: int, first_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.first_step, self.rank, self.world_size = first_step, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of images."""

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> list[int]:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_images).tolist()

        share = self.batch_size // self.world_size
        for step in itertools.count(self.first_step):
            start = step * self.batch_size + self.rank * share
            yield [order(n // self.num_images)[n % self.num_images] for n in range(start, start + share)]


def growing_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Averages exponentially, with a decay that grows to its final value, so short trainings forget their start.

    Raises:
        ValueError: If the decay is not between 0 and 1.
    """
    get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update


class LastCheckpoint(Checkpoint):
    """Overwrites the checkpoint at regular steps and after the last.

    Args:
        path: The file.
        every: Steps between checkpoints.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves if it is time."""
        if trainer.should_stop or trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


class Budget(Callback):
    """Ends the training after the step that reaches a limit or in which Ctrl-C is pressed, and shows progress.

    A second Ctrl-C ends it at once. Several processes end together.

    Args:
        minutes: Limit for this part of the training; the Trainer limits the steps of all parts together.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.interrupted = 60 * minutes, False

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the clock and the bar."""
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        self.start, self.first_step = time.monotonic(), trainer.global_step
        self.bar = tqdm(initial=self.first_step, unit="step", disable=not trainer.is_global_zero)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Sets the bar's end to the step at which time runs out at the mean speed, or to the last step."""
        step, elapsed = trainer.global_step, time.monotonic() - self.start
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        expected = min(steps, self.first_step + (step - self.first_step) * self.seconds / elapsed)
        self.bar.total = None if math.isinf(expected) else max(step, round(expected))
        if self.bar.update(step - self.bar.n):
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in trainer.progress_bar_metrics.items()})
        over = step >= steps or elapsed >= self.seconds or self.interrupted
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(over, all=False)

    def interrupt(self, *_: Any) -> None:
        """Stops after this step at the first Ctrl-C."""
        self.interrupted = True
        signal.signal(signal.SIGINT, self.before)
        self.bar.write("Ctrl-C: ends after this step, then evaluates; once more ends at once")

    def on_train_end(self, *_: Any) -> None:
        """Restores signals and the terminal."""
        signal.signal(signal.SIGINT, self.before)
        self.bar.close()

    on_exception = on_train_end
