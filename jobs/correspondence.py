"""Measure whether masking the same part of faces changes their features alike.

python jobs/correspondence.py --run runs/dogs --data shards/dog-faces --split all --where frontal

ray job submit --working-dir . -- python jobs/correspondence.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.correspondence import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Mask parts of the chosen images, write results/correspondence and its details."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
