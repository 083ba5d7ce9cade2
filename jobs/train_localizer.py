"""Train a regressor of boxes on the frozen features of an OverFeat network (OverFeat section 4).

python jobs/train_localizer.py --from runs/overfeat --run runs/boxes --data shards/scenes

ray job submit --working-dir . -- python jobs/train_localizer.py --from s3://bucket/run --run s3://bucket/boxes ...
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.train_boxes import Localizer, run_localizer


def main(options: Annotated[Localizer, command.FLAT]) -> int:
    """Train, resume after a crash, leave the network with its regressor in RUN."""
    return run_localizer(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
