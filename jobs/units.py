"""Dead, double and dominant feature maps, their frequencies, aliasing and classes; without images.

python jobs/units.py --run runs/demo

python jobs/units.py --run runs/zfnet --against runs/alexnet

ray job submit --working-dir . -- python jobs/units.py --run s3://bucket/run
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, derive
from pipeline.analyses import units_comparison
from pipeline.analyses.units import ANALYSIS, Config
from pipeline.derive import Options


def main(
    options: Annotated[Options, command.FLAT], config: Annotated[Config, command.FLAT], against: str | None = None
) -> int:
    """Read results/{top9, feature_maps, duplicates}, write results/units.

    Args:
        against: Another run; its units are made too, and results/units_comparison puts both side by side.
    """
    status = derive.run(ANALYSIS, options, config)
    if against is not None and not status:
        derive.run(ANALYSIS, replace(options, run=against), replace(config, layers=()))
        status = units_comparison.run(options, against)
    return status


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
