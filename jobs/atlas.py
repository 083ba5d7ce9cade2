"""Write the pages that show a run's results, from its tables alone.

python jobs/atlas.py --run runs/demo

python jobs/atlas.py --run runs/demo --against runs/other
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import atlas, command
from pipeline.runs import Run


def main(options: Annotated[atlas.Options, command.FLAT], run: str = "runs/demo") -> int:
    """Build RUN/atlas/index.html.

    Args:
        options: what the pages hold.
        run: run directory: a local path, s3:// or gs://.
    """
    atlas.build(Run.at(run), options)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
