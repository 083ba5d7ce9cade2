"""Waiting for storage that may never answer: the call is made in a thread beside, and left behind after a time.

A read of a network disk whose server is gone cannot be ended from outside, not even by a signal. So it gets a thread of
its own, and the caller goes on with an error that names the file.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

SECONDS = 300.0
"""Without any progress before storage counts as hung; $ZFNET_STORAGE_TIMEOUT overrides it."""

T = TypeVar("T")


class Hung(Exception):
    """There was no answer for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer for {seconds:g} s")
        self.seconds = seconds


def answered(action: Callable[[], T]) -> T:
    """The action's result, or its exception. Long ones call `progress` after each step.

    Raises: Hung where it made no progress for so long; the action may still end some time, and nobody looks.
    """
    helper: _Helper | None = getattr(_of_this_thread, "helper", None)
    if helper is None or not helper.thread.is_alive():  # none yet, or this process was forked
        helper = _of_this_thread.helper = _Helper()
    try:
        result, error = helper.ask(action, _limit())
    except BaseException:  # hung, or Ctrl-C: the helper is not free
        del _of_this_thread.helper
        raise
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def progress() -> None:
    """Say, inside an action, that storage answers."""
    thread = threading.current_thread()
    if isinstance(thread, _Thread):
        thread.steps += 1


def _limit() -> float:
    text = os.environ.get("ZFNET_STORAGE_TIMEOUT", "")
    try:
        return float(text) if text and float(text) > 0 else SECONDS
    except ValueError:
        return SECONDS


_of_this_thread = threading.local()


class _Thread(threading.Thread):
    """Does one action after the other, until it is given None."""

    def __init__(self) -> None:
        super().__init__(name="storage", daemon=True)
        self.steps = 0
        self.actions: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        while (action := self.actions.get()) is not None:
            try:
                self.results.put((action(), None))
            except BaseException as error:
                self.results.put((None, error))
            del action  # what it holds goes now, not with the next one


class _Helper:
    """A thread beside one that asks; it ends with that one."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self.thread.start()

    def __del__(self) -> None:
        self.thread.actions.put(None)

    def ask(self, action: Callable[[], Any], seconds: float) -> tuple[Any, BaseException | None]:
        self.thread.actions.put(action)
        while True:
            steps = self.thread.steps
            try:
                return self.thread.results.get(timeout=seconds)
            except queue.Empty:
                if self.thread.steps == steps:
                    raise Hung(seconds) from None
