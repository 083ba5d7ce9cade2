"""Build the atlas of a run: pages of images, of layers a layer at a time, of tables, and index.html last."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.atlas import catalogue, class_maps, comparison, history, images, layers, overview, results
from pipeline.atlas.pages import Link
from pipeline.atlas.records import Sources
from pipeline.atlas.site import Site
from pipeline.progress import say, suggest
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
    """Image pages, at most."""
    against: str | None = None
    """Another run to put beside this one, on a page of its own."""

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
    facts = _facts(run)
    if options.against is not None:
        Run.at(options.against).describe()  # refused before any work
    sources = Sources(run=run, top9=options.top9, deconv=options.deconv, occlusion=options.occlusion)
    found = catalogue.find(run, facts["model_id"])
    site = Site(run.location / "atlas", _links(sources, options))
    site.write_static()
    drawn = class_maps.write(site, run, found)
    pictures = images.write(site, sources, found, facts, drawn, options.images)
    faces = layers.write(site, sources, found, pictures, options.tile_px)
    results.write(site, run, found, drawn)
    history.write(site, run, facts, found)
    if options.against is not None:
        comparison.write(site, sources, faces, Run.at(options.against))
    index = overview.write(site, sources, facts, found, faces, pictures, options.against)
    site.prune()
    say(f"atlas: finished in {time.monotonic() - started:.1f} s: {index}")
    suggest("figures.py --run {run}", run=str(run.location))
    return index


def _facts(run: Run) -> dict[str, Any]:
    """run.json; or of a folder that has tables and no network, as an ablation has, that there is none."""
    if (run.location / "run.json").exists() or not (run.location / "results" / "manifests").names():
        return run.describe()
    return {"architecture": None, "classes": [], "model_id": None, "preprocessing": {}, "versions": {}}


def _links(sources: Sources, options: Options) -> list[Link]:
    """The pages that this atlas will have, of those that every page leads to."""
    known = {
        Link("Overview", "index.html"): True,
        Link("Maps", "maps.html"): bool(sources.layers()),
        Link("Images", "images.html"): bool(options.images and sources.run.manifest(sources.occlusion)),
        Link("Run", "run.html"): True,
        Link("Comparison", "comparison.html"): options.against is not None,
    }
    return [link for link, there in known.items() if there]
