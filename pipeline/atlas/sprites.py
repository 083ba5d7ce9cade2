"""One picture for each feature map: the block of its projections beside the block of its patches (figure 2).

A file for each map and not one for each tile keeps their number bounded, and a browser loads only the maps that come
into view. Pixels are streamed from the deconv table a row group at a time, so memory does not grow with the layer.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import tables
from pipeline.drawing.tiles import Box, Pixels, around_grey, patch_of, tile
from pipeline.projections import relative
from pipeline.storage import Location

ACROSS = 3
"""Tiles a row and rows a block: the paper's nine."""
SHOWN = ACROSS * ACROSS
THUMBNAILS_ACROSS = 6
THUMBNAILS = 2 * THUMBNAILS_ACROSS
GAP = 2
MIDDLE = 14
THREADS = 2
TILE_COLUMNS = ["feature_map", "rank", "top", "left", "height", "width", "projection", "projection_height"]
TILE_COLUMNS += ["projection_width", "projection_scale", "patch_png"]


@dataclass(frozen=True)
class Sprite:
    """A feature map's picture, as a WebP file, and its strongest projection for the layer's thumbnail."""

    feature_map: int
    data: bytes
    first: Pixels


def size(tile_px: int) -> tuple[int, int]:
    """Width and height of a sprite."""
    block = ACROSS * tile_px + (ACROSS - 1) * GAP
    return 2 * block + MIDDLE, block


def place(tile_px: int, number: int, *, patch: bool) -> tuple[int, int]:
    """Left and top of the n-th projection, or patch, on a sprite."""
    row, col = divmod(number, ACROSS)
    start = (size(tile_px)[0] + MIDDLE) // 2 if patch else 0
    return start + col * (tile_px + GAP), row * (tile_px + GAP)


def sprites(table: Location, tile_px: int, input_px: int) -> Iterator[Sprite]:
    """The pictures of all feature maps of a layer's deconv file, in its order, for a network's input of `input_px`."""
    with ThreadPoolExecutor(THREADS) as threads:  # decoding and encoding release the interpreter lock
        for rows in _whole_maps(table):
            yield from threads.map(lambda piece: _sprite(piece, tile_px, input_px), _split(rows))


def _whole_maps(table: Location) -> Iterator[pa.Table]:
    """The rows, a row group at a time; a map that two row groups share is held back until it is whole."""
    with table.open() as file:
        parquet = tables.opened(file)
        held: pa.Table | None = None
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=TILE_COLUMNS)
            rows = rows if held is None else pa.concat_tables([held, rows])
            if not rows.num_rows:
                continue
            maps = rows["feature_map"].to_numpy()
            whole = int(np.searchsorted(maps, maps[-1]))
            held = rows.slice(whole)
            if whole:
                yield rows.slice(0, whole)
        if held is not None:
            yield held


def _split(rows: pa.Table) -> list[pa.Table]:
    """A table for each feature map; the rows are sorted by it."""
    starts = np.unique(rows["feature_map"].to_numpy(), return_index=True)[1].tolist()
    ends = [*starts[1:], rows.num_rows]
    return [rows.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _sprite(rows: pa.Table, tile_px: int, input_px: int) -> Sprite:
    width, height = size(tile_px)
    sheet = np.zeros((height, width, 4), dtype=np.uint8)
    batches = rows.slice(0, SHOWN).combine_chunks().to_batches()
    pairs = [tiles(row, tile_px, input_px) for batch in batches for row in rows_of(batch)]
    for number, pair in enumerate(pairs):
        for patch, pixels in enumerate(pair):
            left, top = place(tile_px, number, patch=bool(patch))
            sheet[top : top + tile_px, left : left + tile_px] = pixels
    return Sprite(rows["feature_map"][0].as_py(), webp(Image.fromarray(sheet)), pairs[0][0])


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, object]]:
    """Rows as dictionaries, with lists of numbers as arrays: a detour over Python floats would take minutes."""
    scalars = batch.drop_columns(["projection"]).to_pylist()
    for row, stored in zip(scalars, batch["projection"], strict=True):
        listed = pa.types.is_list(batch["projection"].type)
        yield {**row, "projection": stored.values.to_numpy() if listed else stored.as_py()}


def tiles(row: dict[str, object], tile_px: int, input_px: int) -> tuple[Pixels, Pixels]:
    """Projection and patch of a row with the columns TILE_COLUMNS, as tiles."""
    box = Box(*(int(str(row[side])) for side in ("top", "left", "height", "width"))).within(input_px)
    return tile(around_grey(relative(row)), box, tile_px), tile(patch_of(row), box, tile_px)


def thumbnail(chosen: list[Pixels]) -> bytes:
    """Two rows of tiles as a WebP file, of one size however few they are: the face of a layer."""
    side = chosen[0].shape[0]
    sheet = np.zeros((2 * side + GAP, THUMBNAILS_ACROSS * (side + GAP) - GAP, 4), dtype=np.uint8)
    for place, pixels in enumerate(chosen):
        top, left = (step * (side + GAP) for step in divmod(place, THUMBNAILS_ACROSS))
        sheet[top : top + side, left : left + side] = pixels
    return webp(Image.fromarray(sheet))


def webp(image: Image.Image) -> bytes:
    """A WebP file, with loss: a tenth of a PNG's size, and the same bytes each time."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=82, method=2)
    return buffer.getvalue()
