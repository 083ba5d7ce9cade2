"""The whole pictures behind a table's rows, small: what a page needs to show where in an image a cell or a box lies.

A row for each slice and image that another table (top9, groups, or any with a column key) names there: the network's
input pixels, or the whole image, scaled down and kept as JPEG, and their place in the original image. `deconv` holds
the patches; this the whole around them, a few kilobytes an image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context, Picture, centre_crops, read
from pipeline.runs import RunError, require_at_least_one
from pipeline.shards import Sample, Skipped
from pipeline.storage import Location
from zfnet import images

_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of pictures."""

    slices: tuple[str, ...] = ()
    """Slices of that table, as layers; default all."""
    of: str = "top9"
    """Table whose images are kept: any with a column key; for another than top9 give its name as --name, too."""
    whole: bool = False
    """The whole image, where boxes lie that are found in it, rather than the network's input, which is its middle."""
    picture_px: int = 128
    """Largest side of a picture; a smaller one is kept as it is."""
    part_size: int = 256
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 64
    """Images that are handled together."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "picture_px", "part_size", "batch_size")


_SLICE = tables.column("slice", pa.string(), "Slice of that table, whose images they are: a layer, an epoch, a split.")

PICTURES = tables.schema(
    "pictures",
    row="an image that another table names: the network's whole input, small",
    file="slice of that table",
    key=("slice", "key"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        _SLICE,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("picture_jpeg", pa.binary(), "JPEG of the network's input or of the whole image, RGB, small."),
        tables.column("picture_px", pa.int32(), "Longer side of the picture in pixels."),
        tables.or_null("input_px", pa.int32(), "Side of the network's input; null: this is the whole image."),
        tables.column("box_top", pa.float32(), "First row of the picture in the original image's pixels."),
        tables.column("box_left", pa.float32(), "First column of the picture in the original image's pixels."),
        tables.column("box_height", pa.float32(), "Height of the picture in the original image's pixels."),
        tables.column("box_width", pa.float32(), "Width of the picture in the original image's pixels."),
    ],
)
PART_SCHEMA = PICTURES.remove(PICTURES.get_field_index("slice"))


def slices(context: Context) -> list[str]:
    """Those of the other table. Raises: RunError where it is missing, or of another model or images."""
    config: Config = context.config
    found = context.run.manifest(config.of)
    if not found:
        raise RunError(
            f"there is no table {config.of} in {context.run.location}: run jobs/{config.of.split('-')[0]}.py first"
        )
    names = config.slices or tuple(found)
    if unknown := [name for name in names if name not in found]:
        raise RunError(f"{config.of} has no slice {', '.join(unknown)}; it has {', '.join(found)}")
    for name in names:
        _require_same_images(context, name)
    return list(names)


def _require_same_images(context: Context, name: str) -> None:
    location = context.run.slice(context.config.of, name)
    with location.open() as file:
        if "key" not in tables.opened(file).schema_arrow.names:
            raise RunError(f"{context.config.of} has no column key, so it names no images: give --of another table")
    made = tables.read(location, list(context.identity)).slice(0, 1).to_pylist()
    if made and made[0] != context.identity:
        raise RunError(
            f"{context.config.of} was made of {made[0]}, and this run and these shards are {context.identity}: "
            "give the run, the --data and the --split it was made of"
        )


def sources(context: Context, name: str) -> dict[str, Any]:
    """The images are those of this slice of the other table."""
    entry = context.run.manifest(context.config.of).get(name, {})
    return {context.config.of: {field: entry.get(field) for field in ("fingerprint", "rows")}}


def samples(context: Context, names: list[str]) -> pa.Table:
    """The images that these slices name."""
    keys = pa.concat_arrays([_keys(context, name) for name in names])
    rows = context.index.split(context.split)
    return rows.filter(pc.is_in(rows["key"], keys))


def _keys(context: Context, name: str) -> pa.Array:
    keys = tables.read(context.run.slice(context.config.of, name), ["key"])["key"]
    return keys.combine_chunks().unique().cast(pa.string())


def expected_rows(context: Context, name: str, skipped: set[str]) -> int:
    """A row for each image, but for those that could not be read."""
    return sum(key not in skipped for key in _keys(context, name).to_pylist())


def decode(context: Context, state: None, rows: pa.Table) -> tuple[list[Picture], list[Skipped]]:
    """What the network sees of these rows, or the whole images, small already."""
    return (
        read(context, rows, partial(_whole, context.config))
        if context.config.whole
        else centre_crops(context, state, rows)
    )


def _whole(config: Config, sample: Sample, number: int) -> Picture:
    image = images.decode(sample.image)
    width, height = image.size
    image.thumbnail((config.picture_px,) * 2)
    crop = images.Crop(
        image_height=height,
        image_width=width,
        resized_height=image.height,
        resized_width=image.width,
        top=0,
        left=0,
        size_px=min(image.size),
    )
    return Picture(sample, number, np.asarray(image), crop)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures that are handled together; they may be of many sizes."""

    pictures: list[Picture]


def as_batch(context: Context, state: None, pictures: list[Picture]) -> Pictures:
    """No network sees them: nothing is stacked."""
    return Pictures(pictures)


def map_batch(context: Context, state: None, batch: Pictures) -> pa.Table:
    """The pictures of a batch; the network is not run."""
    rows = [_row(context, picture) for picture in batch.pictures]
    return tables.conform({name: [row[name] for row in rows] for name in PART_SCHEMA.names}, PART_SCHEMA)


def _row(context: Context, picture: Picture) -> dict[str, Any]:
    sample = picture.sample
    height, width = picture.pixels.shape[:2]
    image = Image.fromarray(picture.pixels)
    image.thumbnail((context.config.picture_px,) * 2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    box = picture.crop.to_original(0, 0, height, width)
    return {
        **context.identity,
        "key": sample.key,
        "shard": sample.shard,
        "label": sample.label,
        "label_name": context.index.label_name(sample.label),
        "picture_jpeg": buffer.getvalue(),
        "picture_px": max(image.size),
        "input_px": None if context.config.whole else height,
        **{f"box_{name}": box[i] for i, name in enumerate(("top", "left", "height", "width"))},
    }


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([PART_SCHEMA.empty_table(), *results])


def fold(context: Context, parts: list[Location], names: list[str]) -> Iterator[Finished]:
    """A file for each slice, in index order."""
    for name in names:
        yield Finished("pictures", name, PICTURES, _of_slice(context, parts, name))


def _of_slice(context: Context, parts: list[Location], name: str) -> Iterator[pa.Table]:
    keys = _keys(context, name)
    for part in parts:
        rows = tables.read(part)
        rows = rows.filter(pc.is_in(rows["key"], keys))
        yield rows.add_column(PICTURES.get_field_index("slice"), _SLICE, pa.array([name] * len(rows))).cast(PICTURES)


ANALYSIS = Analysis(
    table="pictures",
    tables=("pictures",),
    selects=("slices",),
    module=__name__,
    part_schema=lambda config: PART_SCHEMA,
    slices=slices,
    sources=sources,
    samples=samples,
    decode=decode,
    batch=as_batch,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    expected_rows=expected_rows,
)
