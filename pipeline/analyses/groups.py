"""Other samples than the nine strongest: any k, the weakest, those around a quantile, each of them for every class.

A row for each feature map, group and rank, chosen from the table `maxima` that jobs/top9.py leaves: no image is read.
As in top9 an image counts once for a map, by its strongest cell, and only with an activation above zero. The groups:

- `top`: the k strongest, by (activation descending, key ascending): top9 for any k;
- `bottom`: the k weakest of those that excite the map at all, by (activation ascending, key ascending);
- `q0.5`: k neighbours in the order of `top`, around the strongest image that a share of 0.5 of them does not exceed.

With --per-class all this among the images of each class; images without a label are left out then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import tables
from pipeline.analyses import maxima
from pipeline.analyses.maxima import Block, Images
from pipeline.derive import Context, Derivation
from pipeline.runs import RunError, require_at_least_one
from zfnet.receptive import receptive_field

_ROWS_TOGETHER = 2**18

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of groups."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table."""
    maxima: str = "maxima"
    """Table to choose from: maxima, or maxima-NAME."""
    k: int = 9
    """Images of a group."""
    top: bool = True
    """The k strongest."""
    bottom: bool = True
    """The k weakest above zero."""
    quantiles: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares, above 0 to 1: the k images around each quantile."""
    per_class: bool = False
    """Choose among the images of each class instead of among all."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "k")
        for share in self.quantiles:
            if not 0 < share <= 1:
                raise RunError(f"--quantiles has {share}: give shares above 0, at most 1")
        if len(set(self.quantiles)) < len(self.quantiles):
            raise RunError(f"--quantiles {' '.join(map(str, self.quantiles))} has one twice: give each once")
        if not (self.top or self.bottom or self.quantiles):
            raise RunError("--no-top, --no-bottom and no --quantiles leave no group: ask for one of them")

    @property
    def groups(self) -> list[str | float]:
        """The groups, in the order of the table; a quantile by its share."""
        return [*(["top"] if self.top else []), *sorted(self.quantiles, reverse=True), *["bottom"][: self.bottom]]


SCHEMA = tables.schema(
    "groups",
    row="one of the strongest, weakest or middling images of a feature map, of all images or of a class",
    file="layer",
    key=("layer", "feature_map", "class", "group", "rank"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.or_null("class", pa.int32(), "Class among whose images the rank counts; null: all."),
        tables.column("group", pa.string(), "top, bottom, or q and the quantile."),
        tables.or_null("quantile", pa.float64(), "Of the group; null for top and bottom."),
        *tables.CELL,
    ],
)


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The groups of all maps of a layer, sorted by feature map, class, group and rank."""
    config: Config = context.config
    images = maxima.images(context, config.maxima, layer)
    classes = _classes(images, config.per_class)
    rows_of_a_map = sum(min(config.k, len(members)) for _, members in classes) * len(config.groups)
    together = max(1, _ROWS_TOGETHER // max(1, rows_of_a_map))
    for block in maxima.blocks(context, config.maxima, layer, images):
        for start in range(0, block.maxima.shape[1], together):
            yield _rows(context, layer, images, block.part(start, start + together), classes)


def _classes(images: Images, per_class: bool) -> list[tuple[int | None, Ints]]:
    """Each class with its images in key order; None: all of them."""
    if not per_class:
        return [(None, np.arange(len(images.place)))]
    labels = images.samples["label"].to_numpy()  # null becomes NaN
    return [(int(label), np.flatnonzero(labels == label)) for label in np.unique(labels[~np.isnan(labels)])]


def _rows(context: Context, layer: str, images: Images, block: Block, classes: list[Any]) -> pa.Table:
    chosen = [_choose(context.config, block.maxima[members]) for _, members in classes]
    place = np.repeat(np.arange(len(classes)), [len(found.rank) for found in chosen])
    image = np.concatenate([members[found.image] for (_, members), found in zip(classes, chosen, strict=True)])
    map_, group, rank = (np.concatenate([getattr(f, name) for f in chosen]) for name in ("map", "group", "rank"))
    order = np.lexsort((rank, group, place, map_))
    place, image, map_, group, rank = (column[order] for column in (place, image, map_, group, rank))
    samples = images.samples.take(pa.array(image))
    count, row, col = len(image), block.row[image, map_], block.col[image, map_]
    names = context.config.groups
    columns = {
        "model_id": [context.model.model_id] * count,
        "class": pa.array([label for label, _ in classes], pa.int32()).take(pa.array(place)),
        "group": pa.array([name if isinstance(name, str) else f"q{name:g}" for name in names]).take(pa.array(group)),
        "quantile": pa.array([None if isinstance(name, str) else name for name in names], pa.float64()).take(
            pa.array(group)
        ),
        "layer": [layer] * count,
        "feature_map": block.first + map_,
        "rank": rank,
        "activation": block.maxima[image, map_],
        **{name: samples[name] for name in samples.column_names},
        "row": row,
        "col": col,
        **tables.box_columns(receptive_field(context.graph, layer).box(row, col), count),
    }
    return tables.conform(columns, SCHEMA)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Entries of groups: number of the map in the block, of the group, rank from 1, and place of the image."""

    map: Ints
    group: Ints
    rank: Ints
    image: Ints


def _choose(config: Config, values: npt.NDArray[np.float32]) -> Chosen:
    """The groups of some images (in key order) and maps, [images, maps]."""
    alive = (values > 0).sum(0)
    dead_last = np.where(values > 0, -values, np.inf)
    descending = np.argsort(dead_last, axis=0, kind="stable")  # ties go by key
    found = []
    for number, name in enumerate(config.groups):
        order, start = descending, np.zeros_like(alive)
        if name == "bottom":
            order = np.argsort(np.abs(dead_last), axis=0, kind="stable")
        elif not isinstance(name, str):
            share = Fraction(str(name))
            place = alive - -(-share.numerator * alive // share.denominator)  # so many are stronger
            start = np.clip(place - (config.k - 1) // 2, 0, np.maximum(0, alive - config.k))
        found.append(_neighbours(order, start, np.minimum(config.k, alive), number))
    return Chosen(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _neighbours(order: Ints, start: Ints, count: Ints, group: int) -> tuple[Ints, Ints, Ints, Ints]:
    """`count` entries of each map's order from `start` on: map, group, rank and image."""
    map_ = np.repeat(np.arange(len(count)), count)
    rank = np.arange(len(map_)) - np.repeat(np.cumsum(count) - count, count)
    return map_, np.full(len(map_), group), rank + 1, order[start[map_] + rank, map_]


ANALYSIS = Derivation(
    table="groups",
    schema=SCHEMA,
    slices=maxima.slices,
    sources=maxima.sources,
    make=make,
)
