"""Where the image's object is: five guesses of a class and a box each (OverFeat section 4).

The regressor predicts a box from every window at every scale; those of each scale's five best classes are merged within
their class. Three tables: `localization`, a row for each guess; `localization_images`, a row for each image with what
was wrong; `localization_windows`, the windows that the best guess's class was seen in. An image is right where one of
its guesses has its class and an IoU of one half or more with an object of it, the contest's criterion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.analyses import looked
from pipeline.analyses.looked import BOX, CLASS, PART, SLICE, WINDOW, Batch, Looking, Row, box_columns, names_of
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context
from pipeline.runs import Run, named, require_at_least_one
from pipeline.storage import Location
from zfnet.detection import RIGHT
from zfnet.localization import Found, Looker, Seen, best_guesses, merged, top_classes
from zfnet.merging import Edges, iou


@dataclass(frozen=True, kw_only=True)
class Config(Looking):
    """What decides the content of localization."""

    classes_per_scale: int = 5
    """Classes of each scale whose boxes are merged: the paper's k, which it does not give."""
    guesses: int = 5
    """Classes and boxes of an image at most."""
    of_a_class: int = 1
    """Of them of the same class at most, each with a box of its own: the contest allows up to five."""
    least: float = 0.05
    """Confidence of a window that takes part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "classes_per_scale", "guesses", "of_a_class")
        looked.require_confidence(self.least)


_HEAD = [*looked.HEAD, tables.LABEL, tables.LABEL_NAME]

LOCALIZATION = tables.schema(
    "localization",
    row="a guess of an image: a class and a box",
    file="",
    key=("key", "rank"),
    columns=[
        *_HEAD,
        tables.column("rank", pa.int32(), "Place among the image's guesses, from 1."),
        *CLASS,
        tables.column("score", pa.float64(), "Sum of the confidences of the windows that the box was merged from."),
        *BOX,
        tables.column("windows", pa.int32(), "Windows that the box was merged from."),
        tables.or_null("iou", pa.float64(), "Largest IoU with an object of the class; null where the image has none."),
    ],
)

IMAGES = tables.schema(
    "localization_images",
    row="an image, and what was wrong with its guesses",
    file="",
    key=("key",),
    columns=[
        *_HEAD,
        tables.column("objects", pa.int32(), "Usable boxes of the image's class."),
        tables.column("refused", pa.int32(), "Boxes that cannot be used: without an area, or of no known class."),
        tables.or_null(
            "outcome", pa.string(), "right, poor_overlap, confused_class or missed (no guess); null: no object."
        ),
        tables.or_null("right_rank", pa.int32(), "First guess that is right."),
        *(field.with_nullable(True) for field in BOX),
        tables.or_null("iou", pa.float64(), "Largest IoU of a guess of the image's class with an object of it."),
        tables.or_null(
            "centred_iou", pa.float64(), "Largest IoU of the centred box with an object of the image's class."
        ),
    ],
)
"""The box is the object's of the image's class: of several the one that a guess of the class comes nearest to.

The centred box has the mean height and width of all objects, as shares of their images', and the image's middle."""

WINDOWS = tables.schema(
    "localization_windows",
    row="a window that was sure of the class of the image's best guess",
    file="",
    key=("key", "scale", "mirrored", "window_top", "window_left"),
    columns=[
        *_HEAD,
        *WINDOW,
    ],
)


def part_schema(config: Config) -> pa.Schema:
    """Columns of a part: an image's lists."""
    return PART


def map_batch(context: Context, looker: Looker, batch: Batch) -> pa.Table:
    """Guesses of each image."""
    config: Config = context.config
    background = looked.background_of(context)

    def find(seen: list[Seen]) -> Found:
        classes = [top_classes(one, config.classes_per_scale, background) for one in seen]
        found = merged(seen, classes, config.least, config.threshold, config.average)
        return best_guesses(found, config.guesses, config.of_a_class)

    return looked.map_pictures(looker, batch, find, lambda found: found.classes[:1], config.least)


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """The three tables, in index order."""
    yield Finished("localization", SLICE, LOCALIZATION, (_guesses(context, row) for row in looked.rows(context, parts)))
    shares = [_shares(row) for row in looked.rows(context, parts)]
    size = np.concatenate([np.zeros((0, 2)), *shares])
    centred = size.mean(0) if len(size) else None
    images = (_image(context, row, centred) for row in looked.rows(context, parts))
    yield Finished("localization_images", SLICE, IMAGES, images)
    windows = (_windows(context, row) for row in looked.rows(context, parts, windows=True))
    yield Finished("localization_windows", SLICE, WINDOWS, windows)


def _head(context: Context, row: Row, count: int) -> dict[str, Any]:
    name = None if row.label is None else context.model.classes[row.label]
    return {**looked.head(context, row, count), "label": [row.label] * count, "label_name": [name] * count}


def _largest(boxes: Edges, truths: Edges) -> float | None:
    return float(iou(boxes[:, None], truths[None]).max()) if len(boxes) and len(truths) else None


def _truths(row: Row, class_: int | None) -> Edges:
    found: Edges = row.object_boxes[row.object_classes == (-1 if class_ is None else class_)]
    return found


def _guesses(context: Context, row: Row) -> pa.Table:
    found = row.found
    columns = {
        **_head(context, row, len(found.classes)),
        "rank": np.arange(len(found.classes)) + 1,
        "class": found.classes,
        "class_name": names_of(context, found.classes),
        "score": found.scores,
        **box_columns(found.boxes),
        "windows": found.windows,
        "iou": [
            _largest(box[None], _truths(row, int(class_)))
            for box, class_ in zip(found.boxes, found.classes, strict=True)
        ],
    }
    return tables.conform(columns, LOCALIZATION)


def _shares(row: Row) -> Edges:
    """Heights and widths of the objects of the image's class as shares of the image's."""
    boxes = _truths(row, row.label)
    found: Edges = (boxes[:, 2:] - boxes[:, :2]) / (row.height, row.width)
    return found


def _image(context: Context, row: Row, centred: Edges | None) -> pa.Table:
    truths = _truths(row, row.label)
    own = np.flatnonzero(row.found.classes == (-1 if row.label is None else row.label))
    overlaps = [_largest(row.found.boxes[[place]], truths) or 0.0 for place in own] if len(truths) else []
    right = [place for place, overlap in zip(own, overlaps, strict=True) if overlap >= RIGHT] if overlaps else []
    outcome = None
    if len(truths):
        others = "confused_class" if len(row.found.classes) else "missed"
        outcome = "right" if right else "poor_overlap" if len(own) else others
    box = None
    if centred is not None:
        middle = np.array([row.height, row.width]) / 2
        half = centred * (row.height, row.width) / 2
        box = np.concatenate([middle - half, middle + half])[None]
    columns = {
        "objects": len(truths),
        "refused": len(row.refused),
        "outcome": outcome,
        "right_rank": int(right[0]) + 1 if right else None,
        **_nearest(truths, row.found.boxes[own]),
        "iou": max(overlaps, default=None),
        "centred_iou": None if box is None else _largest(box, truths),
    }
    return tables.conform({**_head(context, row, 1), **{name: [value] for name, value in columns.items()}}, IMAGES)


def _nearest(truths: Edges, boxes: Edges) -> dict[str, Any]:
    """The columns of the object that one of the boxes comes nearest to; the first one's where there are none."""
    if not len(truths):
        return {field.name: None for field in BOX}
    place = int(iou(truths[:, None], boxes[None]).max(1, initial=0).argmax())
    return {name: float(side[0]) for name, side in box_columns(truths[[place]]).items()}


def _windows(context: Context, row: Row) -> pa.Table:
    columns = looked.windows_of(context, row)
    return tables.conform({**_head(context, row, len(columns["scale"])), **columns}, WINDOWS)


def report(run: Run, name: str | None) -> Iterator[str]:
    """The localisation error, and that of the centred box."""
    table = named("localization_images", name)
    rows = tables.read(run.slice(table, SLICE))
    rows = rows.filter(pc.is_valid(rows["outcome"]))
    if not rows.num_rows:
        yield f"{table}: no image has an object of its class: errors are not known"
        return
    outcome, centred = np.array(rows["outcome"].to_pylist()), rows["centred_iou"].to_numpy() < RIGHT
    confused = np.isin(outcome, ["confused_class", "missed"])
    counts = ", ".join(
        f"{(outcome == name).mean():.1%} {name}" for name in ("confused_class", "poor_overlap", "missed")
    )
    yield (
        f"{table}: localisation error {(outcome != 'right').mean():.1%} of {rows.num_rows} images ({counts}); a "
        f"centred box of mean size errs on {centred.mean():.1%}, with these guesses of the class on "
        f"{(centred | confused).mean():.1%}"
    )


ANALYSIS = Analysis(
    table="localization",
    tables=("localization", "localization_images", "localization_windows"),
    module=__name__,
    part_schema=part_schema,
    slices=looked.slices,
    samples=looked.samples,
    setup=looked.setup,
    decode=looked.decode,
    batch=looked.as_batch,
    map_batch=map_batch,
    reduce_part=looked.reduce_part,
    fold=fold,
    forwards=looked.forwards,
    selects=(),
    report=report,
)
