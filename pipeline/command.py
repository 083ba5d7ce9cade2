"""How a job talks to the shell: options from dataclasses, messages instead of stacks, exit statuses.

0: done. 1: refused or failed, with a message. 2: the command line is wrong. 3: done, but more samples were skipped
than allowed. 4: another process is at work on the same. 130: interrupted; the same command goes on where it stopped.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from types import TracebackType

import tyro

EXIT_HELD = 4
"""Exit status of a job that another process is at work on."""

FLAT = tyro.conf.arg(name="")
"""Marks an argument of a job whose fields become options without a prefix."""


def run(main: Callable[..., int | None], description: str | None) -> int:
    """Parse the command line into the arguments of `main`, call it, and return the exit status."""
    from pipeline.errors import FORESEEN
    from pipeline.lease import Held

    try:
        return tyro.cli(main, description=description) or 0
    except FORESEEN as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Held as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_HELD
    except KeyboardInterrupt:
        _say_how_to_go_on()
        return 130


def _say_how_to_go_on() -> None:
    again = shlex.join([sys.executable, *sys.argv])
    print(f"\ninterrupted; what is done is kept. To go on: {again}", file=sys.stderr)


def _without_a_stack(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _say_how_to_go_on()
        os._exit(130)  # a half-imported library may hang or print more while it is taken down
    else:
        sys.__excepthook__(kind, error, stack)


# A job imports torch and Ray for seconds before it runs; Ctrl-C is met there too.
sys.excepthook = _without_a_stack
