"""Build the atlas of a run: pictures and pages a layer at a time, then the occlusion pages, and index.html last."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline.atlas import images, layers, overview
from pipeline.atlas.records import Sources
from pipeline.atlas.site import Site
from pipeline.progress import say
from pipeline.runs import Run, RunError
from pipeline.storage import Location

SMALLEST_TILE, LARGEST_TILE = 16, 512


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the atlas shows."""

    top9: str = "top9"
    """Table of strongest images: top9, or top9-NAME; the feature_maps of the same name belong to it."""
    deconv: str = "deconv"
    """Table of projections: deconv, or deconv-NAME."""
    occlusion: str = "occlusion"
    """Table of occlusion maps: occlusion, or occlusion-NAME."""
    tile_px: int = 96
    """Side of a projection or patch in the stored pictures, in pixels."""
    images: int = 100
    """Occlusion pages, at most."""

    def __post_init__(self) -> None:
        if not SMALLEST_TILE <= self.tile_px <= LARGEST_TILE:
            raise RunError(f"--tile-px is {self.tile_px}: give {SMALLEST_TILE} to {LARGEST_TILE}")
        if self.images < 0:
            raise RunError(f"--images is {self.images}: give 0 or more")


def build(run: Run, options: Options) -> Location:
    """Write RUN/atlas from the run's tables. What is missing is named on the pages, with the command that makes it.

    Returns: the location of index.html. The same tables give the same bytes.
    Raises: RunError where the run has no model, or a table that its manifest lists is not there; StorageError.
    """
    started = time.monotonic()
    facts = run.describe()
    sources = Sources(run=run, top9=options.top9, deconv=options.deconv, occlusion=options.occlusion)
    site = Site(run.location / "atlas")
    site.write_static()
    faces = layers.write(site, sources, options.tile_px)
    pictures = images.write(site, sources, facts, options.images, {face.layer.name: face for face in faces})
    index = overview.write(site, sources, facts, faces, pictures)
    site.prune()
    say(f"atlas: finished in {time.monotonic() - started:.1f} s: {index}")
    return index
