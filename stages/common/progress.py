"""Output of long work: stamped lines for the terminal and the log, and progress towards a known total."""

import sys
import time
from typing import TextIO

from stages.common import clock


class Logger:
    """Writes lines to the terminal and to an open log file; silent on the ranks that must not write."""

    def __init__(self, is_main: bool = True, log_file: TextIO | None = None) -> None:
        self.is_main = is_main
        self.log_file = log_file

    def log(self, line: str) -> None:
        """Write one line, stamped with the seconds since the process started."""
        if not self.is_main:
            return
        stamped = f"{clock.process_seconds():8.1f}s {line}"
        print(stamped, flush=True)
        if self.log_file is not None:
            self.log_file.write(stamped + "\n")
            self.log_file.flush()

    def progress(self, label: str, total: float) -> "Progress":
        """Progress over `total` units: a bar on a terminal, a line every ten seconds elsewhere."""
        return Progress(self, label, total)


class Progress:
    """Progress of a long loop: a context manager whose `advance` the loop calls."""

    LINE_EVERY_SECONDS = 10.0  # in a log
    BAR_EVERY_SECONDS = 0.2  # on a terminal
    BAR_WIDTH = 30  # characters

    def __init__(self, logger: Logger, label: str, total: float) -> None:
        self.logger = logger
        self.label = label
        self.total = total
        self.done = 0.0
        self.started = time.monotonic()
        self.reported = self.started
        self.has_bar = logger.is_main and sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.has_bar:
            sys.stderr.write("\r\x1b[K")

    def advance(self, units: float, note: str = "") -> None:
        """Count `units` as done; `note` is shown after the figures."""
        self.done += units
        now = time.monotonic()
        if now - self.reported < (self.BAR_EVERY_SECONDS if self.has_bar else self.LINE_EVERY_SECONDS):
            return
        self.reported = now

        # Figures
        fraction = self.done / max(1e-9, self.total)
        rate = self.done / max(1e-9, now - self.started)
        seconds_left = (self.total - self.done) / max(1e-9, rate)
        counts = f"{self.done:,.0f}/{self.total:,.0f} {100 * fraction:.0f}%"
        figures = f"{counts} {rate:,.1f}/s, {seconds_left:.0f} s left {note}".rstrip()

        # Bar or line
        if self.has_bar:
            filled = int(self.BAR_WIDTH * fraction)
            bar = "#" * filled + "." * (self.BAR_WIDTH - filled)
            sys.stderr.write(f"\r\x1b[K{self.label} [{bar}] {figures}")
            sys.stderr.flush()
        else:
            self.logger.log(f"{self.label}: {figures}")
