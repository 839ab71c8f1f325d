"""Data sets of images for `train_image_flow.py`: uint8 tensors [C, H, W] with their classes.

Only `download` downloads anything. Digits, photographs, Fashion-MNIST, CIFAR-10 and ImageNet are held in memory, which
is 4 GB for ImageNet 32 and 16 GB for ImageNet 64 in each process; the others are read as needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

try:
    from torchvision import datasets, transforms
except RuntimeError:
    # The operators of PyPI's torchvision need CUDA. A torch without it cannot load them, and the import then fails
    # because two schemas are missing. This defines them; the data sets need no operators.
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import datasets, transforms

VALIDATION_IMAGES = 2048  # for the validation during training
DIGITS_SPREAD = 15  # values out of 0..255 per gray level, of which there are 17
PICTURE_WIDTH = 600
PATCH = 32  # side of a photograph's patches
PATCH_STRIDE = 8  # between training patches, which overlap
CHANNELS = {"L": 1, "RGB": 3}  # by PIL mode, with 8 bits per channel


class ImageData(NamedTuple):
    """A data set.

    Attributes:
        train: Pairs of an image, uint8 [C, H, W], and its class.
        validation: Images to monitor training; they select nothing.
        test: Images for the evaluation.
        image_shape: (C, H, W).
        num_classes: None if there are no classes.
        note: A note on bits per dimension.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    image_shape: tuple[int, int, int]
    num_classes: int | None
    note: str = ""


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        load: A function of the folder and the size of images, or None.
        address: Where to get the files.
        downloadable: The class of torchvision that downloads it, if any does.
    """

    load: Callable[[Path, int | None], ImageData]
    address: str
    downloadable: Any = None


def load(name: str, root: Path, image_size: int | None = None) -> ImageData:
    """Reads a data set.

    Args:
        name: One of `SOURCES`.
        root: The folder that holds it.
        image_size: Height and width to which "celeba" (default 64) and "directory" (default: unchanged) crop and
            resize.

    Raises:
        FileNotFoundError: If a file is missing, with where to get it.
        ValueError: If a file has unexpected contents.
    """
    if image_size is not None and name not in ("celeba", "directory"):
        raise ValueError(f"an image size goes with celeba and directory only, got {image_size} for {name}")
    return SOURCES[name].load(root, image_size)


def download(name: str, root: Path) -> None:
    """Downloads a data set by torchvision.

    Raises:
        ValueError: If torchvision cannot download it.
    """
    source = SOURCES[name]
    if source.downloadable is None:
        raise ValueError(f"torchvision cannot download {name}; get it from {source.address}")
    source.downloadable(root, download=True)


def save_picture(pixels: Tensor, path: Path) -> None:
    """Writes a picture [C, H, W], enlarged by a whole factor to about `PICTURE_WIDTH` if it is small."""
    picture = transforms.ToPILImage()(pixels)
    ImageOps.scale(picture, max(1, round(PICTURE_WIDTH / picture.width)), Image.Resampling.NEAREST).save(path)


def _digits(root: Path, image_size: int | None) -> ImageData:
    """Loads scikit-learn's 8x8 digits.

    Each of the 17 gray levels v becomes 15 v + n with n uniform in 0..14, drawn once. A model of these images is a
    model of the levels with log P(v) >= E log P(15 v + n) + D log 15: log2 15 fewer bits per dimension.
    """
    digits = load_digits()
    levels = torch.tensor(digits.images, dtype=torch.uint8)[:, None]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(DIGITS_SPREAD, levels.shape, generator=generator, dtype=torch.uint8)
    order = torch.randperm(len(levels), generator=generator)
    images, classes = (DIGITS_SPREAD * levels + noise)[order], torch.tensor(digits.target)[order]
    note = (
        f"the 17 gray levels of the digits are spread over 0..254 by uniform noise: less log2 {DIGITS_SPREAD} = "
        f"{math.log2(DIGITS_SPREAD):.3f}, these are bits per dimension of the 17 levels"
    )
    return _in_memory((images[:1400], classes[:1400]), (images[1400:], classes[1400:]), 10, note)


def _photographs(root: Path, image_size: int | None) -> ImageData:
    """Cuts 32x32 patches of colour photographs in scikit-image and scikit-learn; the test set is other photographs."""
    names = ("astronaut", "coffee", "rocket")
    train = [*(getattr(skimage.data, name)() for name in names), skimage.data.stereo_motorcycle()[0]]
    train.append(load_sample_image("china.jpg"))
    test = [skimage.data.chelsea(), load_sample_image("flower.jpg")]
    splits = (
        torch.cat([_patches(photograph, stride) for photograph in photographs])
        for photographs, stride in ((train, PATCH_STRIDE), (test, PATCH))
    )
    return _in_memory(*((patches, torch.zeros(len(patches), dtype=torch.int64)) for patches in splits), None)


def _patches(photograph: np.ndarray, stride: int) -> Tensor:
    patches = torch.from_numpy(np.array(photograph)).unfold(0, PATCH, stride).unfold(1, PATCH, stride)
    return patches.flatten(0, 1).contiguous()


def _fashion_mnist(root: Path, image_size: int | None) -> ImageData:
    published = datasets.FashionMNIST
    names = [Path(name).stem for name, _ in published.resources]
    _require("fashion-mnist", [root / "FashionMNIST" / "raw" / name for name in names])
    splits = (published(root, train=train) for train in (True, False))
    return _in_memory(*((split.data[:, None], split.targets) for split in splits), 10)


def _cifar10(root: Path, image_size: int | None) -> ImageData:
    published = datasets.CIFAR10
    names = [name for name, _ in (*published.train_list, *published.test_list)] + [published.meta["filename"]]
    folder = root / published.base_folder
    _require("cifar10", [folder / name for name in names])
    splits = [_verified(folder, partial(published, root, train=train)) for train in (True, False)]
    pairs = ((torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets)) for split in splits)
    return _in_memory(*pairs, 10)


def _imagenet(size: int, root: Path, image_size: int | None) -> ImageData:
    """Loads npz batches of Chrabaszcz, Loshchilov, Hutter 2017 (arXiv 1707.08819); the test set is hidden."""
    folder = root / f"imagenet{size}"
    train = [folder / f"train_data_batch_{index}.npz" for index in range(1, 11)]
    test = folder / "val_data.npz"
    _require(f"imagenet{size}", [*train, test])
    images, classes = zip(*(_npz_batch(path, size) for path in train), strict=True)
    return _in_memory((torch.cat(images), torch.cat(classes)), _npz_batch(test, size), 1000)


def _npz_batch(path: Path, size: int) -> tuple[Tensor, Tensor]:
    with np.load(path) as batch:
        if not {"data", "labels"} <= set(batch.files):
            raise ValueError(f"{path} must hold data and labels, got {batch.files}")
        data, labels = batch["data"], batch["labels"]
    if data.dtype != np.uint8:
        raise ValueError(f"{path} must hold images with values 0..255 in uint8, got {data.dtype}")
    if data.shape[1:] != (3 * size * size,):
        raise ValueError(f"{path} must hold images with 3 x {size} x {size} values each, got an array {data.shape}")
    return torch.from_numpy(data).view(-1, 3, size, size), torch.from_numpy(labels.astype(np.int64)) - 1


def _celeba(root: Path, image_size: int | None) -> ImageData:
    """Loads the aligned faces: the middle 148 x 148 pixels, resized, as is usual since arXiv 1512.09300."""
    published, size = datasets.CelebA, image_size or 64
    folder = root / published.base_folder
    faces = folder / "img_align_celeba"
    names = [name for _, _, name in published.file_list if name.endswith(".txt")]
    _require("celeba", [*(folder / name for name in names), faces])
    transform = transforms.Compose([transforms.CenterCrop(148), transforms.Resize(size), transforms.PILToTensor()])
    present = set(os.listdir(faces))
    splits = []
    for split in ("train", "valid", "test"):
        arguments = {"split": split, "transform": transform, "target_type": "identity"}
        splits.append(_verified(folder, partial(published, root, **arguments)))
        _require("celeba", [faces / name for name in splits[-1].filename if name not in present])
    train, validation, test = splits
    return ImageData(train, _some_of(validation), test, (3, size, size), None)


def _directory(root: Path, image_size: int | None) -> ImageData:
    """Loads folders as torchvision's ImageFolder does."""
    _require("directory", [root / "train", root / "test"])
    for split in (root / "train", root / "test"):
        if not any(path.is_dir() for path in split.iterdir()):
            raise ValueError(f"{split} must hold a folder of images for each class, one at least, got none")
    resize = [] if image_size is None else [partial(ImageOps.fit, size=(image_size, image_size))]
    transform = transforms.Compose([*resize, transforms.PILToTensor()])
    train, test = (
        datasets.ImageFolder(root / split, transform=transform, loader=Image.open) for split in ("train", "test")
    )
    if train.classes != test.classes:
        raise ValueError(
            f"{root}/train and {root}/test must have the same folders, got {train.classes}, {test.classes}"
        )
    first, _ = train.samples[0]
    with Image.open(first) as image:
        mode, size = image.mode, image.size
    if mode not in CHANNELS:
        raise ValueError(
            f"{first} must be gray or RGB with 8 bits a channel (mode L or RGB), got mode {mode}: convert it"
        )
    for path, _ in train.samples + test.samples:
        with Image.open(path) as image:
            if image.mode != mode:
                raise ValueError(f"images must have the same channels: {first} has mode {mode}, {path} {image.mode}")
            if image_size is None and image.size != size:
                raise ValueError(
                    f"images must have the same size, or come with --image-size: {first} has {size}, "
                    f"{path} {image.size}"
                )
    width, height = size if image_size is None else (image_size, image_size)
    return ImageData(train, _some_of(test), test, (CHANNELS[mode], height, width), len(train.classes))


def _in_memory(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int | None, note: str = ""
) -> ImageData:
    test_set = TensorDataset(*test)
    return ImageData(TensorDataset(*train), _some_of(test_set), test_set, tuple(train[0].shape[1:]), num_classes, note)


def _some_of(images: Dataset) -> Subset:
    return Subset(images, range(0, len(images), math.ceil(len(images) / VALIDATION_IMAGES)))


def _require(name: str, paths: Iterable[Path]) -> None:
    for path in paths:
        if not path.exists():
            source = SOURCES[name]
            offer = (
                f", or by train_image_flow.py --data {name} --data-root ... --download" if source.downloadable else ""
            )
            raise FileNotFoundError(f"{name} needs {path}, which does not exist; get it from {source.address}{offer}")


def _verified(folder: Path, published: Callable[[], Any]) -> Any:
    try:
        return published()
    except RuntimeError as error:  # all files exist, so a checksum is wrong
        raise ValueError(f"the files in {folder} are not those that were published: their checksums differ") from error


_IMAGENET = "https://image-net.org/download-images (downsampled, npz format), unpacked into the folder imagenet"
SOURCES = {
    "digits": Source(_digits, "scikit-learn, which they come with"),
    "photographs": Source(_photographs, "scikit-image and scikit-learn, which they come with"),
    "fashion-mnist": Source(_fashion_mnist, "https://github.com/zalandoresearch/fashion-mnist", datasets.FashionMNIST),
    "cifar10": Source(_cifar10, datasets.CIFAR10.url, datasets.CIFAR10),
    "imagenet32": Source(partial(_imagenet, 32), f"{_IMAGENET}32"),
    "imagenet64": Source(partial(_imagenet, 64), f"{_IMAGENET}64"),
    "celeba": Source(_celeba, "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", datasets.CelebA),
    "directory": Source(
        _directory, "your own images: --data-root PATH with PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE"
    ),
}
