"""Class maps of OverFeat's dense classification over the image at each scale: where a class is seen, and how surely.

A map has a cell for each window. It is drawn about the window's centre, as wide as the distance to the next window; the
window itself is wider.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from PIL import Image

from pipeline import tables
from pipeline.atlas.catalogue import ResultTable, TableFile, within
from pipeline.atlas.pages import COLOUR_BAR
from pipeline.atlas.records import with_arrays
from pipeline.atlas.site import Site
from pipeline.atlas.sprites import webp
from pipeline.drawing.heatmaps import colour_table, shares
from pipeline.runs import Run

IMAGES_SHOWN = 24
_CLASSES_SHOWN = 3
_NEEDED = {"key", "scale", "class", "rank", "probability_map", "window_px", "box_height", "step_height", "image_png"}


@dataclass(frozen=True)
class Panel:
    """A class map at one scale, and where it lies on the image at this scale, in its pixels."""

    scale: int
    image: str
    cells: str
    image_height: int
    image_width: int
    rows: int
    cols: int
    top: float
    left: float
    height: float
    width: float
    largest: float


@dataclass(frozen=True)
class ClassMaps:
    """A class of an image at every scale."""

    class_name: str
    rank: int
    probability: float
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class ImageMaps:
    """An image's class maps, in a table of them."""

    table: str
    data_id: str | None
    key: str
    label: str | None
    rows: tuple[ClassMaps, ...]


def write(site: Site, run: Run, found: Sequence[ResultTable]) -> list[ImageMaps]:
    """Draw the maps of the first images of every table of class maps; one image is held in memory."""
    drawn = []
    for table in (table for table in found if table.kind == "dense_maps"):
        images = ((file, rows) for file in table.files for rows in _images(run, file))
        for place, (file, rows) in enumerate(islice(images, IMAGES_SHOWN)):
            stem = f"assets/class-maps/{table.name}-{place}"
            drawn.append(_image(site, stem, table.name, file.data_id, rows))
    if drawn:
        site.write_image(COLOUR_BAR, colour_table()[None])
    return drawn


def _images(run: Run, file: TableFile) -> Iterator[list[dict[str, Any]]]:
    """The rows of each image, which stand together; none of a table of an older form."""
    with within(run.location, file.path).open() as opened:
        parquet = tables.opened(opened)
        if set(parquet.schema_arrow.names) >= _NEEDED:
            rows = (with_arrays(batch) for batch in parquet.iter_batches(batch_size=1))
            for _, some in groupby(rows, key=lambda row: row["key"]):
                yield list(some)


def _image(site: Site, stem: str, table: str, data_id: str | None, rows: list[dict[str, Any]]) -> ImageMaps:
    sizes = {row["scale"]: _write_scale(site, stem, row) for row in rows if row["image_png"] is not None}
    of_class: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["rank"], row["scale"])):
        of_class.setdefault(row["class"], []).append(row)
    own = rows[0]["label_name"]
    wanted = [some for some in of_class.values() if some[0]["rank"] <= _CLASSES_SHOWN or some[0]["class_name"] == own]
    maps = [
        ClassMaps(
            some[0]["class_name"],
            some[0]["rank"],
            some[0]["probability"],
            tuple(_panel(site, stem, row, *sizes[row["scale"]]) for row in some if row["scale"] in sizes),
        )
        for some in wanted
    ]
    return ImageMaps(table, data_id, rows[0]["key"], own, tuple(maps))


def _write_scale(site: Site, stem: str, row: dict[str, Any]) -> tuple[str, int, int]:
    """Write the image at a scale. Returns: where it is, its height and its width."""
    image = Image.open(io.BytesIO(row["image_png"])).convert("RGB")
    path = f"{stem}-scale{row['scale']}.webp"
    site.write(path, webp(image))
    return path, image.height, image.width


def _panel(site: Site, stem: str, row: dict[str, Any], image: str, image_height: int, image_width: int) -> Panel:
    values = row["probability_map"].reshape(row["map_height"], row["map_width"])
    cells = f"{stem}-scale{row['scale']}-rank{row['rank']}.png"
    site.write_image(cells, shares(values))
    high, wide = (row["window_px"] * row[f"step_{side}"] / row[f"box_{side}"] for side in ("height", "width"))
    return Panel(
        row["scale"],
        image,
        cells,
        image_height,
        image_width,
        values.shape[0],
        values.shape[1],
        (row["window_px"] - high) / 2,
        (row["window_px"] - wide) / 2,
        values.shape[0] * high,
        values.shape[1] * wide,
        float(np.max(values)),
    )
