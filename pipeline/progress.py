"""What a job says: a bar in a terminal while it works, lines in a log, and at its end what a user may want next."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

EXIT_SKIPPED = 3
"""Exit status of a job that finished with more samples skipped than --max-skipped allows."""

_EVERY_SECONDS = 5.0
_suggested: list[str] = []


def say(message: str) -> None:
    """Print a line at once, also into a pipe; above a bar, where there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def suggest(command: str, index: str | None = None, **given: str) -> None:
    """Keep what a user may want next, "top9.py --run {run}"; what was kept last is printed when the job has ended.

    Args:
        command: with the names of what is given in braces.
        index: folder of the index of `data`, where it is not in the folder of the shards.
        given: what stands for each name.
    """
    if index is not None:
        command, given = command.replace("{data}", "{data} --index {index}"), {**given, "index": index}
    _suggested[:] = ["python jobs/" + command.format(**{name: shlex.quote(value) for name, value in given.items()})]


def say_suggestion() -> None:
    """Print what was kept, where anything was."""
    for command in _suggested:
        say(f"next: {command}")


def bar(name: str, total: int, unit: str) -> tqdm[Any] | None:
    """A bar, in a terminal; None in a log, where lines are said instead."""
    if not sys.stdout.isatty():
        return None
    columns, rows = shutil.get_terminal_size()  # tqdm's own look finds 0 x 0 in some, and draws nothing
    return tqdm(total=total, desc=name, unit=f" {unit}", file=sys.stdout, ncols=columns, nrows=rows)


class Progress:
    """Samples done, rate and time left: a bar, or a line for parts done at most every few seconds."""

    def __init__(self, name: str, parts: int, samples: int) -> None:
        self.name, self.parts, self.samples = name, parts, samples
        self.done = self.done_samples = 0
        self.started = self.said = time.monotonic()
        self.bar = bar(name, samples, "images")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, samples: int) -> None:
        """One part of this many samples is done."""
        self.done += 1
        self.done_samples += samples
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(samples)
        elif now - self.said >= _EVERY_SECONDS or self.done == self.parts:
            self.said = now
            rate = self.done_samples / max(now - self.started, 1e-9)
            left = (self.samples - self.done_samples) / rate
            say(f"{self.name}: {self.done}/{self.parts} parts, {rate:.1f} images/s, {clock(left)} left")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03 or 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
