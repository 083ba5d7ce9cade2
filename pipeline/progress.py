"""What a job says while it works: lines that read well in a terminal and in a log file."""

from __future__ import annotations

import time

EXIT_SKIPPED = 3
"""Exit status of a job that finished with more samples skipped than --max-skipped allows."""

_EVERY_SECONDS = 5.0


def say(message: str) -> None:
    """Print a line at once, also into a pipe."""
    print(message, flush=True)


class Progress:
    """Parts done, rate and time left, at most every few seconds."""

    def __init__(self, name: str, parts: int, samples: int) -> None:
        self.name, self.parts, self.samples = name, parts, samples
        self.done = self.done_samples = 0
        self.started = self.said = time.monotonic()

    def advance(self, samples: int) -> None:
        """One part of this many samples is done."""
        self.done += 1
        self.done_samples += samples
        now = time.monotonic()
        if now - self.said >= _EVERY_SECONDS or self.done == self.parts:
            self.said = now
            rate = self.done_samples / max(now - self.started, 1e-9)
            left = (self.samples - self.done_samples) / rate
            say(f"{self.name}: {self.done}/{self.parts} parts, {rate:.1f} images/s, {clock(left)} left")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03 or 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
