"""How a job talks to the shell: options from dataclasses, a help that fits a screen, messages instead of stacks.

0: done. 1: refused or failed, with a message. 2: the command line is wrong. 3: done, but more samples were skipped
than allowed. 4: another process is at work on the same. 130: interrupted by Ctrl-C; 143: ended by SIGTERM; after both
the same command goes on where it stopped.
"""

from __future__ import annotations

from pipeline import interrupt

# isort: split
# First, so that signals are met while all that follows is imported.
import argparse
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable

import tyro

EXIT_HELD = 4
"""Exit status of a job that another process is at work on."""

FLAT = tyro.conf.arg(name="")
"""Marks an argument of a job whose fields become options without a prefix."""

POSITIONAL = tyro.conf.Positional
"""Marks an argument of a job that is given without a name."""

subcommand = tyro.conf.subcommand
"""Names one of the commands of a job that has several."""


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
        with interrupt.raised():
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
        interrupt.leave()


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
