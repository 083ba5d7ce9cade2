"""Boxes that tables have on images, drawn on the image pages and on the tables' own pages: a line for each kind of box.

Tables of one analysis are drawn together: what was found over what is there. Images are told apart by their data_id as
well as by their key, since two sets of images may have the same keys.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.atlas.catalogue import ResultTable, TableFile, in_words, within
from pipeline.atlas.site import number
from pipeline.runs import Run
from zfnet import images
from zfnet.detection import Outcome

IMAGES_SHOWN = 24
_OF_EACH_FATE = 6
_MOST = 12
_FAINTEST = 0.3
_SIDES = ("top", "left", "height", "width")


def _place(prefix: str) -> tuple[str, str, str, str]:
    top, left, height, width = (f"{prefix}_{side}" for side in _SIDES)
    return top, left, height, width


@dataclass(frozen=True, kw_only=True)
class BoxesOf:
    """Which columns of a table are a box."""

    table: str
    together: str
    """The analysis that it is a table of: its tables are drawn on each other's pages."""
    name: str
    """What such a box is."""
    style: int
    """How it is drawn: atlas.css has a line for each."""
    sides: tuple[str, str, str, str] = _place("box")
    """Columns of its first row, first column, height and width; a row where one is null has no box."""
    original: bool = True
    """Whether these are pixels of the original image, not of the network's input."""
    caption: tuple[str, ...] = ()
    """Columns that are said of it."""
    apart: tuple[str, tuple[str, ...]] | None = None
    """A column whose values are kinds of their own, and its values: the first has this style, each one the next."""
    fate: str | None = None
    """A column that says what became of the image, or of an object of it: pages find images by it."""
    strength: str | None = None
    """Of an image the boxes with the largest values of it are drawn, weaker ones fainter; without it the first ones."""
    shown: bool = True
    """Whether they are drawn before they are asked for."""


def _windows(analysis: str) -> tuple[BoxesOf, BoxesOf]:
    """The surest windows of an analysis, and the box that each predicts; drawn when they are asked for."""
    window = BoxesOf(
        table=f"{analysis}_windows",
        together=analysis,
        name="window",
        style=8,
        sides=_place("window"),
        caption=("class_name", "confidence", "scale"),
        strength="confidence",
        shown=False,
    )
    return window, replace(window, name="a window’s own box", style=9, sides=_place("box"))


BOXES = (
    BoxesOf(
        table="object_occlusion",
        together="object_occlusion",
        name="object",
        style=1,
        sides=_place("object"),
        original=False,
        caption=("object_drop", "elsewhere_drop"),
    ),
    *_windows("localization"),
    BoxesOf(
        table="localization_images",
        together="localization",
        name="object",
        style=1,
        caption=("label_name", "outcome"),
        fate="outcome",
    ),
    BoxesOf(
        table="localization",
        together="localization",
        name="guess",
        style=7,
        caption=("rank", "class_name", "score"),
        strength="score",
    ),
    *_windows("detection"),
    BoxesOf(
        table="detection_objects",
        together="detection",
        name="object",
        style=1,
        caption=("class_name", "fate"),
        fate="fate",
    ),
    BoxesOf(
        table="detection",
        together="detection",
        name="detection",
        style=2,
        caption=("class_name", "score", "outcome"),
        apart=("outcome", get_args(Outcome)),
        strength="score",
    ),
)
"""A line for each kind of box; what comes later is drawn over what came before."""


@dataclass(frozen=True)
class Box:
    """A box on an image; it may leave the image."""

    name: str
    style: int
    shown: bool
    top: float
    left: float
    height: float
    width: float
    caption: str
    opacity: float


@dataclass(frozen=True)
class Kind:
    """Boxes of one name and style, which a page shows or hides together."""

    name: str
    style: int
    shown: bool
    count: int


@dataclass(frozen=True)
class Place:
    """(top, left, height, width) of something in an image's own pixels."""

    top: float
    left: float
    height: float
    width: float

    def of(self, sides: Sequence[float], px: int) -> tuple[float, ...]:
        """A box in the image's pixels, where this place is drawn px pixels high and wide."""
        down, across = px / self.height, px / self.width
        return (sides[0] - self.top) * down, (sides[1] - self.left) * across, sides[2] * down, sides[3] * across

    def back(self, sides: Sequence[float], px: int) -> tuple[float, ...]:
        """A box on this place, drawn px pixels high and wide, in the image's pixels."""
        down, across = self.height / px, self.width / px
        return self.top + sides[0] * down, self.left + sides[1] * across, sides[2] * down, sides[3] * across


@dataclass(frozen=True)
class Picture:
    """A small picture of an image or of the network's input, from the tables pictures."""

    jpeg: bytes
    place: Place
    input_px: int | None
    """Side of the input; None: this is the whole image."""


@dataclass(frozen=True)
class Boxed:
    """An image with its boxes, in its own pixels."""

    key: str
    picture: Picture
    boxes: tuple[Box, ...]
    fates: tuple[str, ...]
    """What became of it, or of its objects."""


@dataclass(frozen=True)
class Gallery:
    """Images with the boxes of a table and of those that belong to it."""

    images: tuple[Boxed, ...]
    kinds: tuple[Kind, ...]
    pictures: str
    """The table of pictures that would have them."""
    of: str
    """The table that those pictures are of."""

    @property
    def fates(self) -> list[str]:
        """All that became of the images, in order."""
        return sorted({fate for image in self.images for fate in image.fates})


def kinds(boxes: Iterable[Box]) -> tuple[Kind, ...]:
    """The kinds of these boxes, in the order of their styles."""
    counted = Counter((box.style, box.name, box.shown) for box in boxes)
    return tuple(Kind(name, style, shown, count) for (style, name, shown), count in sorted(counted.items()))


def on_inputs(
    run: Run, found: Sequence[ResultTable], keys: Sequence[str], data_id: str | None, inputs: Inputs
) -> dict[str, list[Box]]:
    """Boxes by the image's key, in pixels of the network's input."""
    pictures = dict(_pictures(run, found, data_id, keys))
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for known in BOXES:
        for table in (table for table in found if table.kind == known.table):
            for key, row, opacity in _rows(run, known, table, data_id, keys):
                sides = _sides(known, row)
                if sides and known.original and key in pictures:
                    sides = inputs.place(pictures[key]).of(sides, inputs.px)
                if sides and (key in pictures or not known.original):
                    boxes[key].append(_box(known, row, sides, opacity))
    return boxes


@dataclass(frozen=True)
class Inputs:
    """The network's input: the middle of a resized image."""

    resize_px: int
    px: int

    def place(self, picture: Picture) -> Place:
        """Where the input lies in the image."""
        if picture.input_px is not None:
            return picture.place
        size = round(picture.place.width), round(picture.place.height)
        return Place(*images.input_place(size, self.resize_px, self.px).to_original(0, 0, self.px, self.px))


def gallery(run: Run, found: Sequence[ResultTable], table: ResultTable) -> Gallery | None:
    """Images with boxes: the first ones of which there are pictures, and some for each thing that became of them.

    None for a table without boxes; without images where there are no pictures.
    """
    lines = _lines(found, table)
    if not lines or not table.files:
        return None
    data_id = table.files[0].data_id
    pictured = {key for file in _files_of_pictures(found, data_id) for key in _column(run, file, "key")}
    fates = _fates(run, lines)
    order = fates or dict.fromkeys(key for file in table.files for key in _column(run, file, "key"))
    keys = _chosen([key for key in order if key in pictured], fates)
    pictures = dict(_pictures(run, found, data_id, keys))
    boxes: defaultdict[str, list[Box]] = defaultdict(list)
    for known, other in lines:
        for key, row, opacity in _rows(run, known, other, data_id, keys):
            picture, sides = pictures[key], _sides(known, row)
            if sides and not known.original:
                sides = picture.place.back(sides, picture.input_px) if picture.input_px else None
            if sides:
                boxes[key].append(_box(known, row, sides, opacity))
    shown = tuple(Boxed(key, pictures[key], tuple(boxes[key]), tuple(fates.get(key, ()))) for key in keys)
    name = lines[-1][1].name
    return Gallery(shown, kinds(box for image in shown for box in image.boxes), f"pictures-{name}", name)


def _lines(found: Sequence[ResultTable], table: ResultTable) -> list[tuple[BoxesOf, ResultTable]]:
    """The kinds of boxes of the analysis that a table belongs to, with their tables, made under the same --name."""
    analysis = next((known.together for known in BOXES if known.table == table.kind), None)
    suffix = table.name.removeprefix(table.kind)
    by_name = {other.name: other for other in found}
    lines = [(known, by_name.get(known.table + suffix)) for known in BOXES if known.together == analysis]
    return [(known, other) for known, other in lines if other is not None]


def _fates(run: Run, lines: list[tuple[BoxesOf, ResultTable]]) -> dict[str, list[str]]:
    """What became of each image, or of its objects, by key, in the table's order."""
    fates: defaultdict[str, list[str]] = defaultdict(list)
    for known, table in lines:
        for file in table.files if known.fate else ():
            for key, fate in zip(_column(run, file, "key"), _column(run, file, str(known.fate)), strict=True):
                if fate is not None and fate not in fates[key]:
                    fates[key].append(fate)
    return fates


def _chosen(keys: list[str], fates: dict[str, list[str]]) -> list[str]:
    """The first keys, and the first ones of each fate."""
    chosen = set(keys[:IMAGES_SHOWN])
    for fate in {fate for some in fates.values() for fate in some}:
        chosen |= set([key for key in keys if fate in fates[key]][:_OF_EACH_FATE])
    return [key for key in keys if key in chosen]


def _column(run: Run, file: TableFile, name: str) -> list[Any]:
    values: list[Any] = tables.read(within(run.location, file.path), [name])[name].to_pylist()
    return values


def _rows(
    run: Run, known: BoxesOf, table: ResultTable, data_id: str | None, keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any], float]]:
    """The rows of these images that are drawn, with their keys and opacity; none of a table without these columns."""
    needed = {"key", *known.sides, *known.caption, *([known.strength] if known.strength else [])}
    counted: Counter[str] = Counter()
    largest: dict[str, float] = {}
    for file in (file for file in table.files if file.is_of(data_id)):
        location = within(run.location, file.path)
        with location.open() as opened:
            if not needed <= set(tables.opened(opened).schema_arrow.names):
                continue
        rows = tables.read(location, sorted(needed), pc.field("key").isin(pa.array(keys, pa.string())))
        if known.strength:
            rows = rows.sort_by([(known.strength, "descending")])
        for row in rows.to_pylist():
            counted[row["key"]] += 1
            if counted[row["key"]] <= _MOST:
                strength = row[known.strength] if known.strength else 1.0
                yield row["key"], row, _opacity(strength, largest.setdefault(row["key"], strength))


def _opacity(strength: float, largest: float) -> float:
    """1 for the image's strongest box, less for weaker ones, and always to be seen."""
    return max(_FAINTEST, math.sqrt(strength / largest)) if largest > 0 else 1.0


def _sides(known: BoxesOf, row: dict[str, Any]) -> tuple[float, ...] | None:
    sides = tuple(math.nan if row[side] is None else float(row[side]) for side in known.sides)
    return None if any(map(math.isnan, sides)) else sides


def _box(known: BoxesOf, row: dict[str, Any], sides: Sequence[float], opacity: float) -> Box:
    name, style = known.name, known.style
    if known.apart:
        column, values = known.apart
        name = f"{name}: {row[column].replace('_', ' ')}"
        style += values.index(row[column])
    caption = ", ".join(f"{column.replace('_', ' ')} {_said(row[column])}" for column in known.caption)
    top, left, height, width = sides
    return Box(name, style, known.shown, top, left, height, width, caption, opacity)


def _said(value: Any) -> str:
    return number(value) if isinstance(value, float) else in_words(value)


def _files_of_pictures(found: Sequence[ResultTable], data_id: str | None) -> list[TableFile]:
    return [file for table in found if table.kind == "pictures" for file in table.files if file.is_of(data_id)]


def _pictures(
    run: Run, found: Sequence[ResultTable], data_id: str | None, keys: Sequence[str]
) -> Iterator[tuple[str, Picture]]:
    """Small pictures by key, from all tables of pictures; whole images last, which are better than inputs."""
    pictures: list[tuple[str, Picture]] = []
    wanted = pc.field("key").isin(pa.array(keys, pa.string()))
    for file in _files_of_pictures(found, data_id):
        columns = ["key", "picture_jpeg", "input_px", *_place("box")]
        for row in tables.read(within(run.location, file.path), columns, wanted).to_pylist():
            place = Place(*(row[side] for side in _place("box")))
            pictures.append((row["key"], Picture(row["picture_jpeg"], place, row["input_px"])))
    yield from sorted(pictures, key=lambda one: one[1].input_px is None)
