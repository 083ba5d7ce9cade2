"""The evolution strip: a feature map's strongest cell, projected at chosen epochs of training (figure 4)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from pipeline import tables
from pipeline.atlas.records import Sources
from pipeline.atlas.sprites import GAP, TILE_COLUMNS, rows_of, tiles, webp
from pipeline.storage import Location

_COLUMNS = ["epoch", "layer", "activation", "image_changed", *TILE_COLUMNS]
_ROWS_TOGETHER = 16


@dataclass(frozen=True)
class Strip:
    """A feature map's picture over the epochs, as a WebP file: projections above, patches below."""

    feature_map: int
    data: bytes
    side: int
    epochs: tuple[int, ...]
    activations: tuple[float, ...]
    changed: tuple[bool, ...]
    """Whether another image than at the epoch before is the strongest; false for the first."""
    contrasts: tuple[float, ...]
    """Each projection's largest value over the largest of all epochs."""

    @property
    def width(self) -> int:
        """Of the file, in pixels."""
        return len(self.epochs) * (self.side + GAP) - GAP

    @property
    def height(self) -> int:
        """Of the file, in pixels."""
        return 2 * self.side + GAP

    def place(self, number: int, *, patch: bool) -> tuple[int, int]:
        """Left and top of the projection, or the patch, of the n-th epoch."""
        return number * (self.side + GAP), (self.side + GAP) if patch else 0


def strips(sources: Sources, layer: str, tile_px: int) -> Iterator[Strip]:
    """The strips of a layer's maps in their order; of every epoch only a few rows are held in memory."""
    locations = [sources.slice(sources.evolution, name) for name in sources.run.manifest(sources.evolution)]
    epochs = [_rows(location, layer) for location in locations if location is not None]
    together = heapq.merge(*epochs, key=lambda row: (row["feature_map"], row["epoch"]))
    for number, rows in groupby(together, key=lambda row: int(row["feature_map"])):
        yield _strip(number, list(rows), tile_px, sources.input_px)


def _rows(location: Location, layer: str) -> Iterator[dict[str, Any]]:
    """The rows of a layer in an epoch's file, which is sorted by feature map inside a layer."""
    with location.open() as file:
        parquet = tables.opened(file)
        place = parquet.schema_arrow.get_field_index("layer")
        ranges = [parquet.metadata.row_group(i).column(place).statistics for i in range(parquet.num_row_groups)]
        groups = [i for i, held in enumerate(ranges) if held is None or held.min <= layer <= held.max]
        for batch in parquet.iter_batches(_ROWS_TOGETHER, row_groups=groups, columns=_COLUMNS):
            yield from (row for row in rows_of(batch) if row["layer"] == layer)


def _strip(number: int, rows: list[dict[str, Any]], tile_px: int, input_px: int) -> Strip:
    scales = [float(row["projection_scale"]) for row in rows]
    strip = Strip(
        number,
        b"",
        tile_px,
        tuple(int(row["epoch"]) for row in rows),
        tuple(float(row["activation"]) for row in rows),
        tuple(bool(row["image_changed"]) for row in rows),
        tuple(scale / (max(scales) or 1.0) for scale in scales),
    )
    sheet = np.zeros((strip.height, strip.width, 4), dtype=np.uint8)
    for place, row in enumerate(rows):
        for patch, pixels in enumerate(tiles(row, tile_px, input_px)):
            left, top = strip.place(place, patch=bool(patch))
            sheet[top : top + tile_px, left : left + tile_px] = pixels
    return replace(strip, data=webp(Image.fromarray(sheet)))
