"""Training of image flows: published data formats, resuming, several processes, evaluation."""

from __future__ import annotations

import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import image_data
import image_files
import image_flow_evaluation
import image_flow_training
import numpy as np
import pytest
import sample_checkpoint
import skimage.data
import torch
import train_image_flow
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import default_collate

import nflows_kconv.nflows
from nflows_kconv import InvertibleConv2d
from nflows_kconv.flows import reversible

FLOWS = ("nflows_kconv.nflows.finc_flow", "nflows_kconv.normflows.finc_flow")
SMALL = "--levels 1 --flow-steps 1 --hidden-channels 4 --warm-up 30 --validate-every 2 --accelerator cpu".split()


@pytest.fixture(autouse=True)
def unchanged_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def train(output: Path, steps: int, *arguments: str) -> dict:
    """Trains in this process and returns the checkpoint."""
    train_image_flow.main(["--output", str(output), "--training-steps", str(steps), *SMALL, *arguments])
    return torch.load(output / "last.ckpt")


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Returns the only line of the command's error."""
    with pytest.raises(SystemExit) as stopped:
        train_image_flow.main([*SMALL, *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def scalars(run: Path, name: str) -> dict[int, float]:
    """Returns a curve from TensorBoard's files."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def assert_identical(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_identical(value, second[name])
        elif isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


# Data sets.

WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], np.ndarray]] = {
    "fashion-mnist": image_files.write_fashion_mnist,
    "cifar10": image_files.write_cifar10,
    "imagenet32": partial(image_files.write_imagenet, 32),
    "imagenet64": partial(image_files.write_imagenet, 64),
    "celeba": image_files.write_celeba,
    "directory": image_files.write_directory,
}
CLASSES = {
    "fashion-mnist": [0, 1, 2, 3, 4, 0, 1],
    "cifar10": [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6],
    "imagenet32": [*range(10), 999],
    "imagenet64": [*range(10), 999],
    "celeba": [7, 7, 7, 7],
    "directory": [0, 0, 1, 1, 0, 1],
}


@pytest.mark.parametrize("name", WRITERS)
def test_data_sets_in_their_published_formats(name, tmp_path, monkeypatch):
    expected = WRITERS[name](tmp_path, monkeypatch)
    data = image_data.load(name, tmp_path)
    read = [*(data.train[index] for index in range(len(data.train))), *(data.test[i] for i in range(len(data.test)))]
    images, classes = default_collate(read)
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), expected)
    assert classes.tolist() == CLASSES[name]
    assert data.image_shape == expected.shape[1:]
    assert data.num_classes is None or max(CLASSES[name]) < data.num_classes
    assert data.validation[0][0].shape == data.image_shape


def test_digits_keep_their_levels(tmp_path):
    data = image_data.load("digits", tmp_path)
    images = torch.cat([data.train.tensors[0], data.test.tensors[0]])
    assert images.shape == (1797, 1, 8, 8)
    levels = torch.tensor(load_digits().images)[:, None]
    assert torch.equal((images // 15).sum((0, 1)).double(), levels.sum((0, 1)))
    noise = (images % 15).flatten().bincount()
    assert len(noise) == 15
    assert noise.float().std() < 0.05 * noise.float().mean()


def test_photographs_to_test_on_are_others(tmp_path):
    data = image_data.load("photographs", tmp_path)
    train, test = data.train.tensors[0], data.test.tensors[0]
    assert train.shape[1:] == test.shape[1:] == data.image_shape == (3, 32, 32)
    assert train.dtype == test.dtype == torch.uint8
    first = skimage.data.astronaut()
    assert np.array_equal(train[0].permute(1, 2, 0), first[:32, :32])
    assert np.array_equal(train[1].permute(1, 2, 0), first[:32, 8:40])
    assert np.array_equal(test[0].permute(1, 2, 0), skimage.data.chelsea()[:32, :32])
    assert not {patch.numpy().tobytes() for patch in test} & {patch.numpy().tobytes() for patch in train}
    assert data.num_classes is None


@pytest.mark.parametrize(
    ("name", "file", "address"),
    [
        ("fashion-mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte", "github.com/zalandoresearch/fashion-mnist"),
        ("cifar10", "cifar-10-batches-py/data_batch_3", "www.cs.toronto.edu/~kriz"),
        ("imagenet32", "imagenet32/train_data_batch_10.npz", "image-net.org"),
        ("imagenet64", "imagenet64/val_data.npz", "image-net.org"),
        ("celeba", "celeba/identity_CelebA.txt", "mmlab.ie.cuhk.edu.hk"),
        ("celeba", "celeba/img_align_celeba/000005.jpg", "mmlab.ie.cuhk.edu.hk"),
    ],
)
def test_a_missing_file_is_named(name, file, address, tmp_path, monkeypatch, capsys):
    WRITERS[name](tmp_path, monkeypatch)
    (tmp_path / file).unlink()
    error = refused(capsys, "--data", name, "--data-root", str(tmp_path), "--output", str(tmp_path / "run"))
    assert f"{name} needs {tmp_path / file}, which does not exist; get it from https://{address}" in error
    assert not (tmp_path / "run").exists()


def test_files_with_other_checksums_are_refused(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        image_files.write_cifar10(tmp_path, patch)
    error = refused(capsys, "--data", "cifar10", "--data-root", str(tmp_path), "--output", str(tmp_path / "run"))
    assert f"the files in {tmp_path / 'cifar-10-batches-py'} are not those that were published" in error


def test_images_of_a_directory_are_resized_on_request(tmp_path, monkeypatch):
    image_files.write_directory(tmp_path, monkeypatch)
    data = image_data.load("directory", tmp_path, 2)
    assert data.image_shape == data.train[0][0].shape == (3, 2, 2)


def save_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def gray(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    return np.zeros((height, width), dtype)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (gray(4, 4, np.uint16), "images must have the same channels: .* has mode L, .* I;16"),
        (np.zeros((4, 4, 3), np.uint8), "images must have the same channels: .* has mode L, .* RGB"),
        (gray(4, 6), r"images must have the same size, .* has \(4, 4\), .* \(6, 4\)"),
    ],
)
def test_images_that_differ_are_refused(odd, message, tmp_path, capsys):
    for path in ("train/a/0.png", "train/a/1.png", "test/a/0.png"):
        save_image(tmp_path / path, gray(4, 4))
    save_image(tmp_path / "test" / "a" / "1.png", odd)
    output = tmp_path / "run"
    assert re.search(
        message, refused(capsys, "--data", "directory", "--data-root", str(tmp_path), "--output", str(output))
    )
    assert not output.exists()


def test_images_with_other_values_or_sizes_are_refused(tmp_path, monkeypatch, capsys):
    run = ("--data-root", str(tmp_path), "--output", str(tmp_path / "run"), "--data")
    image_files.write_imagenet(32, tmp_path, monkeypatch)
    batch = tmp_path / "imagenet32" / "train_data_batch_2.npz"
    labels = np.array([1])
    np.savez(batch, data=np.full((1, 3072), 256), labels=labels)
    assert "must hold images with values 0..255 in uint8, got int64" in refused(capsys, *run, "imagenet32")
    np.savez(batch, data=np.zeros((1, 1024), np.uint8), labels=labels)
    assert "must hold images with 3 x 32 x 32 values each, got an array (1, 1024)" in refused(
        capsys, *run, "imagenet32"
    )
    np.savez(batch, images=labels)
    assert "must hold data and labels, got ['images']" in refused(capsys, *run, "imagenet32")
    for split in ("train", "test"):
        save_image(tmp_path / split / "a" / "0.png", gray(6, 4, np.uint16))
    assert "must be gray or RGB with 8 bits a channel (mode L or RGB), got mode I;16" in refused(
        capsys, *run, "directory"
    )
    for split in ("train", "test"):
        save_image(tmp_path / split / "a" / "0.png", gray(6, 4))
    error = refused(capsys, *run, "directory", "--levels", "2")
    assert "sizes in data_shape must be multiples of 2^levels = 4 for 2 levels, got 6 x 4" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--batch-size", "9", "--devices", "2"),
            "--batch-size must be a multiple of the number of devices, got 9 for 2",
        ),
        (("--training-steps", "0"), "--training-steps must be positive, got 0"),
        (("--learning-rate", "0"), "--learning-rate must be positive, got 0.0"),
        (("--minutes", "0"), "--minutes must be positive, got 0.0"),
        (("--ema-decay", "2"), "Invalid decay value 2.0"),
        (("--image-size", "16"), "an image size goes with celeba and directory only, got 16 for digits"),
        (("--download",), "argument --download: not allowed with argument --output"),
        (("--resume",), "last.ckpt, which does not exist"),
        (("--corners", "TL,TR,BL"), "num_channels must be a multiple of the number of corners"),
        (
            ("--flow", "nflows_kconv.nflows.no_flow"),
            "argument --flow: module 'nflows_kconv.nflows' has no attribute 'no_flow'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, "--output", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "one of the arguments --output --download is required"),
        (("--download",), "torchvision cannot download digits; get it from scikit-learn"),
    ],
)
def test_commands_without_a_run_are_refused(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_classes_are_needed_for_a_conditional_flow(tmp_path, monkeypatch, capsys):
    image_files.write_celeba(tmp_path, monkeypatch)
    run = ("--data", "celeba", "--data-root", str(tmp_path), "--output", str(tmp_path / "run"))
    assert "--conditional needs classes, and celeba has none" in refused(capsys, *run, "--conditional")


# Training.


@given(st.data())
def test_batches_are_a_function_of_seed_and_step(draw):
    """Each epoch has every image once for any batch size; processes share a batch; any step can be the first."""
    num_images, share, world_size = (draw.draw(st.integers(1, most)) for most in (9, 4, 3))
    batch_size, first_step = share * world_size, draw.draw(st.integers(0, 2))

    def taken(steps: int, **arguments) -> list[list[int]]:
        batches = iter(image_flow_training.Batches(num_images, batch_size, seed=3, **arguments))
        return [next(batches) for _ in range(steps)]

    steps = 2 * num_images
    whole = taken(steps)
    stream = list(chain(*whole))
    for start in range(0, len(stream) - num_images + 1, num_images):
        assert sorted(stream[start : start + num_images]) == list(range(num_images))
    shares = [taken(steps, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    assert taken(steps, first_step=first_step)[: steps - first_step] == whole[first_step:]


def test_epochs_and_seeds_have_orders_of_their_own():
    batches = iter(image_flow_training.Batches(100, 100, seed=0))
    first, second = next(batches), next(batches)
    assert first != second
    assert next(iter(image_flow_training.Batches(100, 100, seed=1))) != first


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Returns an uninterrupted training of 10 steps."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(run, 10, "--flip")
    return run


def test_a_resumed_training_is_the_same_bit_for_bit(whole_run, tmp_path):
    run = tmp_path / "run"
    train(run, 2, "--flip")
    resumed, whole = train(run, 10, "--flip", "--resume"), torch.load(whole_run / "last.ckpt")
    assert resumed["global_step"] == 10
    for name in ("state_dict", "current_model_state", "averaging_state"):
        assert_identical(resumed[name], whole[name])
    assert_identical(resumed["optimizer_states"][0], whole["optimizer_states"][0])


def test_reversible_training_is_the_same_but_for_rounding(tmp_path):
    curves, states = [], []
    for arguments in ([], ["--reversible"]):
        run = tmp_path / f"run{len(states)}"
        checkpoint = train(run, 2, "--flow-steps", "3", *arguments)
        flow = image_flow_training.build_flow(checkpoint["hyper_parameters"])
        assert any(isinstance(module, reversible.Chain) for module in flow.modules()) == bool(arguments)
        curves.append(scalars(run, "validation_bits_per_dim"))
        states.append(list(checkpoint["state_dict"]))
    assert states[0] == states[1]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_weights_are_averaged_and_the_learning_rate_warms_up(tmp_path):
    run = tmp_path / "run"
    before = train(run, 2, "--ema-decay", "0.9")
    after = train(run, 3, "--ema-decay", "0.9", "--resume")
    decay = 3 / 12  # for the third average, (1 + n) / (10 + n) with n = 2
    for name, average in after["state_dict"].items():
        current = after["current_model_state"][name]
        if average.is_floating_point():
            torch.testing.assert_close(average, decay * before["state_dict"][name] + (1 - decay) * current)
        else:
            assert torch.equal(average, current)
    rates = [checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] for checkpoint in (before, after)]
    assert rates == pytest.approx([1e-3 * 3 / 30, 1e-3 * 4 / 30])


def test_the_decay_of_averages_grows_to_its_value():
    update = image_flow_training.growing_average(0.9)
    for steps, decay in ((0, 0.1), (71, 72 / 81), (80, 0.9), (1000, 0.9)):
        averages = [torch.zeros(2)]
        update(averages, [torch.ones(2)], torch.tensor(steps))
        torch.testing.assert_close(averages[0], torch.full((2,), 1 - decay))


@pytest.fixture
def ten_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the clock of the training."""
    seconds, step = [0], image_flow_training.ImageFlow.training_step

    def timed(module: nn.Module, batch: list[Tensor], batch_idx: int) -> Tensor:
        seconds[0] += 10
        return step(module, batch, batch_idx)

    monkeypatch.setattr(image_flow_training.ImageFlow, "training_step", timed)
    monkeypatch.setattr(image_flow_training.time, "monotonic", lambda: seconds[0])


def interrupt_in_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = image_flow_training.ImageFlow.training_step

    def interrupted(module: nn.Module, batch: list[Tensor], batch_idx: int) -> Tensor:
        if module.trainer.global_step + 1 == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(image_flow_training.ImageFlow, "training_step", interrupted)


@pytest.mark.usefixtures("ten_seconds_a_step")
@pytest.mark.parametrize("end", ["Ctrl-C", "minutes"])
def test_an_early_end_leaves_a_checkpoint_pictures_and_figures(end, whole_run, tmp_path, monkeypatch, capsys):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    limits = ("--minutes", "0.5") if end == "minutes" else ("--training-steps", "10")
    with monkeypatch.context() as patch:
        if end == "Ctrl-C":
            interrupt_in_step(3, patch)
        train_image_flow.main(["--output", str(run), *SMALL, "--flip", *limits])
    assert signal.getsignal(signal.SIGINT) is before
    printed = capsys.readouterr().out
    assert ("Ctrl-C: ends after this step" in printed) == (end == "Ctrl-C")
    assert f"3 steps are in {run / 'last.ckpt'}" in printed
    assert "test bits per dimension" in printed
    assert {path.stem for path in run.glob("*.png")} == {"samples", "temperatures", "interpolations", "levels"}
    resumed, whole = train(run, 10, "--flip", "--resume"), torch.load(whole_run / "last.ckpt")
    assert_identical(resumed["state_dict"], whole["state_dict"])


class Bar(list):
    """Records the updates of a progress bar."""

    def __call__(self, initial: int, **_: Any) -> Bar:
        self.n = initial
        return self

    def update(self, steps: int) -> bool:
        self.n += steps
        self.append((steps, self.n, self.total))
        return True

    def set_postfix(self, values: dict[str, str]) -> None:
        assert "train_bits_per_dim" in values

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_the_progress_bar_goes_on_where_the_training_does(tmp_path, monkeypatch):
    """Earlier steps do not count for this part, which would make it look fast."""
    run, bar = tmp_path / "run", Bar()
    monkeypatch.setattr(image_flow_training, "tqdm", bar)
    train(run, 2)
    assert bar == [(1, 1, 2), (1, 2, 2)]
    bar.clear()
    train_image_flow.main(["--output", str(run), *SMALL, "--resume", "--minutes", "0.5"])
    assert bar == [(1, 3, 5), (1, 4, 5), (1, 5, 5)]


def test_ten_minutes_are_the_limit_where_none_is_given():
    for arguments, minutes in (([], 10), (["--training-steps", "2"], math.inf), (["--minutes", "3"], 3)):
        assert train_image_flow.parse_arguments(["--output", "run", *arguments])[1].minutes == minutes


def test_a_training_that_is_over_is_evaluated_again(whole_run, capsys):
    before = torch.load(whole_run / "last.ckpt")
    assert_identical(train(whole_run, 4, "--flip", "--resume")["state_dict"], before["state_dict"])
    assert "10 steps are in" in capsys.readouterr().out


def test_images_are_drawn_from_a_checkpoint(whole_run, tmp_path, monkeypatch, capsys):
    picture, checkpoint = tmp_path / "samples.png", torch.load(whole_run / "last.ckpt")
    sample_checkpoint.load_flow(whole_run / "last.ckpt").save(tmp_path / "flow.safetensors")
    flow = nflows_kconv.nflows.load_flow(tmp_path / "flow.safetensors")
    for name, value in flow.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"flow.{name}"])
    command = ["sample_checkpoint.py", str(whole_run / "last.ckpt"), "--output", str(picture), "--count", "9"]
    monkeypatch.setattr(sys, "argv", command)
    sample_checkpoint.main()
    assert f"wrote {picture}" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.size == (7 * (8 * 10 + 2), 7 * (2 * 10 + 2))
    monkeypatch.setattr(sys, "argv", [*command, "--label", "3"])
    with pytest.raises(SystemExit):
        sample_checkpoint.main()
    assert "--label needs a flow that was trained with --conditional" in capsys.readouterr().err


def test_a_directory_must_have_folders_of_classes(tmp_path, capsys):
    for path in ("train/a/0.png", "test/0.png"):
        save_image(tmp_path / path, gray(4, 4))
    run = ("--data", "directory", "--data-root", str(tmp_path), "--output", str(tmp_path / "run"))
    assert f"{tmp_path}/test must hold a folder of images for each class" in refused(capsys, *run)


def test_gradients_are_clipped(tmp_path):
    _, arguments = train_image_flow.parse_arguments(["--output", str(tmp_path), "--gradient-clip", "0.5"])
    assert train_image_flow.build_trainer(arguments).gradient_clip_val == 0.5


def test_tensorboard_has_the_curves(whole_run):
    assert list(scalars(whole_run, "validation_bits_per_dim")) == [1, 3, 5, 7, 9]
    assert 5 < scalars(whole_run, "train_bits_per_dim")[9] < 9


# Trains twice, as Lightning starts processes and as torchrun does: in forks of this one, which saves imports.
TWO_PROCESSES = """
import sys
import train_image_flow
from torch import multiprocessing
from torch.distributed.launcher import LaunchConfig, elastic_launch

arguments = sys.argv[1:]
sys.argv += ["--minutes", "1e-9", "--devices", "2"]
sys.argv[0] = train_image_flow.__file__
alone = multiprocessing.get_context("fork").Process(target=train_image_flow.main)
alone.start()
alone.join()
torchrun = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0)
elastic_launch(torchrun, train_image_flow.main)([*arguments, "--training-steps", "10", "--resume"])
sys.exit(alone.exitcode)
"""


def test_two_processes_train_as_one(whole_run, tmp_path):
    """Lightning starts one step, whose time then runs out; torchrun starts nine."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", TWO_PROCESSES, *SMALL, "--flip", "--output", str(run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("distributed_backend=gloo") == 2
    assert done.stdout.count("test bits per dimension") == 2
    for name in ("train_bits_per_dim", "validation_bits_per_dim"):
        assert scalars(run, name)[9] == pytest.approx(scalars(whole_run, name)[9], abs=3e-5)


def test_mixed_precision_leaves_the_layer_in_float32(tmp_path, monkeypatch):
    seen: dict[type, set] = {InvertibleConv2d: set(), nn.Conv2d: set()}

    def watch(kind: type) -> None:
        forward = kind.forward

        def watched(self, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor, Tensor]:
            output = forward(self, *arguments, **keywords)
            if torch.is_autocast_enabled("cpu"):
                seen[kind].add((output if isinstance(output, Tensor) else output[0]).dtype)
            return output

        monkeypatch.setattr(kind, "forward", watched)

    for kind in seen:
        watch(kind)
    train(tmp_path / "run", 2, "--precision", "bf16-mixed", "--flow-steps", "2")
    assert seen == {InvertibleConv2d: {torch.float32}, nn.Conv2d: {torch.bfloat16}}


def test_nothing_is_overwritten(whole_run, tmp_path, capsys):
    def state() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in whole_run.iterdir()}

    before = state()
    run = ("--output", str(whole_run), "--flip", "--training-steps", "10")
    error = refused(capsys, *run)
    assert f"--output must be a new folder, or come with --resume, and {whole_run} exists" in error
    error = refused(capsys, *run, "--resume", "--seed", "7", "--kernel-size", "0")
    assert f"{whole_run / 'last.ckpt'} is of another configuration: " in error
    assert error.endswith("configuration: kernel_size is 3 there, 0 here; seed is 0 there, 7 here")
    assert state() == before


# Evaluation.


@torch.no_grad()
@pytest.mark.parametrize("build", FLOWS)
def test_pictures_of_latents(build):
    """Covers continuous data, which are not rounded."""
    flow = pkgutil.resolve_name(build)((1, 8, 8), 3, 1, hidden_channels=4, corners="TL", preprocessing=None)
    images, samples = torch.randn(2, 4, 1, 8, 8)
    (latents, _), (fresh, _) = flow.encode(images), flow.encode(samples)
    first, *levels, last = image_flow_evaluation.resampled(flow, images, samples).unflatten(0, (5, 4))
    assert torch.equal(first, images)
    assert torch.equal(last, samples)
    for pictures, (start, stop) in zip(levels, [(0, 32), (32, 48), (48, 64)], strict=True):
        is_fresh = (torch.arange(64) >= start) & (torch.arange(64) < stop)
        mixed, _ = flow.encode(pictures)
        torch.testing.assert_close(mixed, torch.where(is_fresh, fresh, latents), rtol=1e-3, atol=1e-3)
    between = image_flow_evaluation.interpolated(flow, latents).unflatten(0, (4, 10))
    torch.testing.assert_close(between[:, 0], images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(between[:, -1], images.roll(-1, 0), rtol=1e-4, atol=1e-4)
    middle, _ = flow.encode(between[1, [3]])
    torch.testing.assert_close(middle, (2 * latents[[1]] + latents[[2]]) / 3, rtol=1e-3, atol=1e-3)


class Known(nn.Module):
    """A density of 2^-8 per value, halved for images with an odd sum; three draws estimate 1/2, 1 and 3/2 of it."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))
        self.factors = cycle([0.5, 1, 1.5])

    def log_prob(self, images: Tensor, labels: None) -> Tensor:
        dimensions = images[0].numel()
        return math.log(next(self.factors)) - math.log(2) * dimensions * (8 + images.sum((1, 2, 3)) % 2)


def test_bits_per_dim_of_a_known_distribution(tmp_path):
    data = image_data.load("digits", tmp_path)
    odd = data.test.tensors[0].long().sum((1, 2, 3)) % 2
    values = image_flow_evaluation.bits_per_dim_of_test(Known(), data, False, 100, 3)
    torch.testing.assert_close(values, 8 + odd.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", FLOWS)
def test_what_a_run_prints_and_writes(build, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(run, 1, "--flow", build, "--conditional", "--corners", "TL", "BR", "--importance-samples", "2")
    output = capsys.readouterr().out
    mean, error = re.search(r"test bits per dimension (\S+) \+- (\S+), .* over 397 images, 2 draws", output).groups()
    assert 6 < float(mean) < 9
    assert 0 < float(error) < 0.1
    assert float(re.search(r"round-trip error (\S+),", output)[1]) < 1e-3
    assert "of 10 test images 10 are decoded exactly" in output
    assert float(re.search(r"100 samples in (\S+) ms", output)[1]) > 0
    assert "log2 15 = 3.907" in output
    for name, rows in (("samples", 10), ("temperatures", 6), ("interpolations", 10), ("levels", 3)):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.size == (6 * (10 * 10 + 2), 6 * (rows * 10 + 2))
    command = ["sample_checkpoint.py", str(run / "last.ckpt"), "--output", str(run / "more.png"), "--count", "2"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        sample_checkpoint.main()
    assert "--label must be given, as the flow was trained with --conditional" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--label", "3"])
    sample_checkpoint.main()
    assert (run / "more.png").exists()
