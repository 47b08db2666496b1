"""Timing: one run to warm up, then repetitions; prints their median, smallest and largest."""

import statistics
import time
from collections.abc import Callable

REPETITIONS = 5


def measure(
    name: str, units: float, unit: str, work: Callable[[], object], repetitions: int = REPETITIONS
) -> None:
    """Time `work`, which handles `units` of `unit` in one call, and print a line."""
    work()
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)

    median = statistics.median(seconds)
    spread = f"{1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f}"
    print(f"{name:<58} {1e3 * median:10.2f} ms ({spread}) {units / median:14,.0f} {unit}/s", flush=True)
