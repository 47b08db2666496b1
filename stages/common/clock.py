"""The one clock: training seconds, evaluation seconds, and everything else that is measured.

Training seconds run from the first read of training data to the last; calibration is included,
since Hessians on training data are training (#1868). Evaluation seconds run from the start of the
process. Measured values go to `timing.json` and the log and nowhere else, so that every other byte
of an artifact can be reproduced.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.common.challenge import GPUS, VALIDATION_BYTES


@dataclass
class Interval:
    """A stopwatch that the first event starts: only the first `start` counts, and each `mark` moves the end.

    >>> interval = Interval(); interval.seconds
    0.0
    """

    started: float | None = None
    ended: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start now, unless the interval has started."""
        if self.started is None:
            self.started = time.monotonic()

    def mark(self) -> None:
        """Move the end to now."""
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
class EvalThroughput:
    """Start-up time and steady rate of an evaluation, measured separately.

    The first grows neither with the stream nor with the number of processes, so a run on other
    hardware or text can be projected from the two.
    """

    warm_up_targets: int  # targets scored before `steady` starts; their time includes compilation
    steady: Interval = field(default_factory=Interval)

    def timing(self, targets: int, counted_bytes: int, processes: int) -> dict[str, Any]:
        """Entries for timing.json, at the end of an evaluation.

        `targets` and `counted_bytes` are those of the whole stream. The rate is 0 targets a second
        if all targets were warm-up.
        """
        seconds = process_seconds()
        rate = 0.0
        if self.steady.seconds:
            rate = (targets - self.warm_up_targets) / self.steady.seconds
        measured = {
            "evaluation_seconds": seconds,
            "startup_seconds": seconds - self.steady.seconds,
            "warm_up_targets": self.warm_up_targets,
            "targets_per_second": rate,
            "ranks": processes,
        }

        # The challenge's validation text has more targets, in proportion to its bytes.
        official_targets = round(targets * VALIDATION_BYTES / max(1, counted_bytes))
        return measured | {"projected_seconds_8gpu": projected_seconds(measured, official_targets, GPUS)}


def projected_seconds(measured: Mapping[str, Any], targets: int, processes: int) -> float | None:
    """Seconds that an evaluation of `targets` will take on `processes` devices of the measured kind.

    None when no rate was measured. The projection assumes that the work divides over processes
    without loss and that the start-up takes each the same time. A run's own figures give its own
    seconds:

    >>> run = {"startup_seconds": 10.0, "warm_up_targets": 100, "targets_per_second": 50.0, "ranks": 1}
    >>> projected_seconds(run, 600, 1), projected_seconds(run, 600, 8)
    (20.0, 11.25)
    """
    rate = measured["targets_per_second"] / measured["ranks"] * processes
    if not rate:
        return None
    steady_targets = max(0, targets - measured["warm_up_targets"])
    return measured["startup_seconds"] + steady_targets / rate


def process_seconds() -> float:
    """Seconds since the operating system started this process, or the torchrun that started it.

    Read from /proc on Linux; elsewhere the time starts when this module is imported.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    stat = Path(f"/proc/{os.getppid() if under_torchrun else 'self'}/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()
