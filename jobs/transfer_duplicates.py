"""Find the images of a set that another set, or the same one, holds too; without images.

python jobs/transfer_duplicates.py --run runs/demo --layers conv5

ray job submit --working-dir . -- python jobs/transfer_duplicates.py --run s3://bucket/run --layers conv5
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, derive
from pipeline.analyses.transfer_duplicates import ANALYSIS, Config
from pipeline.derive import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Read results/features, write results/transfer_duplicates."""
    return derive.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
