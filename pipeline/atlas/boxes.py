"""Boxes that tables have on images, drawn on the image pages and on the tables' own pages: one line for each table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipeline import tables
from pipeline.atlas import views
from pipeline.atlas.catalogue import ResultTable, in_words, within
from pipeline.atlas.site import number
from pipeline.runs import Run

IMAGES_SHOWN = 24
_LOOKED_AT = 1000
_PLACE = ("box_top", "box_left", "box_height", "box_width")


@dataclass(frozen=True, kw_only=True)
class BoxesOf:
    """Which columns of a table are a box."""

    table: str
    name: str
    """What such a box is."""
    sides: tuple[str, str, str, str]
    """Columns of its first row, first column, height and width; a row where one is null has no box."""
    original: bool = False
    """Whether these are pixels of the original image, not of the network's input."""
    caption: tuple[str, ...] = ()
    """Columns that are said of it."""


BOXES = (
    BoxesOf(
        table="object_occlusion",
        name="object",
        sides=("object_top", "object_left", "object_height", "object_width"),
        caption=("object_drop", "elsewhere_drop"),
    ),
    BoxesOf(table="localization", name="guess", sides=_PLACE, original=True, caption=("class_name", "score")),
    BoxesOf(table="detection", name="detection", sides=_PLACE, original=True, caption=("class_name", "score")),
)
"""A line for each table that has boxes."""


@dataclass(frozen=True)
class Box:
    """A box on an image, in pixels of the network's input; it may leave the image."""

    name: str
    style: int
    top: float
    left: float
    height: float
    width: float
    caption: str


@dataclass(frozen=True)
class Picture:
    """A small whole picture, from the tables pictures."""

    jpeg: bytes
    input_px: int
    place: tuple[float, float, float, float]
    """(top, left, height, width) of the input in the original image's pixels."""

    def from_original(self, box: tuple[float, ...]) -> tuple[float, ...]:
        """A box in the original's pixels, in pixels of the input."""
        down, across = self.input_px / self.place[2], self.input_px / self.place[3]
        return (box[0] - self.place[0]) * down, (box[1] - self.place[1]) * across, box[2] * down, box[3] * across


@dataclass(frozen=True)
class Boxed:
    """An image with its boxes."""

    key: str
    picture: Picture
    boxes: tuple[Box, ...]


def on_images(run: Run, found: Sequence[ResultTable], keys: Sequence[str]) -> dict[str, list[Box]]:
    """Boxes by the image's key."""
    pictures = _pictures(run, found, keys)
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for table in found:
        for key, some in _boxes(run, table, keys, pictures).items():
            boxes[key] += some
    return boxes


def gallery(run: Run, found: Sequence[ResultTable], table: ResultTable) -> list[Boxed]:
    """Of the first images of a table with boxes, those of which there are pictures."""
    if not any(known.table == table.kind for known in BOXES):
        return []
    frame = views.read(run, table, ["key"])
    keys = [] if frame is None else list(dict.fromkeys(frame["key"]))[:_LOOKED_AT]
    pictures = _pictures(run, found, keys)
    shown = [key for key in keys if key in pictures][:IMAGES_SHOWN]
    boxes = _boxes(run, table, shown, pictures)
    return [Boxed(key, pictures[key], tuple(boxes.get(key, ()))) for key in shown]


def _boxes(run: Run, table: ResultTable, keys: Sequence[str], pictures: dict[str, Picture]) -> dict[str, list[Box]]:
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for style, known in enumerate(BOXES, start=1):
        if known.table != table.kind:
            continue
        frame = views.read(run, table, list(dict.fromkeys(["key", *known.sides, *known.caption])))
        rows = [] if frame is None else frame[frame["key"].isin(list(keys))].to_dict("records")
        for row in rows:
            box = _box(known, style, {str(name): value for name, value in row.items()}, pictures.get(row["key"]))
            boxes[row["key"]] += [box] if box else []
    return boxes


def _box(known: BoxesOf, style: int, row: dict[str, Any], picture: Picture | None) -> Box | None:
    sides = tuple(float(row[side]) for side in known.sides)
    if any(map(math.isnan, sides)) or (known.original and picture is None):
        return None
    if known.original and picture is not None:
        top, left, height, width = picture.from_original(sides)
    else:
        top, left, height, width = sides
    caption = ", ".join(f"{name.replace('_', ' ')} {_said(row[name])}" for name in known.caption)
    return Box(known.name, style, top, left, height, width, caption)


def _said(value: Any) -> str:
    return number(value) if isinstance(value, float) else in_words(value)


def _pictures(run: Run, found: Sequence[ResultTable], keys: Sequence[str]) -> dict[str, Picture]:
    """Small pictures by key, from all tables of pictures."""
    pictures: dict[str, Picture] = {}
    wanted = pc.field("key").isin(list(keys))
    for file in (file for table in found if table.kind == "pictures" for file in table.files):
        columns = ["key", "picture_jpeg", "input_px", *_PLACE]
        for row in tables.read(within(run.location, file.path), columns, wanted).to_pylist():
            top, left, height, width = (row[side] for side in _PLACE)
            pictures[row["key"]] = Picture(row["picture_jpeg"], row["input_px"], (top, left, height, width))
    return pictures
