"""Times the models of the papers' tables, forward and sampling, next to the published figures.

    python -m benchmarks.published                     prints the tables of the CPU: all models, about an hour
    --models MNIST CIFAR-10 --images 1 --limit 10      some of it, cells of at most ten seconds
    --device cuda                                      on the GPU; writes benchmarks/results/published-cuda-<GPU>.json
    --output FILE.json                                 writes there
    python -m benchmarks.plots FILE.json               draws the sampling times

Each model is nflows' `finc_flow` with couplings 512 wide, untrained, in evaluation mode without gradients; "forward" is
`log_prob`, "sampling" is `sample`. Only the convolution differs. All convolutions of a model take turns; times are
medians after a first call. A cell whose first call takes longer than --limit seconds is skipped and marked.

Published figures are for other hardware and trained models, from slides of Kallappa, Nagar, Varma 2023 (arXiv
2301.09266). Two of their tables contradict each other: (A) compares methods, (B) has FInC Flow's time for 100 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import command_line, layer, sampling, timing
from benchmarks.contestants import Contestants
from benchmarks.sampling import Size

START = 4  # images of the batch that initialises ActNorm


class Model(NamedTuple):
    """A model of the papers with its number of parameters in table (B)."""

    size: Size
    parameters: str = ""


MODELS = {
    "MNIST": Model(Size((1, 28, 28), 2, 16, 512, START), "10 M"),
    "CIFAR-10": Model(Size((3, 32, 32), 3, 32, 512, START), "45 M"),
    "ImageNet32": Model(Size((3, 32, 32), 4, 48, 512, START), "67 M"),
    "ImageNet64": Model(Size((3, 64, 64), 3, 32, 512, START), "45 M"),
    "Inverse-Flow": Model(Size((3, 32, 32), 2, 16, 512, START)),
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "Glow": sampling.MODELS["Glow"],
    "FInC unit": sampling.MODELS["FInC"],
    "pair of corners": sampling.MODELS["pair of full layers"],
    "Emerging": {"kernel_size": (2, 3), "corners": (("T",), ("B",))},
    "MaCow": {"corners": (("T",), ("B",), ("L",), ("R",))},
    "inverse direction": sampling.MODELS["inverse direction"],
    "periodic": {"padding_mode": "circular"},
}
# Forward, sampling, bits per dimension. MaCow has variational dequantisation; its steps are networks, not convolutions.
PUBLISHED = {
    "MNIST": {
        "FInC unit": ("0.14 s (A)", "0.09 s (A, B)", "1.05"),
        "Emerging": ("0.16 s (A)", "0.62 s (A)", ""),
        "MintNet": ("0.16 s (A)", "17.29 s (A)", "0.98"),
    },
    "CIFAR-10": {
        "Glow": ("", "", "3.35 to 3.36"),
        "FInC unit": ("0.37 s (A)", "0.41 s (A), 0.47 s (B)", "3.39"),
        "Emerging": ("0.49 s (A)", "17.19 s (A)", "3.34"),
        "MaCow": ("1.49 s (A)", "3.23 s (A)", "3.16"),
        "CInC Flow": ("0.42 s (A)", "7.91 s (A)", "3.35"),
        "MintNet": ("2.09 s (A)", "230.17 s (A)", "3.32"),
    },
    "ImageNet32": {
        "Glow": ("", "", "4.09"),
        "FInC unit": ("0.48 s (A)", "0.52 s (A), 0.73 s (B)", "4.13"),
        "Emerging": ("0.73 s (A)", "25.79 s (A)", "4.09"),
        "CInC Flow": ("0.62 s (A)", "11.97 s (A)", "4.03"),
        "MintNet": ("2.08 s (A)", "230.44 s (A)", "4.06"),
    },
    "ImageNet64": {
        "FInC unit": ("1.43 s (A)", "2.11 s (A), 1.42 s (B)", "3.88"),
        "Emerging": ("1.71 s (A)", "137.04 s (A)", "3.81"),
        "MaCow": ("2.91 s (A)", "8.05 s (A)", "3.69"),
        "CInC Flow": ("1.57 s (A)", "55.71 s (A)", "3.85"),
    },
}
# The model whose sampling times are drawn.
DRAWN, SIDES, BATCHES = "CIFAR-10", (16, 32, 64, 128), (1, 4, 16, 64)


@torch.no_grad()
def forward(flow: nn.Module, images: Tensor) -> None:
    """Computes the log-density of the images."""
    flow.log_prob(images)  # type: ignore[operator]


CALLS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "forward": forward,
    "sampling": lambda flow, images: sampling.draw(flow, len(images)),
}


def measure(
    size: Size, numbers: Sequence[int], calls: Sequence[str], device: str, seconds: float, limit: float
) -> list[dict[str, Any]]:
    """Returns a row per convolution and number of images: the seconds of each call, or why it was skipped."""
    flows, impossible = {}, {}
    for name, options in CONVOLUTIONS.items():
        try:
            flows[name] = sampling.build_flow("nflows", options, size, device).eval()
        except ValueError as error:
            impossible[name] = str(error)
    rows = []
    for number in numbers:
        images = sampling.images(size._replace(batch=number), device)
        times: dict[str, dict[str, float]] = {}
        for call in calls:
            runs: Contestants = {
                name: sampling.finishing(partial(CALLS[call], flow, images), device) for name, flow in flows.items()
            }
            times[call] = timing.wall_within(limit, runs, seconds)
        for name in CONVOLUTIONS:
            row: dict[str, Any] = {"convolution": name, "images": number}
            if name in flows:
                row["parameters"] = sum(parameter.numel() for parameter in flows[name].parameters())
            row["seconds"] = {call: 1e-6 * times[call][name] for call in calls if name in times[call]}
            reason = impossible.get(name, f"more than {limit:g} s")
            row["skipped"] = {call: reason for call in calls if name not in times[call]}
            rows.append(row)
    return rows


def point(rows: list[dict[str, Any]], number: int, shape: Sequence[int]) -> dict[str, Any]:
    """Returns the point of a curve: the sampling times for a number of images."""
    rows = [row for row in rows if row["images"] == number]
    times = {row["convolution"]: 1e6 * row["seconds"]["sampling"] for row in rows if row["seconds"]}
    skipped = {row["convolution"]: row["skipped"]["sampling"] for row in rows if row["skipped"]}
    return {"batch": number, "shape": shape, "microseconds": times, "skipped": skipped}


def sections(models: dict[str, Model], numbers: Sequence[int], **settings: Any) -> Iterator[tuple[str, list[dict]]]:
    """Measures and prints; yields the name and the rows so far of each table and curve."""
    tables: list[dict[str, Any]] = []
    for name, model in models.items():
        rows = measure(model.size, numbers, list(CALLS), **settings)
        published = PUBLISHED.get(name, {})
        others = [method for method in published if method not in CONVOLUTIONS]
        rows += [{"convolution": method, "seconds": {}, "skipped": {}} for method in others]
        for row in rows:
            row |= {"model": name, "published": published.get(row["convolution"], ("", "", ""))}
        print_table(name, model, rows)
        tables += rows
        yield "models", tables
    if DRAWN in models:
        size = models[DRAWN].size
        sides: list[dict[str, Any]] = []
        for side in SIDES:
            shape = (size.image_shape[0], side, side)
            sides.append(point(measure(size._replace(image_shape=shape), [1], ["sampling"], **settings), 1, shape))
            yield "image side", sides
        rows = measure(size, BATCHES, ["sampling"], **settings)
        yield "batch", [point(rows, number, size.image_shape) for number in BATCHES]


def print_table(name: str, model: Model, rows: list[dict[str, Any]]) -> None:
    """Prints the rows of a model."""
    shape, levels, steps, *_ = model.size
    said = f", {model.parameters} parameters (B)" * bool(model.parameters)
    print(f"\n{name}: {shape}, L = {levels}, K = {steps}{said}\n")
    print(f"{'':51s}other hardware:")
    print(
        "convolution        parameters images    forward   sampling   forward     sampling                bits per dim"
    )
    for row in rows:
        millions = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        times = "".join(f"{describe(row, call):>11s}" for call in CALLS)
        forward, sampling, bits = row["published"]
        line = f"{row['convolution']:18s} {millions:>10s} {row.get('images', ''):>6}{times}"
        print(f"{line}   {forward:11s} {sampling:23s} {bits}".rstrip(), flush=True)
    for reason in sorted({reason for row in rows for reason in row["skipped"].values()}):
        print(f"skipped: {reason}")


def describe(row: dict[str, Any], call: str) -> str:
    """Returns the time of a call as text."""
    return f"{row['seconds'][call]:.3f} s" if call in row["seconds"] else "skipped" * (call in row["skipped"])


def main() -> None:
    """Parses the arguments and prints the tables."""
    arguments = command_line.parse(
        __doc__,
        seconds=1.0,
        options={
            "--models": {"nargs": "+", "choices": MODELS, "default": list(MODELS), "help": "which models"},
            "--images": {"nargs": "+", "type": int, "default": [1, 100], "help": "how many at once"},
            "--limit": {"type": float, "default": 60.0, "help": "seconds of the longest first call of a cell"},
        },
    )
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    models = {name: MODELS[name] for name in arguments.models}
    if arguments.tiny:
        models = {name: model._replace(size=sampling.TINY) for name, model in models.items()}
    settings = {"device": arguments.device, "seconds": arguments.seconds, "limit": arguments.limit}
    layer.run(arguments, lambda _: sections(models, arguments.images, **settings), prefix="published-")


if __name__ == "__main__":
    main()
