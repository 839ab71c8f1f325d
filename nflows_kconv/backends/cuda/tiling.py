"""What planners share that cut a problem into tiles."""

from __future__ import annotations

from nflows_kconv.backends.cuda.plan import ceil_div

# What every GPU grants a thread block without asking; it also lets several blocks share a multiprocessor.
SHARED_MEMORY = 48 * 1024
MAX_THREADS = 256


def evenly(size: int, most: int) -> int:
    """Returns the size of each part where as few as possible, none above `most`, share it evenly."""
    return ceil_div(size, ceil_div(size, most))
