"""Runs many seeds in child processes, to find crashes and hangs, and prints how to replay them.

From the checkout: `PYTHONPATH=tests python -m fuzz --minutes 15`, and `PYTHONPATH=tests python -m fuzz --replay SEED`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fuzz

SEEDS = 1000  # per child process
HANGS_AFTER = 120  # seconds without a new seed
MEMORY = 1 << 30  # bytes that the calls of a child may allocate, so larger requests fail at once


@dataclass
class Report:
    """The outcome of some seeds."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Adds another report."""
        self.counts += other.counts
        self.failures += other.failures


def run_child(first: int, last: int, progress: Path) -> None:
    """Runs the seeds [first, last) in this process and prints the report; `progress` names the current seed."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report = Report()
    for seed in range(first, last):
        progress.write_text(str(seed))
        try:
            report.counts += fuzz.run(seed)
        except fuzz.Wrong as error:
            report.failures.append(str(error))
    print(json.dumps({"counts": report.counts, "failures": report.failures}))


def run_seeds(first: int, last: int) -> Report:
    """Runs the seeds [first, last) in children, a new one after each that crashes or hangs."""
    report = Report()
    with tempfile.TemporaryDirectory() as directory:
        progress = Path(directory, "seed")
        while first < last:
            progress.write_text(str(first))
            command = [sys.executable, "-m", "fuzz", "--child", str(first), str(last), str(progress)]
            with open(Path(directory, "errors"), "w+") as errors:
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment())
                hung = _hangs(child, progress)
                output = child.communicate()[0]
                errors.seek(0)
                words = errors.read()[-500:]
            if child.returncode == 0:
                done = json.loads(output)
                report.add(Report(Counter(done["counts"]), done["failures"]))
                return report
            seed = int(progress.read_text())
            end = f"hung for {HANGS_AFTER} seconds" if hung else f"ended with status {child.returncode}"
            report.failures.append(f"seed {seed}: the process {end} {words}".rstrip())
            first = seed + 1  # the counts of this child are lost
    return report


def _environment() -> dict[str, str]:
    path = [str(Path(fuzz.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def _hangs(child: subprocess.Popen[str], progress: Path) -> bool:
    """Waits for the child, and kills it if it stays at one seed too long."""
    seed, since = "", time.monotonic()
    while True:
        try:
            child.wait(0.1)
            return False
        except subprocess.TimeoutExpired:
            if (now := progress.read_text()) != seed:
                seed, since = now, time.monotonic()
            elif time.monotonic() - since > HANGS_AFTER:
                child.kill()
                return True


def main() -> int:
    """Parses the arguments and runs the seeds."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--processes", type=int, default=1, help="how many at once (default: 1)")
    parser.add_argument("--replay", type=int, help="run this seed alone, in this process")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(int(options.child[0]), int(options.child[1]), Path(options.child[2]))
        return 0
    if options.replay is not None:
        torch.set_num_threads(1)
        print(dict(fuzz.run(options.replay)))
        return 0

    report, begin, first = Report(), time.monotonic(), options.first
    with ThreadPoolExecutor(options.processes) as pool:
        while time.monotonic() - begin < 60 * options.minutes:
            starts = range(first, first + options.processes * SEEDS, SEEDS)
            for part in pool.map(lambda start: run_seeds(start, start + SEEDS), starts):
                report.add(part)
                for failure in part.failures:
                    print(failure)
                    print(f"    replay: PYTHONPATH=tests python -m fuzz --replay {failure.split()[1].rstrip(':,')}")
            first = starts.stop
            total = report.counts.total()
            print(f"seeds {options.first} to {first - 1}: {total:,} calls, {len(report.failures)} failures", flush=True)
    for kind, count in sorted(report.counts.items()):
        print(f"{count:10,} {kind}")
    rate = report.counts.total() / (time.monotonic() - begin)
    print(f"{report.counts.total():10,} in all, {rate:.0f} a second; torch {torch.__version__}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
