"""How a job talks to the shell: options from dataclasses, messages instead of stacks, exit statuses.

0: done. 1: refused or failed, with a message. 2: the command line is wrong. 3: done, but more samples were skipped
than allowed. 130: interrupted; the same command goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import tyro

from pipeline.errors import FORESEEN

FLAT = tyro.conf.arg(name="")
"""Marks an argument of a job whose fields become options without a prefix."""


def run(main: Callable[..., int | None], description: str | None) -> int:
    """Parse the command line into the arguments of `main`, call it, and return the exit status."""
    try:
        return tyro.cli(main, description=description) or 0
    except FORESEEN as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = shlex.join([sys.executable, *sys.argv])
        print(f"\ninterrupted; what is done is kept. To go on: {again}", file=sys.stderr)
        return 130
