"""The first page, and the lists of all images and all feature maps that it leads to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.atlas import history
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.layers import Face
from pipeline.atlas.pages import Picture, map_page
from pipeline.atlas.records import Sources
from pipeline.atlas.site import Site
from pipeline.storage import Location

PICTURES_SHOWN = 12


def write(
    site: Site,
    sources: Sources,
    facts: dict[str, Any],
    found: Sequence[ResultTable],
    faces: list[Face],
    pictures: list[Picture],
    against: str | None,
) -> Location:
    """Write the lists, then index.html, which is what makes a new atlas visible: after everything that it links to."""
    run = sources.run
    shared = {"run_name": run.location.name, "run_path": str(run.location), "sources": sources}
    if faces:
        site.write_page("maps.html", "maps.html.j2", **shared, faces=faces, map_page=map_page)
    if pictures:
        site.write_page("images.html", "images.html.j2", **shared, pictures=pictures)
    site.write_page(
        "index.html",
        "index.html.j2",
        **shared,
        facts=facts,
        faces=faces,
        pictures=pictures[:PICTURES_SHOWN],
        pictures_total=len(pictures),
        epochs=history.epochs(run, found),
        result_tables=found,
        against=against,
        deconv_missing=[face.layer.name for face in faces if face.layer.semantics is None and face.layer.alive],
    )
    return site.location / "index.html"
