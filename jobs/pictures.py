"""Keep a small whole picture of every image that top9 (or groups) names, for the atlas to draw cells' boxes on.

python jobs/pictures.py --run runs/demo --data shards/rendered

ray job submit --working-dir . -- python jobs/pictures.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.pictures import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Read the images of the table of cells, write results/pictures."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
