"""Train the variants of the papers' tables side by side: layers removed or widened, and what AlexNet's parts bring.

python jobs/ablation.py --run runs/ablation --data shards/rendered

python jobs/ablation.py --run runs/ablation --data shards/rendered --variants zfnet_small zfnet_small_no34 --epochs 12

ray job submit --working-dir . -- python jobs/ablation.py --run s3://bucket/run --data s3://bucket/data --variants full
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.analyses import ablation


def main(options: Annotated[ablation.Options, command.FLAT]) -> int:
    """Train each variant in RUN/VARIANT, or go on; write results/ablation."""
    return ablation.run(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
