"""Write class maps: the probability of a class in every window of chosen images, at OverFeat's scales.

python jobs/dense_maps.py --run runs/overfeat --data shards/photos --first 20

ray job submit --working-dir . -- python jobs/dense_maps.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.dense_maps import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Slide the network over the images, write results/dense_maps."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
