"""What `jobs/shards.py` offers: one dataclass a subcommand, and how each is carried out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline import shards
from pipeline.indexing import check, index_shards
from pipeline.progress import say, suggest
from pipeline.shards import BadShards
from pipeline.sources import ilsvrc2012, imagefolder, rendered, scenes, torchvision
from pipeline.sources.default import DEFAULT
from pipeline.sources.writer import Source, write_shards
from pipeline.storage import Location


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How shards are written."""

    seed: int = 0
    """Seed of the order in which images lie in the shards."""
    samples_per_shard: int = 1000
    """Images of a shard."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise BadShards(f"--samples-per-shard is {self.samples_per_shard}: give at least 1")
        if self.seed < 0:
            raise BadShards(f"--seed is {self.seed}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Rendered(Writing):
    """Draw the embedded data set: textured shapes with boxes and masks."""

    out: str = DEFAULT
    """Folder for the shards: a local path, s3:// or gs://."""
    train: int = rendered.Rendered.train
    """Images to train on."""
    val: int = rendered.Rendered.val
    """Images to validate on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "val"):
            if getattr(self, name) < 0:
                raise BadShards(f"--{name} is {getattr(self, name)}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Scenes(Writing):
    """Draw scenes of the embedded data set's objects: one or several of an image, at any place, with boxes."""

    out: str
    """Folder for the shards: a local path, s3:// or gs://."""
    train: int = scenes.Scenes.train
    """Images to train on."""
    val: int = scenes.Scenes.val
    """Images to validate on."""
    objects: tuple[int, int] = scenes.Scenes.objects
    """Fewest and most objects of an image."""
    radius: tuple[float, float] = scenes.Scenes.radius
    """Smallest and largest object: radius of the disc of its area, as a part of the image's smallest side."""

    @property
    def source(self) -> scenes.Scenes:
        """What draws them. Raises: BadShards for numbers that cannot be drawn."""
        chosen = {name: getattr(self, name) for name in ("seed", "train", "val", "objects", "radius")}
        try:
            return scenes.Scenes(**chosen)
        except ValueError as error:
            raise BadShards(f"--{error}") from None


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Writing):
    """Images in folders: a folder for each class, or no classes at all."""

    folder: tyro.conf.Positional[Path]
    """Folder that holds the images."""
    out: str
    """Folder for the shards: a local path, s3:// or gs://."""
    validation_share: float = 0.2
    """Share of the images, chosen by a hash of their path, that form the split val."""


@dataclass(frozen=True, kw_only=True)
class Torchvision(Writing):
    """A data set of torchvision.datasets by the name of its class."""

    name: tyro.conf.Positional[str]
    """Class of torchvision.datasets, for example CIFAR10."""
    out: str
    """Folder for the shards: a local path, s3:// or gs://."""
    root: Path = Path("downloads")
    """Where torchvision keeps or downloads the data."""


@dataclass(frozen=True, kw_only=True)
class Ilsvrc2012(Writing):
    """ImageNet 2012 from the official archives, which are read in place."""

    folder: tyro.conf.Positional[Path]
    """Folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz."""
    out: str
    """Folder for the shards: a local path, s3:// or gs://."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Make an index for shards that came from elsewhere; the shards are left as they are."""

    shards: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The folder that holds the tar files, named SPLIT-NUMBER.tar, or some of them."""
    out: str
    """Folder for the index; give it as --data to the jobs."""
    classes: str | None = None
    """File with the name of a class on each line; default classes.txt beside the shards."""
    accept_damaged: bool = False
    """Index what can be read of damaged shards instead of refusing them."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read all shards of an index, and compare them with it byte for byte."""

    data: Annotated[str, tyro.conf.Positional]
    """The shards: a local path, s3:// or gs://."""
    index: str | None = None
    """Folder of their index; default the shards' own."""


def run(command: Writing | Index | Check) -> int:
    """Carry the command out, and say what there is now."""
    started = time.monotonic()
    if isinstance(command, Check):
        index = shards.Index.load(command.data, command.index)
        check(index)
        size, seconds = sum(size for size, _ in index.identities.values()), time.monotonic() - started
        say(f"shards: {len(index.identities)} are as they were indexed, {size / 1e6:,.1f} MB, in {seconds:.1f} s")
        return 0
    if isinstance(command, Index):
        made = index_shards(
            list(command.shards), command.out, classes=command.classes, accept_damaged=command.accept_damaged
        )
        out = command.out
    else:
        source, out = _source(command)
        made = write_shards(source, out, seed=command.seed, samples_per_shard=command.samples_per_shard)
    counts = ", ".join(f"{number} {split}" for split, number in made.splits.items())
    say(f"shards: {counts} images, {len(made.classes)} classes, in {time.monotonic() - started:.1f} s: {out}")
    if len(made.classes) > 1 and {"train", "val"} <= set(made.splits):
        suggest("train.py --run {run} --data {data}", run=f"runs/{Location.of(out).name}", data=out)
    return 0


def _source(command: Writing) -> tuple[Source, str]:
    match command:
        case Rendered():
            return rendered.Rendered(seed=command.seed, train=command.train, val=command.val), command.out
        case Scenes():
            return command.source, command.out
        case ImageFolder():
            share = command.validation_share
            return imagefolder.ImageFolder(folder=command.folder, validation_share=share), command.out
        case Torchvision():
            return torchvision.Torchvision(name=command.name, root=command.root), command.out
        case Ilsvrc2012():
            return ilsvrc2012.Ilsvrc2012(folder=command.folder), command.out
    raise AssertionError(f"no source for {command}")
