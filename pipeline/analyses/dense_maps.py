"""Class maps: the probability of a class in every window of an image, at several scales (OverFeat 3.3).

A row for each image, scale and class: those classes that are strongest over all scales and reflections, as
`jobs/evaluate.py --views overfeat` ranks them, and the image's own. With each map goes where its windows lie in the
original image, so that it can be laid over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import tables
from pipeline.analyses.chosen import Chosen, samples, target_class
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context
from pipeline.projections import png
from pipeline.runs import require_at_least_one
from pipeline.shards import Skipped
from pipeline.storage import Location
from pipeline.views import Scaled, Seen, at_scales, checked_scales, scaled, sliding_of
from zfnet import evaluation
from zfnet.dense import MaximumOf, Sliding, Stride, strongest
from zfnet.images import Crop

SLICE = "images"


@dataclass(frozen=True, kw_only=True)
class Config(Chosen):
    """What decides the content of dense_maps."""

    classes: int = 3
    """So many classes, the strongest first, and the image's own besides."""
    scales: tuple[int, ...] = ()
    """Which of the paper's six; default all."""
    stride: Stride = "fine"
    """fine: windows at every offset of the last pool; coarse: at the first alone."""
    maximum_of: MaximumOf = "probabilities"
    """What ranks the classes: their largest probability over the windows, or the softmax of their largest scores."""
    part_size: int = 4
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 4
    """Images that go through the network together, one scale at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "classes", "part_size", "batch_size")
        checked_scales(self.scales)


def _in_original(name: str, what: str) -> pa.Field:
    return tables.column(name, pa.float32(), f"{what}, in pixels of the original image.")


SCHEMA = tables.schema(
    "dense_maps",
    row="an image at a scale, and a class: its scores and probabilities over all windows",
    file="",
    key=("key", "scale", "class"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("scale", pa.int32(), "Scale of the image, 1 to 6."),
        tables.column("stride", pa.string(), "Distance of the windows: fine or coarse."),
        tables.column("maximum_of", pa.string(), "What ranks the classes: probabilities or scores."),
        tables.column("class", pa.int32(), "Class of the map."),
        tables.column("class_name", pa.string(), "Its name."),
        tables.column("rank", pa.int32(), "Its place among all classes over all scales and reflections, from 1."),
        tables.column("probability", pa.float32(), "Its probability over all scales and reflections."),
        tables.column("map_height", pa.int32(), "Rows of the map."),
        tables.column("map_width", pa.int32(), "Columns of the map."),
        tables.column("probability_map", pa.list_(pa.float32()), "Probability in each window, row-major."),
        _in_original("box_top", "First row of the first window"),
        _in_original("box_left", "First column of the first window"),
        _in_original("box_height", "Height of every window"),
        _in_original("box_width", "Width of every window"),
        _in_original("step_height", "Distance of one row's windows from the next row's"),
        _in_original("step_width", "Distance of one column's windows from the next column's"),
        tables.column("window_px", pa.int32(), "Side of every window, in pixels of image_png."),
        tables.or_null("image_png", pa.binary(), "PNG of the image at this scale, RGB; null where rank is not 1."),
    ],
)


def resolve(context: Context) -> Config:
    """With all scales where none is given."""
    config: Config = context.config
    return replace(config, scales=checked_scales(config.scales))


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for a network that does not slide, keys or classes that do not occur."""
    context.model.require_classes(context.analysis)
    sliding_of(context.model, context.run.location)
    samples(context, [SLICE])
    return [SLICE]


def decode(context: Context, state: None, rows: pa.Table) -> tuple[list[Seen], list[Skipped]]:
    """The images at every scale."""
    return at_scales(context, context.config.scales, rows)


def map_batch(context: Context, state: None, batch: Scaled) -> pa.Table:
    """The rows of a batch, image by image."""
    config: Config = context.config
    sliding = sliding_of(context.model, context.run.location)
    maps: list[dict[int, Tensor]] = []
    views: list[Tensor] = []
    for groups in batch.at_scale:
        maps.append({})
        found = torch.empty(len(batch.pictures), 2, len(context.model.classes), dtype=torch.float64)
        for places, x in groups:
            scores = sliding.scores(sliding.pooled(x, config.stride))
            reflected = sliding.scores(sliding.pooled(x.flip(3), config.stride))
            both = [strongest(view, config.maximum_of).cpu() for view in (scores, reflected)]
            found[places] = torch.stack(both, 1)
            maps[-1].update(zip(places, scores.double().softmax(1).cpu(), strict=True))
        views.append(found)
    ranked = evaluation.average([torch.cat(views, 1)]).log_softmax(1)
    return pa.concat_tables(
        _rows(context, sliding, picture, [of_scale[place] for of_scale in maps], ranked[place])
        for place, picture in enumerate(batch.pictures)
    )


def _rows(context: Context, sliding: Sliding, picture: Seen, maps: list[Tensor], ranked: Tensor) -> pa.Table:
    """One image's rows: scale after scale, classes by rank."""
    config: Config = context.config
    order = ranked.sort(descending=True, stable=True).indices.tolist()
    chosen = order[: config.classes]
    target = target_class(context, picture)
    if target is not None and target not in chosen:
        chosen.append(target)
    rows = [
        {
            **_geometry(sliding, config.stride, scale, crop, of_classes),
            "class": class_,
            "class_name": context.model.classes[class_],
            "rank": order.index(class_) + 1,
            "probability": float(ranked[class_].exp()),
            "image_png": png(pixels) if class_ == order[0] else None,
        }
        for scale, (pixels, crop), of_classes in zip(config.scales, picture.views, maps, strict=True)
        for class_ in chosen
    ]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    arrays = [np.asarray(of_classes[class_]) for of_classes in maps for class_ in chosen]
    columns["probability_map"] = tables.flat_lists(arrays, pa.float32())
    sample = picture.sample
    image = {
        **context.identity,
        "key": sample.key,
        "shard": sample.shard,
        "label": sample.label,
        "label_name": context.index.label_name(sample.label),
        "stride": config.stride,
        "maximum_of": config.maximum_of,
    }
    columns |= {name: [value] * len(rows) for name, value in image.items()}
    return tables.conform(columns, SCHEMA)


def _geometry(sliding: Sliding, stride: Stride, scale: int, crop: Crop, maps: Tensor) -> dict[str, Any]:
    """The columns of a scale that are the same for all classes: where the windows of [C, rows, cols] lie."""
    top, left, height, width = crop.to_original(0, 0, sliding.window_px, sliding.window_px)
    step = sliding.step_px[stride] / sliding.window_px
    return {
        "scale": scale,
        "map_height": maps.shape[1],
        "map_width": maps.shape[2],
        "box_top": top,
        "box_left": left,
        "box_height": height,
        "box_width": width,
        "step_height": height * step,
        "step_width": width * step,
        "window_px": sliding.window_px,
    }


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([SCHEMA.empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file, in index order."""
    yield Finished("dense_maps", SLICE, SCHEMA, (tables.read(part) for part in parts))


ANALYSIS = Analysis(
    table="dense_maps",
    tables=("dense_maps",),
    module=__name__,
    part_schema=lambda config: SCHEMA,
    resolve=resolve,
    selects=(),
    slices=slices,
    samples=samples,
    decode=decode,
    batch=scaled,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 2 * len(context.config.scales),
)
