"""Find the object of each image: five guesses of a class and a box (OverFeat section 4).

python jobs/localize.py --run runs/boxes --data shards/scenes

ray job submit --working-dir . -- python jobs/localize.py --run s3://bucket/boxes --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.localization import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Write results/localization, localization_images and localization_windows; print the error."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
