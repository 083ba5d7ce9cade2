"""How long an actor's network waits for images: whether more cores, or --decoders, would help."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class Spent:
    """Seconds that the threads of the network spent on a part, with a batch and without one."""

    def __init__(self, waited: float = 0.0) -> None:
        self.seconds = {"network": 0.0, "waited": waited}
        self.lock = threading.Lock()

    @contextmanager
    def on(self, what: Literal["network", "waited"]) -> Iterator[None]:
        """A thread spends the block with a batch in the network, or waiting for one."""
        begun = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[what] += time.monotonic() - begun

    def report(self) -> dict[str, float]:
        """`network_seconds` and `waited_seconds`."""
        return {f"{what}_seconds": round(seconds, 6) for what, seconds in self.seconds.items()}


class Waiting:
    """The parts of an actor: where none is under way, all threads of its network wait for the next one."""

    def __init__(self, threads: int) -> None:
        self.threads, self.parts = threads, 0
        self.idle_since: float | None = None  # the first part has not been waited for
        self.lock = threading.Lock()

    @contextmanager
    def part(self) -> Iterator[Spent]:
        """A part is under way; the wait before it counts as its own."""
        with self.lock:
            idle = 0.0 if self.idle_since is None else time.monotonic() - self.idle_since
            self.parts += 1
            self.idle_since = None
        try:
            yield Spent(self.threads * idle)
        finally:
            with self.lock:
                self.parts -= 1
                self.idle_since = None if self.parts else time.monotonic()
