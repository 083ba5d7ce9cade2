"""Write docs/commands.md from the jobs' own help: `python docs/generate/commands.py`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "commands.md"

INTRODUCTION = """\
# Commands

*Written by `make docs` from the jobs' own help; a test holds it to them.*

Every job is a file of `jobs/`, run as `python jobs/NAME.py` on a laptop, or as
`ray job submit --working-dir . -- python jobs/NAME.py` on a cluster. `--help` fits a screen; `--help-verbose` is what
stands here. A job prints its configuration at the start, a bar in a terminal or lines in a log while it works, and at
the end what it made, how long it took, what was skipped and the command that comes next. An option that does not exist
is answered with the nearest that does. Exit statuses are those of [sweeps](sweeps.md).

Completion in bash (zsh and fish likewise), for the job that is called:

```
source <(python jobs/top9.py --tyro-print-completion bash)
```
"""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for job in sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__"):
        text = _help(job)
        lines += [f"## {job}", "", "```text", text, "```", ""]
        for command in re.findall(r"^ +• (\w+)", text, re.MULTILINE):
            lines += [f"### {job} {command}", "", "```text", _help(job, command), "```", ""]
    return "\n".join(lines)


def _help(job: str, *command: str) -> str:
    """What `--help-verbose` prints on a terminal of 100 columns."""
    arguments = [f"jobs/{job}.py", *command, "--help-verbose"]
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(io.StringIO()) as stream,
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    text = stream.getvalue().replace(f"{ROOT}/", "")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


if __name__ == "__main__":
    PAGE.write_text(page())
