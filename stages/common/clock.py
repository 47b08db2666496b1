"""The one clock: training seconds, evaluation seconds, and everything else that is measured.

Training seconds run from the first read of training data to the last (calibration included: Hessians on training data are
training, #1868). Evaluation seconds run from the start of the process. Measured values go to `timing.json` and the log and nowhere else, so
that every other byte of an artifact can be reproduced.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OFFICIAL_BYTES, OFFICIAL_PROCESSES = (
    151_078_222,
    8,
)  # of the challenge: its validation text (logs of #1493), one process for each GPU


@dataclass
class Interval:
    """A stopwatch that is started by the first event it measures: `start` is idempotent, `mark` moves the end.

    >>> interval = Interval(); interval.seconds
    0.0
    """

    started: float | None = None
    ended: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Begin now, unless the interval has begun."""
        if self.started is None:
            self.started = time.monotonic()

    def mark(self) -> None:
        """Let the interval reach to now."""
        assert self.started is not None, "an interval is marked before it starts"
        self.ended = time.monotonic()

    def elapsed(self) -> float:
        """Seconds from the start to now; 0 before the start."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last mark."""
        return 0.0 if self.started is None or self.ended is None else self.ended - self.started


@dataclass
class Pace:
    """How an evaluation spent its seconds: what grows with the stream, and what does not."""

    warm_up_targets: int  # scored before `steady` starts: they pay for compilation
    steady: Interval = field(default_factory=Interval)

    def timing(self, targets: int, counted_bytes: int, processes: int) -> dict[str, Any]:
        """For timing.json, at the end of an evaluation of so many targets; 0 targets a second where all were warm-up."""
        seconds = process_seconds()
        rate = (targets - self.warm_up_targets) / self.steady.seconds if self.steady.seconds else 0.0
        measured = {
            "evaluation_seconds": seconds,
            "startup_seconds": seconds - self.steady.seconds,
            "warm_up_targets": self.warm_up_targets,
            "targets_per_second": rate,
            "ranks": processes,
        }
        official = round(targets * OFFICIAL_BYTES / max(1, counted_bytes))
        return measured | {
            "projected_seconds_8gpu": projected_seconds(measured, official, OFFICIAL_PROCESSES)
        }


def projected_seconds(measured: Mapping[str, Any], targets: int, processes: int) -> float | None:
    """What an evaluation of `targets` will take on so many devices of the kind that was measured; None when no rate was measured.

    Work is taken to divide over processes without loss, and the start to cost each the same. A run's own figures give its own seconds:

    >>> run = {"startup_seconds": 10.0, "warm_up_targets": 100, "targets_per_second": 50.0, "ranks": 1}
    >>> projected_seconds(run, 600, 1), projected_seconds(run, 600, 8)
    (20.0, 11.25)
    """
    rate = measured["targets_per_second"] / measured["ranks"] * processes
    return (
        measured["startup_seconds"] + max(0, targets - measured["warm_up_targets"]) / rate if rate else None
    )


def process_seconds() -> float:
    """Seconds since the operating system started this process, or the torchrun that started it (Linux: from /proc, in clock ticks)."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    stat = Path(f"/proc/{os.getppid() if under_torchrun else 'self'}/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()
