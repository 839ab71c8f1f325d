"""Times the layer against its own forward written with F.conv2d, as ratios within one run.

    python -m benchmarks.layer                      prints the tables of the CPU
    python -m benchmarks.layer --output FILE.json   and writes them, with machine, versions and date
    python -m benchmarks.layer --device cuda        prints the tables of the GPU, with floors and targets, and writes
                                                    benchmarks/results/cuda-<GPU>.json, or FILE.json
    python -m benchmarks.plots FILE.json            draws the plot

The baseline is the code without this package: F.pad and F.conv2d for each group, then torch.cat. The contestants of a
row take turns, so other load slows all of them; the table shows their medians. On the GPU the baseline runs at its
best: TF32 off as in the layer, but cuDNN's fastest algorithm, by cudnn.benchmark. Results are written after each table,
so an interrupted run keeps its measurements.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import nflows_kconv
from benchmarks import command_line, cpu_tables, cuda_tables, summary, workloads

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Returns the machine and the versions of a measurement."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(": ")[1] for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), model)
    return {
        "device": model,
        "threads": torch.get_num_threads(),
        "backends": {name: str(backend) for name, backend in nflows_kconv.available_backends().items()},
        "nflows_kconv": nflows_kconv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def gpu_machine() -> dict[str, Any]:
    """Returns the same for a GPU and its CPU, with torch's settings."""
    on_cpu = machine()
    return {
        **on_cpu,
        "device": torch.cuda.get_device_name(),
        "cpu": on_cpu["device"],
        "multiprocessors": torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def run(
    arguments: argparse.Namespace, sections: Callable[[str], Iterator[tuple[str, Any]]], prefix: str | None = None
) -> dict[str, Any]:
    """Measures, writes the results after each section, and returns them; tiny sizes are marked.

    Args:
        arguments: The result of `command_line.parse`.
        sections: A function of the device's name that measures and yields the name and the results of each section.
        prefix: Prefix of the default file in `RESULTS` for a GPU; "" writes results of "NVIDIA H100 80GB HBM3" to
            cuda-h100-80gb-hbm3.json, None writes no file.
    """
    on_gpu, output = arguments.device == "cuda", arguments.output
    results = {"machine": gpu_machine() if on_gpu else machine(), **({"tiny": True} if arguments.tiny else {})}
    for key, value in results["machine"].items():
        print(f"{key}: {value}")
    name = results["machine"]["device"]
    if on_gpu and prefix is not None and not output and not arguments.tiny:
        words = name.lower().replace("nvidia", "").replace("/", " ").split()
        output = RESULTS / f"{prefix}cuda-{'-'.join(words)}.json"
    for section, measured in sections(name):
        results[section] = measured
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")
    if output:
        print(f"\nwritten to {output}")
    return results


def main() -> None:
    """Parses the arguments and prints the tables."""
    arguments = command_line.parse(__doc__, seconds=2.0)
    workload = {"cpu": workloads.CPU, "cuda": workloads.CUDA}[arguments.device]
    if arguments.tiny:
        workload = workloads.tiny(workload)
    torch.manual_seed(0)
    if arguments.device == "cpu":
        run(arguments, lambda _: cpu_tables.sections(workload, arguments.seconds))
        return
    # A graph cannot be captured on the default stream, and work on one stream never waits for another.
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    results = run(arguments, lambda name: cuda_tables.sections(workload, arguments.seconds, "cuda", name), prefix="")
    summary.print_targets(results)


if __name__ == "__main__":
    main()
