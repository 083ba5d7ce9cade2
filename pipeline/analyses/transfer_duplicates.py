"""Images of a set that another set holds too, by the normalised correlation of their features (ZFNet section 5.2).

The paper looked for images of Caltech that ImageNet's training set holds, by normalised correlation, and trained
without them (44 of 9,144 in Caltech-101). It does not say of what; here it is that of the two images' features in a
layer, each without its own mean: of pixels where the layer is the network's input. A row for each image of `features`
with the image of `--against` that is most like it, where they are alike enough. Without --against the set is compared
with itself: of two images that are alike the later one by split and key has the row, so that one of them stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import tables
from pipeline.analyses import vectors
from pipeline.analyses.features import SPLIT
from pipeline.analyses.vectors import Vectors
from pipeline.derive import Context, Derivation
from pipeline.progress import say
from pipeline.runs import RunError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of transfer_duplicates."""

    layers: tuple[str, ...]
    """Layers by whose features images are compared; transfer leaves out what any of them finds."""
    features: str = "features"
    """Table of the set that loses its duplicates: features, or features-NAME."""
    against: str | None = None
    """Table of the other set, with the same --pool; default the set itself."""
    correlation: float = 0.99
    """Smallest correlation of a pair, from -1 to 1."""

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise RunError(f"--correlation is {self.correlation}: give a number from -1 to 1")


SCHEMA = tables.schema(
    "transfer_duplicates",
    row="an image that another set, or the same one, holds too",
    file="layer",
    key=("layer", "split", "key"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        SPLIT,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("correlation", pa.float64(), "Normalised correlation of the two images' features, -1 to 1."),
        tables.column("other_data_id", pa.string(), "Identity of the images that the other one is of."),
        tables.column("other_split", pa.string(), "Split of the other image."),
        tables.column("other_key", pa.string(), "Key of the other image: of several the most alike."),
        tables.or_null("other_label_name", pa.string(), "Name of its class; null where unknown."),
    ],
)

_DIGITS = 12
"""Of a correlation: rounding must not decide which of two copies is named."""

_ONE = ("data_id", "split", "key", "shard", "label", "label_name")
_OTHER = ("data_id", "split", "key", "label_name")


def slices(context: Context) -> list[str]:
    """The layers that are wanted, in both tables."""
    config: Config = context.config
    for table in (config.features, config.against or config.features):
        layers = vectors.layers(context, table, config.layers, ())
    return layers


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The features of both sets."""
    return {name: value for found in _both(context, layer) for name, value in found.sources().items()}


def _both(context: Context, layer: str) -> tuple[Vectors, Vectors]:
    config: Config = context.config
    one, other = (Vectors.of(context, table, layer) for table in (config.features, config.against or config.features))
    return one, other


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The duplicates of a layer, by split and key. Says how many there are."""
    config: Config = context.config
    one, other = _both(context, layer)
    images, others = one.images(), other.images()
    order, places = vectors.in_order(images), _places(others)
    found = [
        _most_alike(normalised(block), other, places, below)
        for block, below in _with_limits(one, _places(images), None if config.against is None else len(others))
    ]
    best, at = (np.concatenate(column) for column in zip(*found, strict=True))
    rows = order[best[order] >= config.correlation]
    ones, likes = images.take(pa.array(rows)), others.take(pa.array(vectors.in_order(others)[at[rows]]))
    say(f"{context.table}: {layer}: {len(rows)} of {len(images)} images have a duplicate")
    columns = {
        "model_id": [context.model.model_id] * len(rows),
        "layer": [layer] * len(rows),
        **{name: ones[name] for name in _ONE},
        "correlation": best[rows],
        **{f"other_{name}": likes[name] for name in _OTHER},
    }
    yield tables.conform(columns, SCHEMA)


def _places(images: pa.Table) -> Ints:
    """Of each image: its place by split and key."""
    found = np.empty(len(images), dtype=np.int64)
    found[vectors.in_order(images)] = np.arange(len(images))
    return found


def _with_limits(one: Vectors, places: Ints, all_of: int | None) -> Iterator[tuple[npt.NDArray[np.float32], Ints]]:
    """Features, and below which place each image has its like: all places of the other set, or its own in this set."""
    start = 0
    for block in one.blocks():
        own = places[start : start + len(block)]
        start += len(block)
        yield block, own if all_of is None else np.full_like(own, all_of)


def _most_alike(queries: Floats, other: Vectors, places: Ints, below: Ints) -> tuple[Floats, Ints]:
    """Correlation and place of the image that is most like each query; of equally alike ones the first place."""
    best, at = np.full(len(queries), -np.inf), np.zeros(len(queries), dtype=np.int64)
    start = 0
    for block in other.blocks():
        _require_alike(queries, block)
        place = places[start : start + len(block)]
        start += len(block)
        correlation = np.round(queries @ normalised(block).T, _DIGITS)
        correlation[place >= below[:, None]] = -np.inf
        value = correlation.max(1)
        first = np.where(correlation == value[:, None], place, len(places)).min(1)
        closer = (value > best) | ((value == best) & (first < at))
        best, at = np.where(closer, value, best), np.where(closer, first, at)
    return best, at


def _require_alike(queries: Floats, block: npt.NDArray[np.float32]) -> None:
    if queries.shape[1] != block.shape[1]:
        raise RunError(
            f"--features has {queries.shape[1]} values, and --against {block.shape[1]}: give one --pool to both"
        )


def normalised(features: npt.NDArray[np.float32]) -> Floats:
    """Each vector without its mean, of length 1; a constant one becomes 0, which correlates with nothing."""
    centred = features.astype(np.float64)
    centred -= centred.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    varies = features.max(1, keepdims=True) > features.min(1, keepdims=True)
    found: Floats = np.divide(centred, length, out=np.zeros_like(centred), where=varies)
    return found


ANALYSIS = Derivation(table="transfer_duplicates", schema=SCHEMA, slices=slices, sources=sources, make=make)
