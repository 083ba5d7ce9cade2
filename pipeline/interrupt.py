"""Ctrl-C and SIGTERM (`kill`, `docker stop`, a pod's eviction, `ray job stop`): how a job is ended from outside.

While a job is at work both raise KeyboardInterrupt in its main thread: what is under way ends, and leases are given
back. While it imports torch and Ray, for seconds, and when it has ended, they end it at once: nothing is open then, and
a half-imported library would swallow the exception, or print a stack. So this imports nothing that takes time.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_at_once = True
_came: signal.Signals | None = None


@contextmanager
def raised() -> Iterator[None]:
    """A job is at work in the block: signals raise KeyboardInterrupt. A second Ctrl-C ends it at once all the same."""
    global _at_once
    _at_once = False
    try:
        yield
    finally:
        _at_once = True


@contextmanager
def kept() -> Iterator[None]:
    """Signals mean after the block what they meant before, though Ray takes SIGTERM for itself in it.

    It leaves with SystemExit while it connects, which becomes KeyboardInterrupt here; then its native handler would
    dump a stack, and when it disconnects it gives SIGTERM back to the system.
    """
    global _came
    before = {number: signal.getsignal(number) for number in _WORDS}
    try:
        yield
    except SystemExit:
        _came = _came or signal.SIGTERM
        raise KeyboardInterrupt from None
    finally:
        with suppress(ValueError):  # a thread beside the main one, whose signals nobody took
            for number, handler in before.items():
                signal.signal(number, handler)


def leave() -> NoReturn:
    """After KeyboardInterrupt: say how to go on, and end with 128 + the signal's number, as a shell has it.

    Not by the interpreter's own end: threads that Ray leaves behind crash it now and then (seen: status -11).
    """
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say_how_to_go_on(_came or signal.SIGINT)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(128 + (_came or signal.SIGINT))


def _say_how_to_go_on(number: signal.Signals) -> None:
    again = shlex.join([sys.executable, *sys.argv])
    # Not print(): the signal may have come in the middle of another one.
    with suppress(OSError):
        os.write(2, f"\n{_WORDS[number]}; what is done is kept. To go on: {again}\n".encode())


def _end(number: int, frame: FrameType | None) -> None:
    global _came
    if _at_once if _came is None else number == signal.SIGINT:
        _say_how_to_go_on(signal.Signals(number))
        os._exit(128 + number)
    if _came is not None:
        return  # it is ending; `timeout` sends SIGTERM twice
    _came = signal.Signals(number)
    raise KeyboardInterrupt


def _take() -> None:
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or in the background of a script
            signal.signal(number, _end)
    os.register_at_fork(after_in_child=_give_back)


def _give_back() -> None:
    """A process that a job forks has no command that goes on."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _end:
            signal.signal(number, handler)


def _is_a_job() -> bool:
    """Whether this process runs jobs/NAME.py, and does not import it for a test, or as a child of one that does."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent == Path(__file__).resolve().parents[1] / "jobs"


if _is_a_job():
    _take()
