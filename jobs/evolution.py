"""Show how feature maps grow during training: at chosen epochs the strongest training image of each, projected.

python jobs/evolution.py --run runs/demo --data shards/rendered

python jobs/evolution.py --run runs/demo --data shards/rendered --epochs 1 2 5 10 20 28

ray job submit --working-dir . -- python jobs/evolution.py --run s3://bucket/run --data s3://bucket/shards
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.analyses import evolution
from pipeline.context import Options


def main(
    options: Annotated[Options, command.FLAT] = Options(split="train"),  # noqa: B008
    config: Annotated[evolution.Config, command.FLAT] = evolution.Config(),  # noqa: B008
) -> int:
    """Sweep the checkpoints that are new, write results/{evolution, evolution_cells, evolution_convergence}."""
    return evolution.run(options, config)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
