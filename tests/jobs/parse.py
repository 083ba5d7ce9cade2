"""Whether a job would take a command line, without running it."""

import functools
import runpy
import shlex

import tyro

from tests.conftest import ROOT


def would_take(command: str) -> None:
    """Parse `python jobs/JOB.py ...` as the job does; SystemExit where it would refuse its options or their values."""
    python, path, *arguments = shlex.split(command)
    assert python == "python", command
    main = runpy.run_path(str(ROOT / path), run_name="parsed")["main"]

    @functools.wraps(main)
    def nothing(*given: object, **named: object) -> None:
        return None

    tyro.cli(nothing, args=arguments)
