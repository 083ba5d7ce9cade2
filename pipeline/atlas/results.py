"""Table pages: what every table holds, with its documented columns, its first rows and the chart that is natural."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from pipeline.atlas import boxes, catalogue, confusion, views
from pipeline.atlas.boxes import Boxed
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.site import Site
from pipeline.atlas.sprites import webp
from pipeline.runs import Run
from pipeline.storage import Location

PICTURES_SHOWN = 12
_THUMBNAIL_PX = 128
_PICTURES = {"image_png", "patch_png", "picture_jpeg"}


def write(site: Site, run: Run, found: Sequence[ResultTable]) -> None:
    """A page for each table."""
    for table in found:
        rows = list(catalogue.first_rows(run, table))
        site.write_page(
            table.page,
            "table.html.j2",
            run_name=run.location.name,
            table=table,
            line=pandas_line(run.location, table),
            file_url=lambda path: quote(f"../{path}"),
            columns=catalogue.columns(run, table),
            charts=views.charts(run, table),
            confusion=confusion.of(run, table),
            boxed=_boxed(site, run, found, table),
            heads=list(rows[0]) if rows else [],
            rows=[
                [_cell(site, table, place, name, value) for name, value in row.items()]
                for place, row in enumerate(rows)
            ],
        )


def _boxed(site: Site, run: Run, found: Sequence[ResultTable], table: ResultTable) -> list[tuple[Boxed, str]]:
    """Images with the table's boxes, and the paths of their pictures."""
    shown = []
    for place, boxed in enumerate(boxes.gallery(run, found, table)):
        path = f"assets/tables/{table.name}-boxed-{place}.jpg"
        site.write(path, boxed.picture.jpeg)
        shown.append((boxed, path))
    return shown


def pandas_line(run: Location, table: ResultTable) -> str:
    """What reads the table."""
    return f"pd.read_parquet({f'{run}/{table.path}'!r})"


def _cell(site: Site, table: ResultTable, place: int, name: str, value: Any) -> tuple[str, str | None]:
    """A value in words, and the path of its picture where it is one."""
    if name not in _PICTURES or place >= PICTURES_SHOWN or not value.is_valid:
        return catalogue.in_words(value), None
    image = Image.open(io.BytesIO(value.as_py())).convert("RGB")
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    path = f"assets/tables/{table.name}-{place}-{name}.webp"
    site.write(path, webp(Image.fromarray(np.asarray(image))))
    return catalogue.in_words(value), path
