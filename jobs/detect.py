"""Find every object of every image, and say how well (OverFeat section 5).

python jobs/detect.py --run runs/boxes --data shards/scenes

ray job submit --working-dir . -- python jobs/detect.py --run s3://bucket/boxes --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.detection import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Write results/detection, and detection_objects, _windows, _curves and _classes; print the mAP."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
