"""The whole pictures behind a table's cells, small: what a page needs to show where in an image a cell lies.

A row for each layer and image that the table of cells (top9, or groups) names there: the network's input pixels,
scaled down and kept as JPEG, and their place in the original image. `deconv` holds the patches; this the whole around
them, a few kilobytes an image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.runs import RunError, require_at_least_one
from pipeline.storage import Location

_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of pictures."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table of cells."""
    of: str = "top9"
    """Table whose images are kept: top9, groups, or one of their further names; for others give --name, too."""
    picture_px: int = 128
    """Largest side of a picture; a smaller input is kept as it is."""
    part_size: int = 256
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 64
    """Images that are handled together."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "picture_px", "part_size", "batch_size")


PICTURES = pa.schema(
    [
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("picture_jpeg", pa.binary(), "JPEG of the network's whole input, RGB, scaled down."),
        tables.column("picture_px", pa.int32(), "Side of the picture in pixels."),
        tables.column("input_px", pa.int32(), "Side of the network's input, in whose pixels top and left count."),
        tables.column("box_top", pa.float32(), "First row of the input in the original image's pixels."),
        tables.column("box_left", pa.float32(), "First column of the input in the original image's pixels."),
        tables.column("box_height", pa.float32(), "Height of the input in the original image's pixels."),
        tables.column("box_width", pa.float32(), "Width of the input in the original image's pixels."),
    ]
)
PART_SCHEMA = PICTURES.remove(PICTURES.get_field_index("layer"))


def slices(context: Context) -> list[str]:
    """The layers of the table of cells. Raises: RunError where it is missing, or of another model or images."""
    config: Config = context.config
    found = context.run.manifest(config.of)
    if not found:
        raise RunError(
            f"there is no table {config.of} in {context.run.location}: run jobs/{config.of.split('-')[0]}.py first"
        )
    layers = config.layers or tuple(found)
    if unknown := [layer for layer in layers if layer not in found]:
        raise RunError(f"{config.of} has no layer {', '.join(unknown)}; it has {', '.join(found)}")
    for layer in layers:
        _require_same_images(context, layer)
    return list(layers)


def _require_same_images(context: Context, layer: str) -> None:
    made = tables.read(context.run.slice(context.config.of, layer), list(context.identity)).slice(0, 1).to_pylist()
    if made and made[0] != context.identity:
        raise RunError(
            f"{context.config.of} was made of {made[0]}, and this run and these shards are {context.identity}: "
            "give the run and the --data it was made of"
        )


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The images are those of this slice of the table of cells."""
    entry = context.run.manifest(context.config.of).get(layer, {})
    return {context.config.of: {name: entry.get(name) for name in ("fingerprint", "rows")}}


def samples(context: Context, layers: list[str]) -> pa.Table:
    """The images that these layers' cells lie in."""
    keys = pa.concat_arrays([_keys(context, layer) for layer in layers])
    rows = context.index.split(context.split)
    return rows.filter(pc.is_in(rows["key"], keys))


def _keys(context: Context, layer: str) -> pa.Array:
    keys = tables.read(context.run.slice(context.config.of, layer), ["key"])["key"]
    return keys.combine_chunks().unique().cast(pa.string())


def expected_rows(context: Context, layer: str, skipped: set[str]) -> int:
    """A row for each image, but for those that could not be read."""
    return sum(key not in skipped for key in _keys(context, layer).to_pylist())


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """The pictures of a batch; the network is not run."""
    rows = [_row(context, picture) for picture in batch.pictures]
    return tables.conform({name: [row[name] for row in rows] for name in PART_SCHEMA.names}, PART_SCHEMA)


def _row(context: Context, picture: Picture) -> dict[str, Any]:
    sample, side = picture.sample, picture.pixels.shape[0]
    image = Image.fromarray(picture.pixels)
    image.thumbnail((context.config.picture_px,) * 2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    box = picture.crop.to_original(0, 0, side, side)
    return {
        **context.identity,
        "key": sample.key,
        "shard": sample.shard,
        "label": sample.label,
        "label_name": context.index.label_name(sample.label),
        "picture_jpeg": buffer.getvalue(),
        "picture_px": image.width,
        "input_px": side,
        **{f"box_{name}": box[i] for i, name in enumerate(("top", "left", "height", "width"))},
    }


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([PART_SCHEMA.empty_table(), *results])


def fold(context: Context, parts: list[Location], layers: list[str]) -> Iterator[Finished]:
    """A file for each layer, in index order."""
    for layer in layers:
        yield Finished("pictures", layer, PICTURES, _of_layer(context, parts, layer))


def _of_layer(context: Context, parts: list[Location], layer: str) -> Iterator[pa.Table]:
    keys = _keys(context, layer)
    for part in parts:
        rows = tables.read(part)
        rows = rows.filter(pc.is_in(rows["key"], keys))
        yield rows.add_column(PICTURES.get_field_index("layer"), tables.LAYER, pa.array([layer] * len(rows))).cast(
            PICTURES
        )


ANALYSIS = Analysis(
    table="pictures",
    tables=("pictures",),
    module=__name__,
    part_schema=lambda config: PART_SCHEMA,
    slices=slices,
    sources=sources,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    expected_rows=expected_rows,
)
