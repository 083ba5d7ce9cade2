"""Train a new linear classifier on the features of each layer, on N images a class; without images.

python jobs/transfer.py --run runs/demo

ray job submit --working-dir . -- python jobs/transfer.py --run s3://bucket/run
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, derive
from pipeline.analyses.transfer import ANALYSIS, Config
from pipeline.derive import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Read results/features, write results/transfer."""
    return derive.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
