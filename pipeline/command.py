"""How a job talks to the shell: options from dataclasses, a help that fits a screen, messages instead of stacks.

0: done. 1: refused or failed, with a message. 2: the command line is wrong. 3: done, but more samples were skipped
than allowed. 4: another process is at work on the same. 130: interrupted; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
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
    from pipeline.progress import say_suggestion

    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        if screen := _screen(main, description):
            print(screen)
            return 0
        arguments = ["--help-verbose" if given in ("-h", "--help") else given for given in arguments]
    try:
        status = tyro.cli(main, description=description, args=arguments, compact_help=True) or 0
        say_suggestion()
        return status
    except FORESEEN as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Held as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_HELD
    except KeyboardInterrupt:
        _say_how_to_go_on()
        return 130


def _screen(main: Callable[..., int | None], description: str | None) -> str | None:
    """The help with a line for each option; None for a job of several commands, whose help tyro keeps short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(main, description=description)
    if parser._subparsers:
        return None
    lines = [f"usage: {sys.argv[0]} [OPTIONS]", "", (description or "").strip().replace("\n\n", "\n"), ""]
    options = [action for action in parser._actions if action.dest != "help"]
    left = [f"  {(action.option_strings or [''])[0]} {_values(action)}" for action in options]
    width = min(_LONGEST_OPTION, max(map(len, left)))
    room = shutil.get_terminal_size().columns
    for name, action in zip(left, options, strict=True):
        lines.append(f"{name:{width}}  {_in_a_line(action.help or '', room - max(width, len(name)) - 2)}")
    return "\n".join([*lines, "", _MORE])


_LONGEST_OPTION = 27
_SHORTEST_TEXT = 24
_MORE = "More of each: -H or --help-verbose. Completion: --tyro-print-completion bash, zsh or fish."


def _values(action: argparse.Action) -> str:
    """What an option takes: STR, {centre,ten}, or nothing where it is a switch."""
    text = str(action.metavar or "").replace("{None}|", "").replace("{None,", "{")
    return f"{text[1:].split()[0]} ..." if text.startswith("[") else text


def _in_a_line(text: str, room: int) -> str:
    """The first sentence, as far as there is room for it, and the default."""
    text, _, default = text.removesuffix(")").partition("(default: ")
    end = "" if default in ("", "None", "False") else f" [{textwrap.shorten(default, 24, placeholder=' ...')}]"
    if room - len(end) < _SHORTEST_TEXT:
        end = ""
    sentence = re.split(r"(?<=\.) ", text.strip())[0]
    return textwrap.shorten(sentence, max(_SHORTEST_TEXT, room - len(end)), placeholder=" ...") + end


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
