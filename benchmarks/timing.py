"""Clocks, which return the median time of one call of each contestant, in microseconds.

The contestants take turns, so other load slows all of them.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.contestants import Contestants

WARM_UP = 3  # the first call compiles kernels and lets cuDNN choose its algorithm
CALLS = 20  # calls of a contestant between two events, or in one graph
HOST_CALLS = 100  # few enough that launches never fill the queue, at which the host would wait for the device
LEAST_SAMPLES = 5


def take_turns(
    samples: Mapping[str, Callable[[], float]], seconds: float, least: int = LEAST_SAMPLES
) -> dict[str, float]:
    """Returns the median result of each function, called in turns for about `seconds`, at least `least` times."""
    values: dict[str, list[float]] = {name: [] for name in samples}
    if not values:
        return {}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(values.values()))) < least:
        for name, sample in samples.items():
            values[name].append(sample())
    return {name: statistics.median(sampled) for name, sampled in values.items()}


def wall(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times one call on the CPU, from start to end."""
    for run in contestants.values():
        run()
    return take_turns({name: partial(_wall_time, run, 1) for name, run in contestants.items()}, seconds)


def wall_within(limit: float, contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times like `wall`, at least once, the contestants whose first call takes at most `limit` seconds."""
    in_time = {name: run for name, run in contestants.items() if _ends_within(limit, run)}
    return take_turns({name: partial(_wall_time, run, 1) for name, run in in_time.items()}, seconds, least=1)


def eager(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times calls queued back to back on the GPU, between two events: the slower of host and device."""
    for run in contestants.values():
        _warm_up(run)
    samples = {name: partial(_time_between_events, partial(_repeat, run)) for name, run in contestants.items()}
    return take_turns(samples, seconds)


def graph(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times calls captured into one CUDA graph, between two events; NaN where a capture fails."""
    replays = {}
    for name, run in contestants.items():
        try:
            replays[name] = _captured(run)
            _warm_up(replays[name])
        except RuntimeError as error:  # must not cost the times of the others
            print(f"{name} cannot be captured: {error}", flush=True)
    times = take_turns({name: partial(_time_between_events, replay) for name, replay in replays.items()}, seconds)
    return dict.fromkeys(contestants, math.nan) | times


def cold(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times like `graph` with a cold L2 cache: before each call it reads more than the cache holds."""
    read = _read_of_the_cache()

    times = graph({"": read, **{name: partial(_each, read, run) for name, run in contestants.items()}}, seconds)
    alone = times.pop("")
    return {name: time - alone for name, time in times.items()}


def host(contestants: Contestants, seconds: float) -> dict[str, float]:
    """Times only the host: until calls return, whether or not the GPU is done."""
    for run in contestants.values():
        _warm_up(run)

    def sample(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return _wall_time(run, HOST_CALLS)

    return take_turns({name: partial(sample, run) for name, run in contestants.items()}, seconds)


class _TooLong(Exception):
    """A call exceeded its time limit."""


def _ends_within(limit: float, run: Callable[[], object]) -> bool:
    """Runs a call, stops it at the time limit, and returns whether it finished."""

    def stop(*_: object) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return _wall_time(run, 1) <= 1e6 * limit
    except _TooLong:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _read_of_the_cache() -> Callable[[], object]:
    size = torch.cuda.get_device_properties("cuda").L2_cache_size
    return torch.ones(2 * size // 4, device="cuda").sum


def _wall_time(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e6 * (time.perf_counter() - start) / calls


def _time_between_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / CALLS


def _repeat(run: Callable[[], object]) -> None:
    for _ in range(CALLS):
        run()


def _each(*runs: Callable[[], object]) -> None:
    for run in runs:
        run()


def _warm_up(run: Callable[[], object]) -> None:
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    _warm_up(run)
    captured = torch.cuda.CUDAGraph()
    # On the stream of the warm-up, because autograd makes streams wait for each other, which a capture forbids.
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        _repeat(run)
    return captured.replay
