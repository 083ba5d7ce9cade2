"""Every object of every image: boxes with a class and a score, and how good they are (OverFeat section 5).

A network with a background class looks at every window at every scale; the boxes of windows that are confident of a
class are merged within it. Five tables: `detection`, a row for each box with what it is; `detection_objects`, a row for
each true box with what became of it; `detection_windows`, the windows that were sure of a box's class;
`detection_curves`, precision and recall of each class; `detection_classes`, its average precision, and its boxes and
objects by kind. Their mean is the mAP at an IoU of one half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from pipeline import tables
from pipeline.analyses import looked
from pipeline.analyses.looked import (
    BOX,
    CLASS,
    HEAD,
    PART,
    SLICE,
    WINDOW,
    Batch,
    Looking,
    Row,
    box_columns,
    head,
    names_of,
)
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context
from pipeline.runs import Run, RunError, named, require_at_least_one
from pipeline.storage import Location
from zfnet.detection import (
    Fate,
    Outcome,
    average_precision,
    by_score,
    fates,
    match_classes,
    outcomes,
    precision_recall,
)
from zfnet.localization import Found, Looker, Seen, merged
from zfnet.merging import iou


@dataclass(frozen=True, kw_only=True)
class Config(Looking):
    """What decides the content of detection."""

    least: float = 0.3
    """Confidence of a window that takes part."""
    most: int = 100
    """Boxes of an image at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "most")
        looked.require_confidence(self.least)


DETECTION = tables.schema(
    "detection",
    row="a box that was found in an image",
    file="",
    key=("key", "rank"),
    columns=[
        *HEAD,
        tables.column("rank", pa.int32(), "Place among the image's boxes, from 1."),
        *CLASS,
        tables.column("score", pa.float64(), "Sum of the confidences of the windows that the box was merged from."),
        *BOX,
        tables.column("windows", pa.int32(), "Windows that the box was merged from."),
        tables.column("outcome", pa.string(), "right, duplicate, poor_overlap, confused_class or background."),
        tables.column("iou", pa.float64(), "Largest IoU with an object of the class; 0 where there is none."),
        tables.or_null("object", pa.int32(), "The object that it finds: its number in detection_objects."),
    ],
)

OBJECTS = tables.schema(
    "detection_objects",
    row="a true box of an image, and what became of it",
    file="",
    key=("key", "object"),
    columns=[
        *HEAD,
        tables.column("object", pa.int32(), "Number of the object in its image, from 0."),
        *CLASS,
        *BOX,
        tables.column("fate", pa.string(), "found, confused_class, poor_overlap or missed."),
        tables.column("refused", pa.int32(), "Boxes of the image that cannot be used: no area, or no known class."),
    ],
)

WINDOWS = tables.schema(
    "detection_windows",
    row="a window that was sure of the class of one of the image's boxes",
    file="",
    key=("key", "scale", "mirrored", "window_top", "window_left"),
    columns=[*HEAD, *WINDOW],
)
"""Each window once, for the class of these that it is surest of."""

CURVES = tables.schema(
    "detection_curves",
    row="a box of a class among those of all images, from the highest score down",
    file="",
    key=("class", "rank"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        *CLASS,
        tables.column("rank", pa.int32(), "Place among the class's boxes of all images, from 1."),
        tables.column("score", pa.float64(), "Score of that box."),
        tables.column("precision", pa.float64(), "Share of the boxes down to this one that are right."),
        tables.column("recall", pa.float64(), "Share of the class's objects that they find."),
    ],
)

CLASSES = tables.schema(
    "detection_classes",
    row="a class: its average precision, and its boxes and objects by kind",
    file="",
    key=("class",),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        *CLASS,
        tables.column("objects", pa.int64(), "True boxes of the class."),
        tables.column("detections", pa.int64(), "Boxes of the class."),
        tables.or_null("average_precision", pa.float64(), "Area under its curve; null without objects."),
        *(tables.column(name, pa.int64(), f"Boxes of the class that are {name}.") for name in get_args(Outcome)),
        *(tables.column(f"objects_{name}", pa.int64(), f"Objects that are {name}.") for name in get_args(Fate)),
    ],
)


def part_schema(config: Config) -> pa.Schema:
    """Columns of a part: an image's lists."""
    return PART


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for a model without a regressor of boxes, or without a background class."""
    found = looked.slices(context)
    if looked.background_of(context) is None:
        raise RunError(
            f"the network of {context.run.location} has no class 'background': every window would show an object. "
            "Train a detector (jobs/train_detector.py), then its boxes (jobs/train_localizer.py)"
        )
    return found


def map_batch(context: Context, looker: Looker, batch: Batch) -> pa.Table:
    """Boxes of each image."""
    config: Config = context.config
    background = looked.background_of(context)

    def find(seen: list[Seen]) -> Found:
        sure = [(one.confidences >= config.least).any(0) for one in seen]
        classes = [[int(class_) for class_ in np.flatnonzero(some) if class_ != background] for some in sure]
        found = merged(seen, classes, config.least, config.threshold, config.average)
        return Found(*(getattr(found, name)[: config.most] for name in ("classes", "scores", "boxes", "windows")))

    return looked.map_pictures(looker, batch, find, lambda found: np.unique(found.classes), config.least)


@dataclass(eq=False)
class _Class:
    """What is gathered of a class over all images, in index order."""

    scores: list[float]
    outcomes: list[str]
    fates: list[str]


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """The five tables. Images are read, and their boxes judged, anew for each: only classes are held in memory."""
    boxes = (_boxes(context, row, _judge(row)) for row in looked.rows(context, parts))
    yield Finished("detection", SLICE, DETECTION, boxes)
    objects = (_objects(context, row, _judge(row)) for row in looked.rows(context, parts))
    yield Finished("detection_objects", SLICE, OBJECTS, objects)
    windows = (_windows(context, row) for row in looked.rows(context, parts, windows=True))
    yield Finished("detection_windows", SLICE, WINDOWS, windows)
    gathered = _gather(context, parts)
    curves = (_curve(context, class_, known) for class_, known in gathered.items())
    yield Finished("detection_curves", SLICE, CURVES, curves)
    found = [_class(context, class_, known) for class_, known in gathered.items()]
    table = tables.conform({name: [row[name] for row in found] for name in CLASSES.names}, CLASSES)
    yield Finished("detection_classes", SLICE, CLASSES, iter([table]))


class _Judged(NamedTuple):
    """What became of an image's boxes and objects."""

    matched: Any
    """[boxes] the object that each finds, or -1."""
    outcomes: list[Outcome]
    fates: list[Fate]


def _judge(row: Row) -> _Judged:
    found = row.found
    matched = match_classes(found.boxes, found.scores, found.classes, row.object_boxes, row.object_classes)
    known = (found.boxes, found.classes, row.object_boxes, row.object_classes, matched)
    return _Judged(matched, outcomes(*known), fates(*known))


def _gather(context: Context, parts: list[Location]) -> dict[int, _Class]:
    """What became of the boxes and objects of each class but the background."""
    background = looked.background_of(context)
    found = {class_: _Class([], [], []) for class_ in range(len(context.model.classes)) if class_ != background}
    for row in looked.rows(context, parts):
        known = _judge(row)
        for class_, score, outcome in zip(row.found.classes, row.found.scores, known.outcomes, strict=True):
            found[int(class_)].scores.append(float(score))
            found[int(class_)].outcomes.append(outcome)
        for class_, fate in zip(row.object_classes, known.fates, strict=True):
            found[int(class_)].fates.append(fate)
    return found


def _boxes(context: Context, row: Row, judged: _Judged) -> pa.Table:
    found = row.found
    overlap = iou(found.boxes[:, None], row.object_boxes[None])
    own = np.where(found.classes[:, None] == row.object_classes[None], overlap, 0)
    columns = {
        **head(context, row, len(found.classes)),
        "rank": np.arange(len(found.classes)) + 1,
        "class": found.classes,
        "class_name": names_of(context, found.classes),
        "score": found.scores,
        **box_columns(found.boxes),
        "windows": found.windows,
        "outcome": judged.outcomes,
        "iou": own.max(1, initial=0),
        "object": [None if place < 0 else int(place) for place in judged.matched],
    }
    return tables.conform(columns, DETECTION)


def _objects(context: Context, row: Row, judged: _Judged) -> pa.Table:
    count = len(row.object_classes)
    columns = {
        **head(context, row, count),
        "object": np.arange(count),
        "class": row.object_classes,
        "class_name": names_of(context, row.object_classes),
        **box_columns(row.object_boxes),
        "fate": judged.fates,
        "refused": [len(row.refused)] * count,
    }
    return tables.conform(columns, OBJECTS)


def _windows(context: Context, row: Row) -> pa.Table:
    columns = looked.windows_of(context, row)
    return tables.conform({**head(context, row, len(columns["scale"])), **columns}, WINDOWS)


def _in_order(known: _Class) -> tuple[Any, Any]:
    """Scores from the highest down, and whether each is right; equal scores in index order."""
    order = by_score(np.array(known.scores))
    return np.array(known.scores)[order], np.array([outcome == "right" for outcome in known.outcomes], bool)[order]


def _curve(context: Context, class_: int, known: _Class) -> pa.Table:
    scores, right = _in_order(known)
    count = len(scores) if known.fates else 0
    precision, recall = precision_recall(right[:count], max(1, len(known.fates)))
    columns = {
        **{name: [value] * count for name, value in context.identity.items()},
        "class": [class_] * count,
        "class_name": names_of(context, [class_] * count),
        "rank": np.arange(count) + 1,
        "score": scores[:count],
        "precision": precision,
        "recall": recall,
    }
    return tables.conform(columns, CURVES)


def _class(context: Context, class_: int, known: _Class) -> dict[str, Any]:
    _, right = _in_order(known)
    objects = len(known.fates)
    return {
        **context.identity,
        "class": class_,
        "class_name": context.model.classes[class_],
        "objects": objects,
        "detections": len(right),
        "average_precision": average_precision(*precision_recall(right, objects)) if objects else None,
        **{name: known.outcomes.count(name) for name in get_args(Outcome)},
        **{f"objects_{name}": known.fates.count(name) for name in get_args(Fate)},
    }


def report(run: Run, name: str | None) -> Iterator[str]:
    """The mAP, and what was wrong."""
    table = named("detection_classes", name)
    rows = tables.read(run.slice(table, SLICE)).to_pandas()
    known = rows[rows.objects > 0]
    if not len(known):
        yield f"{table}: no image has an object: precision is not known"
        return
    boxes = ", ".join(f"{known[name].sum()} {name}" for name in get_args(Outcome))
    objects = ", ".join(f"{known[f'objects_{name}'].sum()} {name}" for name in get_args(Fate))
    yield (
        f"{table}: mAP {known.average_precision.mean():.1%} over {len(known)} classes at IoU 0.5; boxes: {boxes}; "
        f"objects: {objects}"
    )


ANALYSIS = Analysis(
    table="detection",
    tables=("detection", "detection_objects", "detection_windows", "detection_curves", "detection_classes"),
    module=__name__,
    part_schema=part_schema,
    slices=slices,
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
