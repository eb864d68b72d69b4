"""A line that says how far the run is and how long it will take."""

from __future__ import annotations

import sys
import time

TERMINAL_EVERY, LOG_EVERY = 0.5, 30.0
"""Seconds between lines on a terminal, where they overwrite each other, and in a log file."""


class Progress:
    """Counts sources; prints now and then."""

    def __init__(self, total: int) -> None:
        """Start the clock.

        Args:
            total: sources, about: how many series a DICOM folder holds is not known before.
        """
        self.total = total
        self.known = self.seen = self.cases = self.skipped = 0
        self.terminal = sys.stdout.isatty()
        self.every = TERMINAL_EVERY if self.terminal else LOG_EVERY
        self.started = self.printed = time.monotonic()

    def add(self, is_case: bool) -> None:
        """Count one source that this run has dealt with."""
        self.seen += 1
        self.cases += is_case
        self.skipped += not is_case
        if time.monotonic() - self.printed >= self.every:
            self.show()

    def show(self) -> None:
        self.printed = time.monotonic()
        print(
            self.line(self.printed - self.started), end="\r" if self.terminal else "\n", flush=True
        )

    def end(self) -> None:
        if self.terminal and self.seen:
            print(self.line(time.monotonic() - self.started))

    def line(self, seconds: float) -> str:
        """The line after so many seconds."""
        done = self.known + self.seen
        rate = self.seen / seconds if seconds > 0 else 0.0
        left = max(self.total - done, 0)
        estimate = f", about {in_words(left / rate)} left" if rate and left else ""
        return (
            f"  {done} of {max(self.total, done)}: {self.cases} new cases, {self.skipped} left out;"
            f" {rate:.1f}/s{estimate}   "
        )


def in_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
