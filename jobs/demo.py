"""The whole main job on the embedded data set, on this machine: from nothing to a finished atlas in runs/demo.

python jobs/demo.py
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, demo


def main(options: Annotated[demo.Options, command.FLAT]) -> int:
    """Draw, train, sweep, project, occlude, and write the pages."""
    return demo.run(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
