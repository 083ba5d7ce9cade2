"""Train an OverFeat classifier on, over all windows and with a background class, to detect (OverFeat section 5).

python jobs/train_detector.py --from runs/overfeat --run runs/detector --data shards/scenes

ray job submit --working-dir . -- python jobs/train_detector.py --from s3://bucket/run --run s3://bucket/detector ...
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.train_boxes import Detector, run_detector


def main(options: Annotated[Detector, command.FLAT]) -> int:
    """Train, resume after a crash, leave the detector in RUN; its boxes are trained next (train_localizer)."""
    return run_detector(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
