"""What localization and detection have in common: a network's windows over an image, its objects, and a part's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import tables
from pipeline.box_loop import BACKGROUND
from pipeline.context import Context, read
from pipeline.objects import Objects, objects_of
from pipeline.runs import RunError, require_at_least_one
from pipeline.shards import Sample, Skipped
from pipeline.storage import Location
from zfnet import images
from zfnet.dense import Stride, require_scales
from zfnet.localization import Found, Ints, Looker, Seen, View
from zfnet.merging import Average, Edges

SLICE = "images"


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How images are looked at, and boxes merged."""

    scales: tuple[int, ...] = (1, 2, 4, 6)
    """Scales of the image, 1 to 6, ascending."""
    stride: Stride = "fine"
    """Windows: with every offset of the last pool, or the first alone."""
    mirror: bool = False
    """Look at the image's mirror image as well, which the paper does in classification; twice the work."""
    threshold: float = 0.6
    """Match score above which two boxes are not merged: distance of their centres in diagonals, plus 1 - IoU."""
    average: Average = "confidence"
    """Of merged boxes: weighted with the confidences of their windows, or plain, as the paper says."""
    part_size: int = 64
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 8
    """Images that are decoded together; the network sees one view at a time."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "part_size", "batch_size")
        try:
            require_scales(self.scales)
        except ValueError as error:
            raise RunError(f"--{error}") from None
        if not self.threshold >= 0:
            raise RunError(f"--threshold is {self.threshold}: give 0 or more")


def require_confidence(least: float) -> None:
    """The option --least must be a confidence. Raises: RunError."""
    if not 0 <= least < 1:
        raise RunError(f"--least is {least}: give a confidence from 0 to 1")


HEAD = [tables.MODEL_ID, tables.DATA_ID, tables.KEY, tables.SHARD]
CLASS = [tables.column("class", pa.int32(), "Class."), tables.column("class_name", pa.string(), "Its name.")]
BOX = [
    tables.column("box_top", pa.float64(), "First row of the box in original pixels."),
    tables.column("box_left", pa.float64(), "First column of the box."),
    tables.column("box_height", pa.float64(), "Height of the box."),
    tables.column("box_width", pa.float64(), "Width of the box."),
]
WINDOW = [
    tables.column("scale", pa.int32(), "Scale of the image, 1 to 6."),
    tables.column("mirrored", pa.bool_(), "Whether the network saw the image's mirror image in it."),
    *CLASS,
    tables.column("confidence", pa.float64(), "Probability of the class in the window."),
    tables.column("window_top", pa.float64(), "First row of the window in original pixels."),
    tables.column("window_left", pa.float64(), "First column of the window."),
    tables.column("window_height", pa.float64(), "Height of the window."),
    tables.column("window_width", pa.float64(), "Width of the window."),
    *BOX,
]
"""A window, and the box that it predicts."""

_FLOATS, _INTS = pa.list_(pa.float64()), pa.list_(pa.int32())

PART = pa.schema(
    [
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.column("image_height", pa.int32(), "Rows of the image."),
        tables.column("image_width", pa.int32(), "Columns of the image."),
        tables.column("object_classes", _INTS, "Class of each object."),
        tables.column("object_boxes", _FLOATS, "Its edges in original pixels: top, left, bottom, right."),
        tables.column("refused", pa.list_(pa.string()), "Why boxes of the sample cannot be used."),
        tables.column("classes", _INTS, "Class of each final box, the highest score first."),
        tables.column("scores", _FLOATS, "Its score."),
        tables.column("boxes", _FLOATS, "Its edges in original pixels."),
        tables.column("merged", _INTS, "Windows that it was merged from."),
        tables.column("window_scales", _INTS, "Scale of each window that is kept."),
        tables.column("window_mirrored", pa.list_(pa.bool_()), "Whether it is one of the mirror image."),
        tables.column("window_classes", _INTS, "The class that it is kept for."),
        tables.column("window_confidences", _FLOATS, "Its confidence in it."),
        tables.column("window_edges", _FLOATS, "Where it lies in original pixels: top, left, bottom, right."),
        tables.column("window_boxes", _FLOATS, "Edges of the box that it predicts."),
    ]
)
"""A row an image; the fold makes rows of its lists."""


@dataclass(frozen=True, eq=False)
class Looked:
    """A decoded sample: its views, and its objects."""

    sample: Sample
    size: tuple[int, int]
    """Width and height in pixels."""
    views: list[View]
    objects: Objects


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that are decoded together."""

    pictures: list[Looked]


def setup(context: Context, slices: list[str]) -> Looker:
    """The network that looks. Raises: RunError for a model without a regressor of boxes."""
    config: Any = context.config
    network: Any = context.model.network
    try:
        return Looker(network, context.model.preprocessing, config.scales, config.stride, config.mirror)
    except ValueError as error:
        raise RunError(f"{context.run.location} holds {context.model.architecture}: {error}") from None


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for a model without a regressor of boxes."""
    context.model.require_classes(context.analysis)
    setup(context, [])
    return [SLICE]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """All of the split."""
    return context.index.split(context.split)


def decode(context: Context, looker: Looker, rows: pa.Table) -> tuple[list[Looked], list[Skipped]]:
    """The images, decoded, at every scale."""

    def look(sample: Sample, number: int) -> Looked:
        resized, size = images.decode_resized(sample.image, looker.sides_px, scaled=context.decode == "scaled")
        return Looked(sample, size, looker.views(resized, size), objects_of(sample, context.model.classes))

    return read(context, rows, look)


def as_batch(context: Context, looker: Looker, pictures: list[Looked]) -> Batch:
    """The network sees one view at a time: nothing is stacked."""
    return Batch(pictures)


def forwards(context: Context) -> int:
    """Of the network, for an image."""
    return len(context.config.scales) * (2 if context.config.mirror else 1)


def background_of(context: Context) -> int | None:
    """The class of the background; None where the network knows none."""
    classes = context.model.classes
    return classes.index(BACKGROUND) if BACKGROUND in classes else None


def map_pictures(
    looker: Looker, batch: Batch, find: Callable[[list[Seen]], Found], classes: Callable[[Found], Ints], least: float
) -> pa.Table:
    """The part's rows of a batch.

    Args:
        find: what is said by the windows of an image -> its final boxes.
        classes: final boxes -> the classes of which windows are told.
        least: confidence of such a window.
    """
    rows = []
    for picture in batch.pictures:
        seen = looker.look(picture.views)
        found = find(seen)
        sample = picture.sample
        row = {
            "key": sample.key,
            "shard": sample.shard,
            "label": sample.label,
            "image_height": picture.size[1],
            "image_width": picture.size[0],
            "object_classes": picture.objects.labels,
            "object_boxes": picture.objects.boxes.ravel(),
            "refused": [reason for _, reason in picture.objects.refused],
            "classes": found.classes,
            "scores": found.scores,
            "boxes": found.boxes.ravel(),
            "merged": found.windows,
            **sure_windows(seen, classes(found), least),
        }
        rows.append(row)
    return tables.conform({name: [row[name] for row in rows] for name in PART.names}, PART)


_COLUMNS = ("window_scales", "window_mirrored", "window_classes", "window_confidences", "window_edges", "window_boxes")


def sure_windows(seen: Sequence[Seen], classes: Ints, least: float) -> dict[str, Any]:
    """The columns of the windows that are at least so confident of one of the classes: each once, for the class of
    these that it is surest of."""
    told: list[tuple[Any, ...]] = []
    for one in seen if len(classes) else ():
        confidences = one.confidences[:, classes]
        windows = np.flatnonzero(confidences.max(1) >= least)
        surest = confidences[windows].argmax(1)
        scales, mirrored = np.full(len(windows), one.scale), np.full(len(windows), one.mirrored)
        of = classes[surest]
        told.append((scales, mirrored, of, confidences[windows, surest], one.windows[windows], one.of(of, windows)))
    if not told:
        return {name: [] for name in _COLUMNS}
    return {name: np.concatenate(some).ravel() for name, some in zip(_COLUMNS, zip(*told, strict=True), strict=True)}


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([PART.empty_table(), *results])


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a part, as arrays."""

    key: str
    shard: str
    label: int | None
    height: int
    width: int
    object_classes: Any
    object_boxes: Edges
    refused: list[str]
    found: Found
    windows: dict[str, Any]
    """The columns of its windows, where they were asked for."""


def rows(context: Context, parts: list[Location], windows: bool = False) -> Iterator[Row]:
    """The images of all parts, in index order. A label is the place of its name among the network's classes."""
    known, names = context.model.classes, context.index.classes
    columns = [name for name in PART.names if windows or name not in _COLUMNS]
    for part in parts:
        for row in tables.read(part, columns).to_pylist():
            name = names[row["label"]] if row["label"] is not None and row["label"] < len(names) else None
            found = Found(
                np.array(row["classes"], np.int64),
                np.array(row["scores"], np.float64),
                _edges(row["boxes"]),
                np.array(row["merged"], np.int64),
            )
            yield Row(
                row["key"],
                row["shard"],
                known.index(name) if name in known else None,
                row["image_height"],
                row["image_width"],
                np.array(row["object_classes"], np.int64),
                _edges(row["object_boxes"]),
                row["refused"],
                found,
                {name: row[name] for name in _COLUMNS if windows},
            )


def _edges(flat: list[float]) -> Edges:
    return np.array(flat, np.float64).reshape(-1, 4)


def head(context: Context, row: Row, count: int) -> dict[str, Any]:
    """The columns HEAD of so many rows."""
    columns = {**context.identity, "key": row.key, "shard": row.shard}
    return {column: [value] * count for column, value in columns.items()}


def box_columns(edges: Edges, prefix: str = "box") -> dict[str, Any]:
    """The columns of boxes [N, 4]."""
    sides = (edges[:, 0], edges[:, 1], edges[:, 2] - edges[:, 0], edges[:, 3] - edges[:, 1])
    return {f"{prefix}_{name}": side for name, side in zip(("top", "left", "height", "width"), sides, strict=True)}


def windows_of(context: Context, row: Row) -> dict[str, Any]:
    """The columns WINDOW of an image's windows."""
    windows = row.windows
    return {
        "scale": windows["window_scales"],
        "mirrored": windows["window_mirrored"],
        "class": windows["window_classes"],
        "class_name": names_of(context, windows["window_classes"]),
        "confidence": windows["window_confidences"],
        **box_columns(_edges(windows["window_edges"]), "window"),
        **box_columns(_edges(windows["window_boxes"])),
    }


def names_of(context: Context, classes: Any) -> list[str]:
    """Names of the network's classes."""
    return [context.model.classes[int(class_)] for class_ in classes]
