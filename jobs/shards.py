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

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import command
from pipeline.sources.commands import Check, Ilsvrc2012, ImageFolder, Index, Rendered, Scenes, Torchvision, run

Command = (
    Annotated[Rendered, tyro.conf.subcommand("rendered")]
    | Annotated[Scenes, tyro.conf.subcommand("scenes")]
    | Annotated[ImageFolder, tyro.conf.subcommand("imagefolder")]
    | Annotated[Torchvision, tyro.conf.subcommand("torchvision")]
    | Annotated[Ilsvrc2012, tyro.conf.subcommand("ilsvrc2012")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


def main(source: Annotated[Command, command.FLAT]) -> int:
    """Write shards, or the index of shards, or check them."""
    return run(source)


if __name__ == "__main__":
    sys.exit(command.run(main, __doc__))
