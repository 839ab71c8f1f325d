"""Helpers for planners that divide a problem into tiles."""

from __future__ import annotations

from nflows_kconv.backends.cuda.plan import ceil_div

# Every GPU grants a thread block this much without opting in, and several such blocks share a multiprocessor.
SHARED_MEMORY = 48 * 1024
MAX_THREADS = 256


def evenly(size: int, most: int) -> int:
    """Returns the size of the parts when as few as possible, none above `most`, share the total evenly."""
    return ceil_div(size, ceil_div(size, most))
