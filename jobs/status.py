"""What of a run is finished, what is left, how fast it goes and how long it will take, from its directory alone.

python jobs/status.py runs/demo

python jobs/status.py s3://bucket/run --json
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, status


def main(run: Annotated[str, command.POSITIONAL], json: bool = False) -> int:
    """Print the status of a run.

    Args:
        run: Run directory: a local path, s3:// or gs://.
        json: Print it as JSON; docs/cluster.md names the fields.
    """
    return status.run(run, as_json=json)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
