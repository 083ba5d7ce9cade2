"""Find the nearest images of each image by the distance between their features; without images.

python jobs/retrieval.py --run runs/demo

ray job submit --working-dir . -- python jobs/retrieval.py --run s3://bucket/run
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, derive
from pipeline.analyses.retrieval import ANALYSIS, Config
from pipeline.derive import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Read results/features, write results/retrieval."""
    return derive.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
