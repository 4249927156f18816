"""Timing two or more versions of the same work against each other.

On a CPU the steady figure is processor time of this process on one thread: other people's load moves it little. On
CUDA it is the time between two events, with the device synchronised around them. Rounds alternate (A B A B), so slow
drifts of the machine (heat, neighbours) fall on all versions alike; medians are compared and half the distance
between the quartiles says how far to trust them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo.bench.record import Figure

Work = Callable[[], Any]
Version = Callable[[], AbstractContextManager[Work]]
"""Sets a version up (outside the timed stretch) and yields the work to time."""


@dataclass
class Samples:
    """Times of one version, in seconds. ``results`` holds what the work returned in the latest round."""

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    result: Any = None

    def figure(self, scale: float = 1.0) -> Figure:
        """Median and spread of ``scale * seconds`` (1000 for milliseconds)."""
        return summarise([scale * value for value in self.seconds], [scale * value for value in self.wall])

    def rate(self, amount: float) -> Figure:
        """Median and spread of ``amount / seconds`` (tokens per second)."""
        return summarise([amount / value for value in self.seconds], [amount / value for value in self.wall])


def summarise(values: list[float], wall: list[float] | None = None) -> Figure:
    """Median, half the interquartile distance (absent for fewer than three values) and count."""
    spread = None
    if len(values) >= 3:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = (high - low) / 2
    return Figure(
        median=statistics.median(values),
        spread=spread,
        n=len(values),
        wall=statistics.median(wall) if wall else None,
    )


@contextmanager
def steady(device: torch.device) -> Iterator[None]:
    """Conditions for timing: one thread on a CPU, no garbage collection meanwhile; all restored afterwards."""
    threads = torch.get_num_threads()
    collecting = gc.isenabled()
    if device.type == "cpu":
        torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def stopwatch(device: torch.device) -> Callable[[Work], tuple[float, float, Any]]:
    """A function that runs work once: its seconds on the steady clock, on the wall clock, and what it returned."""
    if device.type != "cuda":

        def on_cpu(work: Work) -> tuple[float, float, Any]:
            wall, process = time.perf_counter(), time.process_time()
            result = work()
            return time.process_time() - process, time.perf_counter() - wall, result

        return on_cpu

    def on_gpu(work: Work) -> tuple[float, float, Any]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        start.record()
        result = work()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000, time.perf_counter() - wall, result

    return on_gpu


def alternate(
    versions: Mapping[str, Version],
    device: torch.device,
    *,
    repeats: int,
    seconds: float = float("inf"),
    warmup: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Samples]:
    """Time ``versions`` in alternating rounds.

    Args:
        versions: name -> version, in the order of each round.
        device: where the work runs; decides the clock.
        repeats: timed rounds; every version runs once per round.
        seconds: start no further round after this much wall time (never fewer than three rounds, or ``repeats``).
        warmup: rounds thrown away first.
        progress: called with the number of finished timed rounds.

    Returns:
        The samples of each version. An interrupt (Ctrl-C) after at least one complete round is passed on as
        ``TimingInterrupted``, which carries the samples so far.
    """
    watch = stopwatch(device)
    samples = {name: Samples() for name in versions}
    begun = time.perf_counter()
    try:
        with steady(device):
            for turn in range(-warmup, repeats):
                if turn >= min(3, repeats) and time.perf_counter() - begun > seconds:
                    break
                round_: dict[str, tuple[float, float, Any]] = {}
                for name, version in versions.items():
                    samples[name].result = None  # the old result's memory must not stand beside the new one's
                    with version() as work:
                        round_[name] = watch(work)
                for name, (busy, wall, result) in round_.items():
                    samples[name].result = result
                    if turn >= 0:
                        samples[name].seconds.append(busy)
                        samples[name].wall.append(wall)
                if progress is not None and turn >= 0:
                    progress(turn + 1)
    except KeyboardInterrupt:
        if all(sample.seconds for sample in samples.values()):
            raise TimingInterrupted(samples) from None
        raise
    return samples


class TimingInterrupted(KeyboardInterrupt):
    """Ctrl-C during ``alternate``; ``samples`` are those of the complete rounds."""

    def __init__(self, samples: dict[str, Samples]) -> None:
        super().__init__()
        self.samples = samples


def ready(work: Work) -> Version:
    """A version that needs no setting up."""
    return lambda: nullcontext(work)
