"""Turn images into WebDataset shards with an index, index shards that came from elsewhere, or check shards.

python jobs/shards.py rendered

python jobs/shards.py scenes --out shards/scenes

python jobs/shards.py imagefolder photos --out shards/photos

python jobs/shards.py index data --out shards/data

python jobs/shards.py check shards/data
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.sources.commands import Check, Ilsvrc2012, ImageFolder, Index, Rendered, Scenes, Torchvision, run

Command = (
    Annotated[Rendered, command.subcommand("rendered")]
    | Annotated[Scenes, command.subcommand("scenes")]
    | Annotated[ImageFolder, command.subcommand("imagefolder")]
    | Annotated[Torchvision, command.subcommand("torchvision")]
    | Annotated[Ilsvrc2012, command.subcommand("ilsvrc2012")]
    | Annotated[Index, command.subcommand("index")]
    | Annotated[Check, command.subcommand("check")]
)


def main(source: Annotated[Command, command.FLAT]) -> int:
    """Write shards, or the index of shards, or check them."""
    return run(source)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
