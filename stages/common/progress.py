"""What long work says while it runs: stamped lines for the terminal and the log, and progress over a known total."""

import sys
import time
from typing import TextIO

from stages.common import clock


class Report:
    """Lines to the terminal and to an open log file; silent on the ranks that do not write."""

    def __init__(self, is_main: bool = True, log_file: TextIO | None = None) -> None:
        self.is_main = is_main
        self.log_file = log_file

    def log(self, line: str) -> None:
        """One line, stamped with the seconds since the process began."""
        if not self.is_main:
            return
        stamped = f"{clock.process_seconds():8.1f}s {line}"
        print(stamped, flush=True)
        if self.log_file is not None:
            self.log_file.write(stamped + "\n")
            self.log_file.flush()

    def progress(self, what: str, total: float) -> "Progress":
        """A progress report over `total` units: a bar on a terminal, a line every ten seconds elsewhere."""
        return Progress(self, what, total)


class Progress:
    """How far a long loop is; use as a context manager and call `advance`."""

    LINE_EVERY_SECONDS = 10.0
    BAR_EVERY_SECONDS = 0.2
    BAR_WIDTH = 30

    def __init__(self, report: Report, what: str, total: float) -> None:
        self.report, self.what, self.total = report, what, total
        self.done = 0.0
        self.started = self.reported = time.monotonic()
        self.bar = report.is_main and sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            sys.stderr.write("\r\x1b[K")

    def advance(self, units: float, note: str = "") -> None:
        """Count `units` as done; `note` is shown beside the figures."""
        self.done += units
        now = time.monotonic()
        if now - self.reported < (self.BAR_EVERY_SECONDS if self.bar else self.LINE_EVERY_SECONDS):
            return
        self.reported = now
        share = self.done / max(1e-9, self.total)
        rate = self.done / max(1e-9, now - self.started)
        left = (self.total - self.done) / max(1e-9, rate)
        figures = f"{self.done:,.0f}/{self.total:,.0f} {100 * share:.0f}% {rate:,.1f}/s, {left:.0f} s left {note}".rstrip()
        if self.bar:
            filled = int(self.BAR_WIDTH * share)
            sys.stderr.write(
                f"\r\x1b[K{self.what} [{'#' * filled}{'.' * (self.BAR_WIDTH - filled)}] {figures}"
            )
            sys.stderr.flush()
        else:
            self.report.log(f"{self.what}: {figures}")
