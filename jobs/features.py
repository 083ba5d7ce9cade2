"""Write the activations of chosen layers for every image of a split: what transfer and retrieval work on.

python jobs/features.py --run runs/demo --data shards/rendered --split train

ray job submit --working-dir . -- python jobs/features.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.features import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Sweep the split, write results/features."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
