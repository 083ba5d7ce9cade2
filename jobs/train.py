"""Train a network on labelled shards.

python jobs/train.py --run runs/demo --data shards/rendered

ray job submit --working-dir . -- python jobs/train.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, train


def main(options: Annotated[train.Options, command.FLAT]) -> int:
    """Train, or go on where an earlier call stopped; write model, checkpoints and metrics."""
    return train.run(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
