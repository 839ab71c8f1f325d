"""Times the layer against its own forward written with F.conv2d, as ratios in one run.

    python -m benchmarks.layer                      prints the tables of the CPU
    python -m benchmarks.layer --output FILE.json   and writes them, with machine, versions and date
    python -m benchmarks.layer --device cuda        prints the tables of the GPU, with floors and targets, and writes
                                                    benchmarks/results/cuda-<GPU>.json, or FILE.json
    python -m benchmarks.plots FILE.json            draws the plot

The yardstick is what one would write without this package: for each group F.pad and F.conv2d, then torch.cat. Every
row's contestants take turns, so whatever else the machine does slows all of them; the table shows their medians.
On the GPU the yardstick has its best: TF32 off as in the layer, but cuDNN's fastest algorithm, by cudnn.benchmark.
Results are written after each table, so an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import nflows_kconv
from benchmarks import command_line, cpu_tables, cuda_tables, workloads

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Returns where and with what this was measured."""
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
    """Returns the same for a GPU, with its CPU; also how torch was set while this was measured."""
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


def header(measured_on: dict[str, Any], workload: workloads.Workload) -> dict[str, Any]:
    """Returns what results begin with; those of tiny sizes say so."""
    return {"machine": measured_on, **({"tiny": True} if workload.tiny else {})}


def default_output(device_name: str) -> Path:
    """Returns where the results of a GPU go: "NVIDIA H100 80GB HBM3" to results/cuda-h100-80gb-hbm3.json."""
    words = device_name.lower().replace("nvidia", "").replace("/", " ").split()
    return RESULTS / f"cuda-{'-'.join(words)}.json"


def run(results: dict[str, Any], sections: Iterator[tuple[str, Any]], output: Path | None) -> None:
    """Takes the measurements, and writes them after each section."""
    for key, value in results["machine"].items():
        print(f"{key}: {value}")
    for name, measured in sections:
        results[name] = measured
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")


def on_cpu(workload: workloads.Workload, seconds: float, output: Path | None) -> None:
    """Prints the tables of the CPU."""
    run(header(machine(), workload), cpu_tables.sections(workload, seconds), output)
    if output:
        print(f"\nwritten to {output}")


def on_cuda(workload: workloads.Workload, seconds: float, output: Path | None) -> None:
    """Prints the tables of the current GPU."""
    # A graph cannot be captured on the default stream, and where all work is on one stream none waits for another.
    torch.cuda.set_stream(torch.cuda.Stream())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    results = header(gpu_machine(), workload)
    name = results["machine"]["device"]
    run(results, cuda_tables.sections(workload, seconds, "cuda", name), output)
    cuda_tables.print_summary(results)
    if output:
        print(f"\nwritten to {output}")


def main() -> None:
    """Parses the arguments and prints the tables."""
    arguments = command_line.parse(__doc__, seconds=2.0)
    workload = {"cpu": workloads.CPU, "cuda": workloads.CUDA}[arguments.device]
    if arguments.tiny:
        workload = workloads.tiny(workload)
    torch.manual_seed(0)
    if arguments.device == "cpu":
        on_cpu(workload, arguments.seconds, arguments.output)
        return
    output = arguments.output
    if output is None and not arguments.tiny:
        output = default_output(torch.cuda.get_device_name())
    on_cuda(workload, arguments.seconds, output)


if __name__ == "__main__":
    main()
