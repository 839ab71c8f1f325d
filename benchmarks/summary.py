"""Prints a summary of the parts of benchmarks/on_a_gpu.sh: `python -m benchmarks.summary FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.targets import describe

# pytest names a failed test when it fails, and again at the end, with the error.
_FAILURE = re.compile(
    r"^(?:.* )?(?:FAILED|ERROR) (?P<test>tests/.*?)(?: - .*| *)$|.*  WRONG$"
    r"|^========= (?!COMPUTE|\w+ SUMMARY: 0).*",
    re.MULTILINE,
)
_MOST = 30  # most failures to print per part


def main() -> None:
    """Prints each part's last line and failures, then the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print("\nsummary\n")
    print((folder / "parts.txt").read_text().rstrip())
    for log in sorted(folder.glob("*.log")):
        matches = _FAILURE.finditer(log.read_text(errors="replace"))
        failures = {match["test"] or match[0].strip(): match[0].strip() for match in matches}
        if failures:
            print(f"\n{log.stem}: {len(failures)} failures", *list(failures.values())[:_MOST], sep="\n  ")
    for path in (folder / "targets.json", folder / "sampling.json"):
        if path.exists():
            print(f"\n{path.stem}", end="")
            print_targets(json.loads(path.read_text()))


def print_targets(results: dict) -> None:
    """Prints how many targets were met, and which were missed."""
    judged = [
        (section, row, record)
        for section, rows in results.items()
        if isinstance(rows, list)
        for row in rows
        for record in row.get("targets", [])
    ]
    missed = [entry for entry in judged if entry[2]["verdict"] == "missed"]
    print(f"\ntargets: {len(judged) - len(missed)} of {len(judged)} met")
    for section, row, record in missed:
        names = ("library", "variant", "images", "batch", "shape", "corners")
        of = ", ".join(f"{name} {row[name]}" for name in names if name in row)
        print(
            f"  missed: {section}, {of}, {record['mode']} {record['quantity']}: {record['value']:.3g} {record['unit']},"
            f" {describe(record)}"
        )


if __name__ == "__main__":
    main()
