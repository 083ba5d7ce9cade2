"""The images nearest to each image by Euclidean distance between their features (AlexNet section 6, figure 4 right).

A row for each query and rank. Distances are exact: computed from the float32 features in float64, number by number.
Nothing is its own neighbour; equal distances go by split and key. Needs the table `features`, no images and no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.analyses import vectors
from pipeline.analyses.features import SPLIT
from pipeline.analyses.vectors import Vectors
from pipeline.derive import Context, Derivation
from pipeline.progress import say
from pipeline.runs import require_at_least_one
from zfnet.neighbours import NONE, nearest


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of retrieval."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table."""
    features: str = "features"
    """Table to read: features, or features-NAME."""
    queries: tuple[str, ...] = ()
    """Splits whose images ask; default all of the table. The paper: val."""
    gallery: tuple[str, ...] = ()
    """Splits whose images answer; default all of the table. The paper: train."""
    k: int = 6
    """Neighbours of an image; the paper shows six."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "k")


SCHEMA = tables.schema(
    "retrieval",
    row="one of the nearest images of an image, and how far it is",
    file="layer",
    key=("layer", "split", "key", "rank"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        SPLIT,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("rank", pa.int32(), "Place of the neighbour, from 1: the nearest."),
        tables.column("distance", pa.float64(), "Euclidean distance between the two images' features."),
        tables.column("neighbour_data_id", pa.string(), "Identity of the images that the neighbour is of."),
        tables.column("neighbour_split", pa.string(), "Split of the neighbour."),
        tables.column("neighbour_key", pa.string(), "Key of the neighbour."),
        tables.column("neighbour_shard", pa.string(), "File name of the shard that holds the neighbour."),
        tables.or_null("neighbour_label", pa.int32(), "Class of the neighbour; null where it has none."),
        tables.or_null("neighbour_label_name", pa.string(), "Name of that class; null where unknown."),
        tables.or_null("same_class", pa.bool_(), "Whether both have the same class; null where one has none."),
    ],
)

Ints = npt.NDArray[np.int64]

_NEIGHBOUR = ("data_id", "split", "key", "shard", "label", "label_name")


def slices(context: Context) -> list[str]:
    """The layers that are wanted."""
    config: Config = context.config
    return vectors.layers(context, config.features, config.layers, (*config.queries, *config.gallery))


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The features of the queries and of the gallery."""
    return _vectors(context, layer, context.config.queries).sources() | (
        _vectors(context, layer, context.config.gallery).sources()
    )


def _vectors(context: Context, layer: str, splits: tuple[str, ...]) -> Vectors:
    return Vectors.of(context, context.config.features, layer, splits)


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The neighbours of all queries, in the order of the features, by rank. Says how many are of the same class."""
    config: Config = context.config
    queries, gallery = _vectors(context, layer, config.queries), _vectors(context, layer, config.gallery)
    images = _vectors(context, layer, (*queries.splits, *gallery.splits)).images()
    images = images.take(pa.array(vectors.in_order(images)))
    asking, answering = _numbers(images, queries.images()), _numbers(images, gallery.images())
    same = known = done = 0
    for block in queries.blocks():
        some = asking[done : done + len(block)]
        done += len(block)
        rows = _rows(context, layer, images, some, *nearest(block, some, _numbered(gallery, answering), config.k))
        same, known = same + (pc.sum(rows["same_class"]).as_py() or 0), known + pc.count(rows["same_class"]).as_py()
        yield rows
    if known:
        say(f"{context.table}: {layer}: of the {config.k} nearest {same / known:.1%} are of the same class")


def _numbers(images: pa.Table, some: pa.Table) -> Ints:
    """The place of some images among all."""
    place = {pair: number for number, pair in enumerate(_pairs(images))}
    return np.array([place[pair] for pair in _pairs(some)], dtype=np.int64)


def _pairs(images: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(images["split"].to_pylist(), images["key"].to_pylist(), strict=True)


def _numbered(found: Vectors, numbers: Ints) -> Iterator[tuple[npt.NDArray[np.float32], Ints]]:
    """The features some at a time, with the images' numbers."""
    done = 0
    for block in found.blocks():
        yield block, numbers[done : done + len(block)]
        done += len(block)


def _rows(
    context: Context,
    layer: str,
    samples: pa.Table,
    asking: Ints,
    distance: npt.NDArray[np.float64],
    number: Ints,
) -> pa.Table:
    """The table's rows; `samples` are all images by number, the others [queries] and [queries, k]."""
    query, place = np.nonzero(number != NONE)
    one = samples.take(pa.array(asking[query]))
    other = samples.take(pa.array(number[query, place]))
    columns = {
        "model_id": [context.model.model_id] * len(query),
        "layer": [layer] * len(query),
        **{name: one[name] for name in _NEIGHBOUR},
        "rank": place + 1,
        "distance": distance[query, place],
        **{f"neighbour_{name}": other[name] for name in _NEIGHBOUR},
        "same_class": pc.equal(one["label"], other["label"]),
    }
    return tables.conform(columns, SCHEMA)


ANALYSIS = Derivation(table="retrieval", schema=SCHEMA, slices=slices, sources=sources, make=make)
