"""Writes a few images in the published format of each data set.

Each function returns its images, [B, C, H, W], with the test images last, and makes torchvision accept the files.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from image_data import datasets
from PIL import Image

random = np.random.default_rng(0)


def write_fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """http://yann.lecun.com/exdb/mnist: two zero bytes, the type, the rank, the sizes, then the values."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = random.integers(256, size=(7, 28, 28), dtype=np.uint8)
    for name, part in (("train", images[:5]), ("t10k", images[5:])):
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, *part.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + part.tobytes())
        header = struct.pack(">BBBBI", 0, 0, 8, 1, len(part))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(range(len(part))))
    return images[:, None]


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """https://www.cs.toronto.edu/~kriz/cifar.html: pickled rows of 1024 red, 1024 green, 1024 blue values."""
    published = datasets.CIFAR10
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = random.integers(256, size=(12, 3, 32, 32), dtype=np.uint8)
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    for index, name in enumerate(names):
        rows = images[2 * index : 2 * index + 2].reshape(2, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [index, index + 1]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane"] * 10}, protocol=2))
    # torchvision checks the checksums of the real files.
    monkeypatch.setattr(published, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(published, "test_list", [["test_batch", None]])
    monkeypatch.setattr(published, "meta", published.meta | {"md5": None})
    return images


def write_imagenet(size: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """https://patrykchrabaszcz.github.io/Imagenet32: rows as in CIFAR-10, labels from 1 on, the mean image."""
    folder = root / f"imagenet{size}"
    folder.mkdir(parents=True)
    images = random.integers(256, size=(11, 3, size, size), dtype=np.uint8)
    rows = images.reshape(11, -1)
    for index in range(10):
        part = rows[index : index + 1]
        np.savez(
            folder / f"train_data_batch_{index + 1}.npz", data=part, labels=np.array([index + 1]), mean=part.mean(0)
        )
    np.savez(folder / "val_data.npz", data=rows[10:], labels=np.array([1000]))
    return images


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html: JPEGs of 178 x 218 pixels, and tables with spaces."""
    published = datasets.CelebA
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{index:06}.jpg" for index in range(1, 7)]
    pictures = []
    for name in names:
        coarse = Image.fromarray(random.integers(256, size=(4, 3, 3), dtype=np.uint8))
        coarse.resize((178, 218), Image.Resampling.BICUBIC).save(folder / "img_align_celeba" / name)
        picture = Image.open(folder / "img_align_celeba" / name).crop((15, 35, 163, 183))
        pictures.append(np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    tables = {
        "list_eval_partition.txt": [f"{name} {part}" for name, part in zip(names, (0, 0, 1, 1, 2, 2), strict=True)],
        "identity_CelebA.txt": [f"{name} 7" for name in names],
        "list_bbox_celeba.txt": ["6", "image_id x_1 y_1 width height", *(f"{name}  95  71 226 313" for name in names)],
        "list_landmarks_align_celeba.txt": ["6", "lefteye_x lefteye_y", *(f"{name} 69  109" for name in names)],
        "list_attr_celeba.txt": ["6", "Bald Smiling", *(f"{name} -1  1" for name in names)],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(published, "file_list", [("", None, name) for name in tables])
    return np.stack([pictures[index] for index in (0, 1, 4, 5)])


def write_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    images = random.integers(256, size=(6, 3, 4, 8), dtype=np.uint8)
    for index, image in enumerate(images):
        folder = root / ("train" if index < 4 else "test") / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index}.png")
    return images[[0, 2, 1, 3, 4, 5]]
