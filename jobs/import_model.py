"""Turn a network that was trained elsewhere into a run directory, on which every analysis works.

python jobs/import_model.py --run runs/resnet18 --architecture torchvision:resnet18 --weights resnet18.pth

python jobs/import_model.py --run runs/mine --architecture package.module:function --weights mine.safetensors

ray job submit --working-dir . -- python jobs/import_model.py --run s3://bucket/run --architecture torchvision:resnet18
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command, import_model


def main(options: Annotated[import_model.Options, command.FLAT]) -> int:
    """Write RUN/model and RUN/run.json."""
    return import_model.run(options)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
