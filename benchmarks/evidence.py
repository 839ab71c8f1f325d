"""Tests whether the layer helps: trains flows with and without it for equal times.

    python -m benchmarks.evidence --data digits --seconds 60 --output build/evidence-digits
    python -m benchmarks.evidence --data fashion-mnist --data-root DATA --device cuda --seconds 520 --steps 8
    python -m benchmarks.evidence --report benchmarks/results/evidence-digits-cpu

The methods are Glow, whose steps lack the layer and are the same elsewhere; the FInC unit of four groups; a pair of
full layers in opposite corners; and a pair of sides, as in Emerging convolutions. They are compared at one size with
several seeds. With the first seed come the unit and the pair in the inverse direction, the pair with dilation 2 in
every second step, a Glow with couplings so wide that it has as many parameters as the pair, and other kernels, widths
and numbers of steps.

First the command measures the time of a training step of all flows in turns. Each is then trained for as many steps as
fit in the given time, so it does not matter how busy the machine is during training.

The folder benchmarks/results/evidence-DATA-DEVICE, or --output, gets runs.json after each run, and at the end report.md
and pictures. The same command goes on with what is missing there, after Ctrl-C too. A run takes --seconds and the time
of its evaluation; by default there are 32 of them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import evidence_report, evidence_training
from benchmarks.evidence_training import MAIN_METHODS, METHODS, Configuration, Timing
from benchmarks.layer import RESULTS, gpu_machine, machine
from examples import image_data

LEVELS = {"digits": 2, "fashion-mnist": 2, "photographs": 3}
WIDTHS_APART = 16  # step between coupling widths; other widths are slower per channel on CPUs


def configurations(
    image_shape: tuple[int, int, int],
    levels: int,
    methods: Sequence[str],
    kernels: Sequence[int],
    steps: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int],
) -> Iterator[Configuration]:
    """Returns all flows to train: at the first size with all seeds, then at the others.

    Args:
        image_shape: (C, H, W).
        levels: L.
        methods: Keys of `METHODS`.
        kernels: Kernel sizes of the unit and the pair, the main one first.
        steps: Values of K, the main one first.
        widths: Widths of the coupling networks, the main one first.
        seeds: All seeds for the main size; other sizes use the first.
    """
    seed, *_ = seeds
    main = Configuration("pair", levels, steps[0], widths[0], kernels[0], seed)

    def of(names: Sequence[str], **others: int) -> Iterator[Configuration]:
        for name in methods:
            if name in names:
                each = main._replace(method=name, **others)
                yield each._replace(kernel=0) if name == "Glow" else each

    for each in seeds:
        yield from of(list(MAIN_METHODS), seed=each)
    yield from of([name for name in METHODS if name not in MAIN_METHODS])
    if "Glow" in methods:
        yield as_large_as(main, image_shape)
    for kernel in kernels[1:]:
        yield from of(("FInC unit", "pair"), kernel=kernel)
    sizes = [(other, widths[0]) for other in steps[1:]] + [(steps[0], other) for other in widths[1:]]
    for number, width in sizes:
        yield from of(("Glow", "FInC unit", "pair"), steps=number, width=width)


def as_large_as(other: Configuration, image_shape: tuple[int, int, int]) -> Configuration:
    """Returns a Glow with couplings wide enough to have at least as many parameters as another flow."""

    def parameters(configuration: Configuration) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in configuration.build(image_shape).parameters())

    wanted = parameters(other)
    glow = other._replace(method="Glow", kernel=0)
    while parameters(glow) < wanted:
        glow = glow._replace(width=glow.width + WIDTHS_APART)
    return glow


def main() -> None:
    """Parses the arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=LEVELS, default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds Fashion-MNIST")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each flow")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--kernels", type=int, nargs="+", default=[3, 2, 5], help="of the unit and the pair, the main one first"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="K, in each level; the main one first")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 256, 512], help="of couplings, the main one first"
    )
    parser.add_argument("--jobs", type=int, default=1, help="flows that are trained at the same time")
    parser.add_argument("--output", type=Path, help="the folder to write")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write report.md and the pictures again")
    options = parser.parse_args()
    if options.report:
        evidence_report.write(options.report)
        return
    output = options.output or RESULTS / f"evidence-{options.data}-{options.device}"
    try:
        data = image_data.load(options.data, options.data_root)
    except FileNotFoundError as error:
        parser.error(str(error))
    settings = {"data": options.data, "device": options.device, "seconds": options.seconds}
    results = _begun(output, settings) or {
        "machine": machine() if options.device == "cpu" else gpu_machine(),
        "settings": settings,
        "note": data.note,
        "timings": [],
        "runs": [],
    }
    choices = options.methods, options.kernels, options.steps, options.widths, options.seeds
    wanted = configurations(data.image_shape, LEVELS[options.data], *choices)
    done = {_configuration(run) for run in results["runs"]}
    wanted = list(dict.fromkeys(wanted))
    with_picture = wanted[: len(MAIN_METHODS.keys() & options.methods)]
    missing = [configuration for configuration in wanted if configuration not in done]
    minutes = len(missing) * options.seconds / options.jobs / 60
    print(
        f"{len(missing)} of {len(wanted)} runs are missing in {output}: {minutes:.0f} minutes of training", flush=True
    )
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        source = (options.data, options.data_root)
        timings = {Configuration(*size): Timing(*timing) for size, timing in results["timings"]}
        sizes = list(dict.fromkeys(each._replace(seed=0) for each in missing if each._replace(seed=0) not in timings))
        try:
            timings |= pool.submit(evidence_training.time_all, sizes, *source, options.device).result()
            results["timings"] = [[list(size), list(timing)] for size, timing in timings.items()]
            futures = {}
            for each in missing:
                steps = math.ceil(options.seconds / timings[each._replace(seed=0)].step_seconds)
                futures[pool.submit(evidence_training.run, each, *source, steps, options.device)] = each
            for future in as_completed(futures):
                each = futures[future]
                run = future.result() | timings[each._replace(seed=0)]._asdict()
                _add(results, run, output, with_picture=each in with_picture)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise SystemExit(f"stopped; the same command goes on with what is missing in {output}") from None
    evidence_report.write(output)


def _begun(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    path = output / "runs.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(
            f"{path} must be of the settings {settings}, got {results['settings']}; --output FOLDER writes elsewhere"
        )
    return results


def _configuration(run: dict[str, Any]) -> Configuration:
    return Configuration(**{name: run[name] for name in Configuration._fields})


def _add(results: dict[str, Any], run: dict[str, Any], output: Path, *, with_picture: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    samples = run.pop("samples")
    if with_picture:
        method = run["method"].lower().replace(", ", "-").replace(" ", "-")
        image_data.save_picture(samples, output / f"samples-{method}.png")
    results["runs"].append(run)
    unfinished = output / "runs.json.part"
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(output / "runs.json")
    print(
        f"{_configuration(run)}: {run['bits_per_dim']:.4f} bits per dimension in {run['training_steps']} steps",
        flush=True,
    )


if __name__ == "__main__":
    main()
