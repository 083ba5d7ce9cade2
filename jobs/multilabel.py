"""Train a softmax on images of several classes, and rank others by each class: average precision; without images.

python jobs/multilabel.py --run runs/demo

ray job submit --working-dir . -- python jobs/multilabel.py --run s3://bucket/run
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, derive
from pipeline.analyses.multilabel import ANALYSIS, Config
from pipeline.derive import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Read results/features, write results/multilabel."""
    return derive.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
