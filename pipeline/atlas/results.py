"""Table pages: what every table holds, with its documented columns, its first rows and the chart that is natural."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from PIL import Image

from pipeline.atlas import boxes, catalogue, confusion, table_charts
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.class_maps import ImageMaps
from pipeline.atlas.pages import COLOUR_BAR
from pipeline.atlas.site import Site
from pipeline.atlas.sprites import webp
from pipeline.drawing.heatmaps import heat
from pipeline.runs import Run
from pipeline.storage import Location

PICTURES_SHOWN = 12
_THUMBNAIL_PX = 128
_PICTURES = {"image_png", "patch_png", "picture_jpeg"}
_GRIDS = {"probability_map", "activation_map"}
_SHAPES = (("grid_rows", "grid_cols"), ("map_height", "map_width"))


def write(site: Site, run: Run, found: Sequence[ResultTable], maps_of_classes: Sequence[ImageMaps]) -> None:
    """A page for each table."""
    for table in found:
        rows = list(catalogue.first_rows(run, table))
        gallery = boxes.gallery(run, found, table)
        for place, boxed in enumerate(gallery.images if gallery else ()):
            site.write(_picture_path(table, place), boxed.picture.jpeg)
        site.write_page(
            table.page,
            "table.html.j2",
            run_name=run.location.name,
            table=table,
            line=pandas_line(run.location, table),
            file_url=lambda path: quote(f"../{path}"),
            columns=catalogue.columns(run, table),
            charts=table_charts.charts(run, table),
            confusion=confusion.of(run, table),
            gallery=gallery,
            picture_path=partial(_picture_path, table),
            run_path=str(run.location),
            maps_of_classes=[one for one in maps_of_classes if one.table == table.name],
            colour_bar=COLOUR_BAR,
            heads=list(rows[0]) if rows else [],
            rows=[[_cell(site, table, place, name, row) for name in row] for place, row in enumerate(rows)],
        )


def _picture_path(table: ResultTable, place: int) -> str:
    return f"assets/tables/{table.name}-boxed-{place}.jpg"


def pandas_line(run: Location, table: ResultTable) -> str:
    """What reads the table."""
    return f"pd.read_parquet({f'{run}/{table.path}'!r})"


def _cell(site: Site, table: ResultTable, place: int, name: str, row: dict[str, Any]) -> tuple[str, str | None]:
    """A value in words, and the path of its picture where it is one, or a grid of numbers."""
    value = row[name]
    shown = _picture(name, row) if place < PICTURES_SHOWN and value.is_valid else None
    path = f"assets/tables/{table.name}-{place}-{name}.webp"
    if shown is not None:
        site.write(path, webp(shown))
    return catalogue.in_words(value), path if shown is not None else None


def _picture(name: str, row: dict[str, Any]) -> Image.Image | None:
    """The picture that a value is, small."""
    if name in _PICTURES:
        image = Image.open(io.BytesIO(row[name].as_py())).convert("RGB")
        image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        return image
    shapes = ([row[side].as_py() for side in sides] for sides in _SHAPES if set(sides) <= set(row))
    if name in _GRIDS and (shape := next(shapes, None)):
        image = Image.fromarray(heat(row[name].values.to_numpy().reshape(shape)).pixels)
        enlarged = max(1, _THUMBNAIL_PX // max(shape))
        return image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)
    return None
