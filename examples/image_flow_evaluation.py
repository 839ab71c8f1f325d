"""Evaluates a trained flow of `finc_flow` for `train_image_flow.py`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from image_data import ImageData, save_picture
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from nflows_kconv.diagnostics import round_trip
from nflows_kconv.flows.images import bits_per_dim, grid, importance_weighted_bound
from nflows_kconv.flows.sampling import GraphSampler

COLUMNS = 10
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@torch.no_grad()
def evaluate(
    flow: nn.Module,
    data: ImageData,
    output: Path,
    *,
    conditional: bool,
    batch_size: int,
    importance_samples: int,
) -> None:
    """Writes four pictures; prints round-trip error, sampling time and, last because slowest, bits per dimension.

    Args:
        flow: A flow of `finc_flow`.
        data: The data set with the test images.
        output: The folder for the pictures.
        conditional: Whether the flow is conditioned on classes.
        batch_size: Batch size of the evaluation.
        importance_samples: Draws of the dequantisation noise per image.
    """
    flow.eval()
    torch.manual_seed(0)
    device = next(flow.parameters()).device
    count = min(COLUMNS, len(data.test))
    images, classes = default_collate([data.test[index] for index in range(count)])
    images, classes = images.to(device).float(), classes.to(device) if conditional else None
    latents, _ = flow.encode(images)
    restored = (flow.decode(latents) == images).flatten(1).all(1).sum()
    error = round_trip(flow, images, classes).error
    print(f"round-trip error {error:.1e}, relative; of {count} test images {restored} are decoded exactly")

    sampler = GraphSampler(flow, COLUMNS**2)
    labels = torch.arange(COLUMNS**2, device=device) % data.num_classes if conditional else None
    milliseconds = 1000 * sampling_time(lambda: sampler(labels=labels), device)
    print(f"{COLUMNS**2} samples in {milliseconds:.1f} ms")

    rows = {
        "samples": sampler(labels=labels),
        "temperatures": at_temperatures(sampler, None if labels is None else labels[:COLUMNS]),
        "interpolations": interpolated(flow, latents),
        "levels": resampled(flow, images, sampler(count, labels=classes)),
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


def bits_per_dim_of_test(
    flow: nn.Module, data: ImageData, conditional: bool, batch_size: int, importance_samples: int
) -> Tensor:
    """Returns bits per dimension of each test image."""
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
    """Returns the median seconds of several runs."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        sample()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # without the first, which captures the graph


def at_temperatures(sampler: GraphSampler, labels: Tensor | None) -> Tensor:
    """Returns a row per temperature; a column has the same noise in all rows."""
    rows = []
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        rows.append(sampler(COLUMNS, labels=labels, temperature=temperature))
    return torch.cat(rows)


def interpolated(flow: nn.Module, latents: Tensor) -> Tensor:
    """Returns a row per image, on a straight line between its latent and that of the next image."""
    weights = torch.linspace(0, 1, COLUMNS, device=latents.device)[:, None]
    following = latents.roll(-1, 0)
    return flow.decode(torch.cat([torch.lerp(*pair, weights) for pair in zip(latents, following, strict=True)]))


def resampled(flow: nn.Module, images: Tensor, samples: Tensor) -> Tensor:
    """Returns test images, a row per level with the latents of that level from samples, and the samples."""
    sizes = [math.prod(shape) for shape in flow.latent_shapes]
    kept, fresh = (flow.encode(each)[0].split(sizes, 1) for each in (images, samples))
    rows = [flow.decode(torch.cat([*kept[:n], fresh[n], *kept[n + 1 :]], 1)) for n in range(len(sizes))]
    return torch.cat([images, *rows, samples])
