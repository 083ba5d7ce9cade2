"""Train a network from scratch on the images that jobs/transfer.py draws: the paper's rows without pre-training.

python jobs/scratch.py --run runs/demo --data shards/caltech101

ray job submit --working-dir . -- python jobs/scratch.py --run s3://bucket/run --data s3://bucket/caltech101
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.analyses import scratch


def main(options: Annotated[scratch.Options, command.FLAT]) -> int:
    """Train each draw in RUN/scratch/N-FOLD, or go on; write results/scratch."""
    return scratch.run(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
