"""Prints a summary of the parts of benchmarks/on_a_gpu.sh: `python -m benchmarks.summary FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks import cuda_tables

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
            cuda_tables.print_summary(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
