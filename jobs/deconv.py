"""Project the top-9 cells of every feature map down to pixels, beside the patches that caused them.

python jobs/deconv.py --run runs/demo --data shards/rendered

ray job submit --working-dir . -- python jobs/deconv.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, sweep
from pipeline.analyses.deconv import ANALYSIS, Config
from pipeline.context import Options


def main(options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT]) -> int:
    """Project every cell of the top9 table, write results/deconv."""
    return sweep.run(ANALYSIS, options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
