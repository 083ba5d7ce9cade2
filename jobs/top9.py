"""Find the nine images that excite each feature map most, and the statistics of every map.

python jobs/top9.py --run runs/demo --data shards/rendered

ray job submit --working-dir . -- python jobs/top9.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.top9 import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Sweep the split, write results/top9 and results/feature_maps."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
