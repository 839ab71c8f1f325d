"""What `train_image_flow.py` prints and draws about a trained flow of nflows or normflows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import torch
from image_data import ImageData
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from nflows_kconv.images import bits_per_dim, grid, importance_weighted_bound
from nflows_kconv.sampling import GraphSampler

COLUMNS = 10
PICTURE_WIDTH = 600
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Codec(NamedTuple):
    """A flow in parts, behind the same names for both libraries.

    Attributes:
        dequantize: From images, values 0..255, to the real numbers of which the flow has a density.
        encode: From those to the latent variables, [B, ...] for each level, the one next to the data first.
        decode: Undoes `encode`.
        quantize: Undoes `dequantize`.
    """

    dequantize: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], list[Tensor]]
    decode: Callable[[list[Tensor]], Tensor]
    quantize: Callable[[Tensor], Tensor]


def nflows_codec(flow: nn.Module, levels: int) -> Codec:
    """nflows lists transforms from data to noise and has flat noise; it gives the parts of a flow no public name."""
    preprocessing, multiscale = flow._transform._transforms

    def encode(numbers: Tensor) -> list[Tensor]:
        dimensions = numbers[0].numel()
        sizes = [dimensions >> level for level in range(1, levels)]
        return list(multiscale(numbers)[0].split([*sizes, dimensions - sum(sizes)], 1))

    return Codec(
        lambda images: preprocessing(images)[0],
        encode,
        lambda latents: multiscale.inverse(torch.cat(latents, 1))[0],
        lambda numbers: preprocessing.inverse(numbers)[0],
    )


def normflows_codec(flow: nf.MultiscaleFlow, levels: int) -> Codec:
    """normflows runs from latent to data, and lists the level next to the data last."""
    multiscale = nf.MultiscaleFlow(flow.q0, flow.flows, flow.merges)
    return Codec(
        lambda images: flow.transform.inverse(images)[0],
        lambda numbers: multiscale.inverse_and_log_det(numbers)[0][::-1],
        lambda latents: multiscale.forward_and_log_det(latents[::-1])[0],
        lambda numbers: flow.transform(numbers)[0],
    )


CODECS = {"nflows": nflows_codec, "normflows": normflows_codec}


@torch.no_grad()
def evaluate(
    flow: nn.Module,
    library: str,
    levels: int,
    data: ImageData,
    output: Path,
    *,
    conditional: bool,
    batch_size: int,
    importance_samples: int,
) -> None:
    """Writes four pictures; prints round-trip error, sampling time and, last as it takes longest, bits per dimension.

    Args:
        flow: Made by `finc_flow`.
        library: "nflows" or "normflows".
        levels: L.
        data: Its test images are used.
        output: The folder for the pictures.
        conditional: Whether the flow is conditioned on classes.
        batch_size: Of the evaluation.
        importance_samples: Draws of the dequantisation noise for each image.
    """
    flow.eval()
    torch.manual_seed(0)
    device = next(flow.parameters()).device
    count = min(COLUMNS, len(data.test))
    images, classes = default_collate([data.test[index] for index in range(count)])
    images, classes = images.to(device).float(), classes.to(device) if conditional else None
    codec = CODECS[library](flow, levels)
    numbers = codec.dequantize(images)
    latents = codec.encode(numbers)
    error = (codec.decode(latents) - numbers).abs().max()
    print(f"round-trip error {error:.1e}, the largest over the preprocessed values of {count} test images")

    sampler = GraphSampler(flow, COLUMNS**2)
    labels = torch.arange(COLUMNS**2, device=device) % data.num_classes if conditional else None
    milliseconds = 1000 * sampling_time(lambda: sampler(labels=labels), device)
    print(f"{COLUMNS**2} samples in {milliseconds:.1f} ms")

    rows = {
        "samples": sampler(labels=labels),
        "temperatures": at_temperatures(sampler, None if labels is None else labels[:COLUMNS]),
        "interpolations": interpolated(codec, latents),
        "levels": resampled(codec, images, latents, sampler(count, labels=classes)),
    }
    columns = {"levels": count}
    for name, pictures in rows.items():
        path = output / f"{name}.png"
        save_picture(grid(pictures, columns.get(name, COLUMNS)).cpu(), path)
        print(f"wrote {path}")

    torch.manual_seed(0)
    values = bits_per_dim_of_test(flow, data, conditional, batch_size, importance_samples)
    error = values.std() / len(values) ** 0.5
    print(
        f"test bits per dimension {values.mean():.4f} +- {error:.4f}, median {values.median():.4f} "
        f"(standard error over {len(values)} images, {importance_samples} draw{'s' * (importance_samples > 1)} "
        "of the dequantisation noise each)"
    )
    if data.note:
        print(f"({data.note})")


def save_picture(pixels: Tensor, path: Path) -> None:
    """Writes a picture [C, H, W], small ones enlarged by a whole factor, to about `PICTURE_WIDTH`."""
    picture = to_pil_image(pixels)
    ImageOps.scale(picture, max(1, round(PICTURE_WIDTH / picture.width)), Image.Resampling.NEAREST).save(path)


def bits_per_dim_of_test(
    flow: nn.Module, data: ImageData, conditional: bool, batch_size: int, importance_samples: int
) -> Tensor:
    """Bits per dimension of each test image."""
    device = next(flow.parameters()).device
    bounds = []
    for images, classes in tqdm(DataLoader(data.test, batch_size), desc="test", unit="batch"):
        labels = classes.to(device) if conditional else None
        bound = importance_weighted_bound(
            lambda x, labels=labels: flow.log_prob(x, labels), images.to(device).float(), importance_samples
        )
        bounds.append(bits_per_dim(bound, data.image_shape).cpu())
    return torch.cat(bounds)


def sampling_time(sample: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds: the median of several runs."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        sample()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one captures the graph


def at_temperatures(sampler: GraphSampler, labels: Tensor | None) -> Tensor:
    """A row for each temperature; a column has the same noise in all of them."""
    rows = []
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        rows.append(sampler(COLUMNS, labels=labels, temperature=temperature))
    return torch.cat(rows)


def interpolated(codec: Codec, latents: list[Tensor]) -> Tensor:
    """A row for each image: on straight lines between its latent variables and those of the next image."""
    weights = torch.linspace(0, 1, COLUMNS, device=latents[0].device)
    between = [
        torch.stack([torch.lerp(latent, latent.roll(-1, 0), weight) for weight in weights], 1).flatten(0, 1)
        for latent in latents
    ]
    return codec.quantize(codec.decode(between))


def resampled(codec: Codec, images: Tensor, latents: list[Tensor], samples: Tensor) -> Tensor:
    """Test images; then a row for each level, whose latent variables alone are those of samples; then the samples."""
    fresh = codec.encode(codec.dequantize(samples))
    rows = [images]
    for level in range(len(latents)):
        mixed = [(fresh if index == level else latents)[index] for index in range(len(latents))]
        rows.append(codec.quantize(codec.decode(mixed)))
    return torch.cat([*rows, samples])
