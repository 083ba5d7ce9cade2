"""Evaluate a network on labelled images: top-1 and top-5 error, mean per-class accuracy, every prediction.

python jobs/evaluate.py --run runs/demo --data shards/rendered --views ten

python jobs/evaluate.py --run runs/overfeat --data shards/photos --views overfeat --scales 1 2 4 6 --name four-scales

python jobs/evaluate.py --run runs/a --with runs/b runs/c --data shards/rendered --name ensemble

ray job submit --working-dir . -- python jobs/evaluate.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.evaluation import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Write results/predictions, confusion, class_errors and evaluation; print the errors."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
