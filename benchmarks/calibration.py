"""Measures the assumptions of kernel estimates from machine code: latencies, and the time of a graph node.

    python -m benchmarks.calibration --device cuda   prints them, in cycles unless stated otherwise
    --output FILE.json                               writes them there

A latency is the slope of a kernel's cycles over the length of a chain of dependent instructions. One warp runs; for the
barrier, eight.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import command_line, layer, timing
from nflows_kconv.backends.cuda import compiler, driver
from nflows_kconv.backends.cuda.plan import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
COUNT = 1 << 13  # instructions in the shorter chain; the longer one has twice as many
REPEATS = 5
NODES = 10


class Latency(NamedTuple):
    """One constant.

    Attributes:
        kernel: Name in calibration.cu.
        supposed: Cycles that the estimates assume.
        ring: Bytes of its ring of addresses.
        threads: Threads of the block.
    """

    kernel: str
    supposed: str
    ring: int = 8
    threads: int = 32


LATENCIES = {
    "FFMA": Latency("multiply_add", "4"),
    "LDS": Latency("shared_load", "23 to 33"),
    "SHFL": Latency("shuffle", "24"),
    "BAR, 256 threads": Latency("barrier", "16 to 24", threads=256),
    "LDG, L1": Latency("cached_load", "41", ring=1 << 13),
    "LDG, L2": Latency("load", "230 to 330", ring=1 << 21),
    "LDG, memory": Latency("load", "500 to 800", ring=1 << 30),
}
STRIDE = 128  # bytes from one address of a chain to the next, a cache line


def load(name: str, capability: tuple[int, int]) -> int:
    """Compiles and loads a kernel."""
    code = compiler.compile(Kernel(str(SOURCE), name, ()), capability)
    return driver.function(driver.load(code, 0), name, 0)


def launcher(function: int, threads: int, arguments: bytes) -> Callable[[], None]:
    """Returns a launch of one block on the current stream."""
    return lambda: driver.launch(0, function, (1, 1, 1), threads, 64, arguments, driver.current_stream(0))


def ring(size: int, device: str) -> Tensor:
    """Returns a ring of addresses, STRIDE bytes apart, [size / 8]."""
    count = size // 8
    following = (torch.arange(count, device=device) + STRIDE // 8) % count
    addresses = torch.empty(count, dtype=torch.int64, device=device)
    return addresses.copy_(following.mul_(8).add_(addresses.data_ptr()))


def latency(function: int, constant: Latency, device: str) -> tuple[float, float]:
    """Returns the cycles of one instruction, and the cycles per nanosecond."""
    chain, result = ring(constant.ring, device), torch.zeros(3, dtype=torch.int64, device=device)
    measured: dict[int, tuple[int, int]] = {}
    for count in (2 * COUNT, COUNT):
        arguments = struct.pack("=QQif", result.data_ptr(), chain.data_ptr(), count, 0.5)
        runs = []
        for _ in range(REPEATS):
            chain.sum()  # leaves in the L2 cache what fits, and of a longer ring only the end, which no chain reaches
            launcher(function, constant.threads, arguments)()
            cycles, nanoseconds, _ = result.tolist()
            runs.append((cycles, nanoseconds))
        measured[count] = min(runs)
    cycles, nanoseconds = measured[2 * COUNT]
    return (cycles - measured[COUNT][0]) / COUNT, cycles / max(1, nanoseconds)


def node_microseconds(function: int, seconds: float) -> float:
    """Returns the time of one more kernel in a graph of dependent kernels."""
    run = launcher(function, 32, bytes(24))

    def several() -> None:
        for _ in range(1 + NODES):
            run()

    times = timing.graph({"one": run, "several": several}, seconds)
    return (times["several"] - times["one"]) / NODES


def sections(seconds: float, capability: tuple[int, int], device: str) -> Iterator[tuple[str, Any]]:
    """Measures and prints; yields the name and the results of each section."""
    print("\nconstant            measured  supposed")
    cycles: dict[str, float] = {}
    for name, constant in LATENCIES.items():
        cycles[name], rate = latency(load(constant.kernel, capability), constant, device)
        print(f"{name:18s} {cycles[name]:9.1f}  {constant.supposed}", flush=True)
        yield "cycles", cycles
    print(f"{'clock, GHz':18s} {rate:9.2f}  1.7")
    yield "gigahertz", rate
    node = node_microseconds(load("nothing", capability), seconds)
    print(f"{'graph node, us':18s} {node:9.2f}  1.1")
    yield "node_microseconds", node


def main() -> None:
    """Parses the arguments and measures; without a GPU only compiles the kernels for an H100."""
    arguments = command_line.parse(__doc__, seconds=1.0)
    if arguments.device == "cpu":
        kernels = {constant.kernel for constant in LATENCIES.values()}
        sizes = [len(compiler.compile(Kernel(str(SOURCE), name, ()), (9, 0))) for name in kernels]
        print(f"{len(sizes)} kernels compile; they run with --device cuda")
        return
    torch.cuda.set_stream(torch.cuda.Stream())
    capability = torch.cuda.get_device_capability()
    layer.run(arguments, lambda _: sections(arguments.seconds, capability, "cuda"))


if __name__ == "__main__":
    main()
