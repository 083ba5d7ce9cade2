"""Measure how far features move when images are moved, enlarged or turned.

python jobs/invariance.py --run runs/demo --data shards/rendered

python jobs/invariance.py --run runs/demo --data shards/rendered --transforms rotation --rotations-deg 0 90 180 270

ray job submit --working-dir . -- python jobs/invariance.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.invariance import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Alter the chosen images, write results/invariance."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
