"""Boxes that tables have on images, to be drawn on the image pages: one line for each table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.atlas import views
from pipeline.atlas.catalogue import ResultTable, in_words
from pipeline.runs import Run


@dataclass(frozen=True, kw_only=True)
class BoxesOf:
    """Which columns of a table are a box, in pixels of the network's input."""

    table: str
    name: str
    """What such a box is."""
    sides: tuple[str, str, str, str]
    """Columns of its first row, first column, height and width; a row where one is null has no box."""
    caption: tuple[str, ...] = ()
    """Columns that are said of it."""


BOXES = (
    BoxesOf(
        table="object_occlusion",
        name="object",
        sides=("object_top", "object_left", "object_height", "object_width"),
        caption=("object_drop", "elsewhere_drop"),
    ),
)
"""Tables of localisation and detection get a line here."""


@dataclass(frozen=True)
class Box:
    """A box on an image."""

    name: str
    style: int
    top: float
    left: float
    height: float
    width: float
    caption: str


def on_images(run: Run, found: Sequence[ResultTable], keys: Sequence[str]) -> dict[str, list[Box]]:
    """Boxes by the image's key."""
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for style, known in enumerate(BOXES, start=1):
        for table in (table for table in found if table.kind == known.table):
            frame = views.read(run, table, ["key", *known.sides, *known.caption])
            for row in [] if frame is None else frame[frame["key"].isin(list(keys))].dropna().to_dict("records"):
                caption = ", ".join(f"{name} {in_words(row[name])}" for name in known.caption)
                top, left, height, width = (float(row[side]) for side in known.sides)
                boxes[row["key"]].append(Box(known.name, style, top, left, height, width, caption))
    return boxes
