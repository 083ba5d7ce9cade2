"""Occlusion: what the network sees when a grey square hides part of the image (ZFNet section 4.2, figure 7).

A row for each image: the three maps of the paper over the square's positions (the summed activation of the
strongest feature map of the last convolution layer, the probability of the true class, the most probable class),
all from one set of forwards, with the grid's geometry, the clean prediction, and the strongest map's projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.projections import SEMANTICS_COLUMNS, cut_to_image, png, projection_columns, semantics_columns, stored
from pipeline.runs import RunError
from pipeline.storage import Location
from zfnet import deconv
from zfnet.deconv import Cells, Semantics
from zfnet.occlusion import Grid, Sensitivity, sensitivity
from zfnet.receptive import receptive_field

SLICE = "images"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of occlusion."""

    keys: tuple[str, ...] = ()
    """Images by key."""
    label: str | None = None
    """Images of one class, by its name or number."""
    first: int = 9
    """At most this many images, in the order of the shards (of the class, where one is given)."""
    occluder_px: int | None = None
    """Side of the square in input pixels; default 50 at an input of 224, in proportion."""
    stride_px: int | None = None
    """Distance of the square's positions in input pixels; default 6 at an input of 224, in proportion."""
    fill: int = 124
    """Grey of the square, 0 to 255, filled in before the mean is subtracted."""
    part_size: int = 4
    """Images of a part, the unit of work and of resume."""
    window_batch: int = 64
    """Occluded images that go through the network together."""

    @property
    def batch_size(self) -> int:
        """Images at a time: one, whose occluded copies fill the batch."""
        return 1

    def __post_init__(self) -> None:
        for name in ("first", "part_size", "window_batch"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if not 0 <= self.fill <= 255:
            raise RunError(f"--fill is {self.fill}: give a grey from 0 to 255")
        if self.keys and self.label is not None:
            raise RunError("--keys and --label were both given: choose images by one of them")


OCCLUSION = pa.schema(
    [
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column(
            "target_class", pa.int32(), "Class of probability_map: the label, or the clean class without one."
        ),
        tables.column("clean_class", pa.int32(), "Most probable class of the image without a square."),
        tables.column("clean_class_name", pa.string(), "Its name."),
        tables.column("clean_class_probability", pa.float32(), "Its probability."),
        tables.column("clean_probability", pa.float32(), "Probability of target_class without a square."),
        tables.column("grid_rows", pa.int32(), "Rows of the three maps."),
        tables.column("grid_cols", pa.int32(), "Columns of the three maps."),
        tables.column("occluder_px", pa.int32(), "Side of the square in input pixels."),
        tables.column(
            "stride_px", pa.int32(), "Position (i, j) has its top at i * stride_px, its left at j * stride_px."
        ),
        tables.column("fill", pa.int32(), "Grey of the square, 0 to 255."),
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column(
            "activation_map", pa.list_(pa.float32()), "Activation of the strongest map, summed over its cells."
        ),
        tables.column("probability_map", pa.list_(pa.float32()), "Probability of target_class."),
        tables.column("class_map", pa.list_(pa.int32()), "Most probable class."),
        tables.column("image_png", pa.binary(), "PNG of the network's input pixels, RGB."),
        tables.ACTIVATION,
        tables.ROW,
        tables.COL,
        tables.TOP,
        tables.LEFT,
        tables.HEIGHT,
        tables.WIDTH,
        *projection_columns("float32"),
        *SEMANTICS_COLUMNS,
    ]
)


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for a square that does not fit, for keys or classes that do not occur."""
    context.model.require_classes(context.analysis)
    grid_of(context)
    samples(context, [SLICE])
    return [SLICE]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """The chosen images. Raises: RunError for keys or classes that do not occur."""
    config: Config = context.config
    rows = context.index.split(context.split)
    if config.keys:
        if unknown := sorted(set(config.keys) - set(rows["key"].to_pylist())):
            raise RunError(f"there is no key {', '.join(map(repr, unknown))} in the split {context.split!r}")
        return rows.filter(pc.is_in(rows["key"], pa.array(config.keys)))
    if config.label is not None:
        rows = rows.filter(pc.equal(rows["label"], _label_number(context, config.label)))
    return rows.slice(0, config.first)


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each image that could be read."""
    return int(samples(context, [slice_]).num_rows) - len(skipped)


def _label_number(context: Context, label: str) -> int:
    classes = context.index.classes
    if label in classes:
        return classes.index(label)
    if label.isdigit() and int(label) < len(classes):
        return int(label)
    raise RunError(
        f"there is no class {label!r}: give a number below {len(classes)} or one of {', '.join(classes[:20])}"
    )


def grid_of(context: Context) -> Grid:
    """The square's positions for this network's input."""
    config: Config = context.config
    try:
        return Grid.of(context.model.preprocessing.crop_px, config.occluder_px, config.stride_px)
    except ValueError as error:
        raise RunError(str(error)) from None


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """One image: its maps, and the projection of its strongest cell."""
    (picture,) = batch.pictures
    preprocessing = context.model.preprocessing
    side = preprocessing.crop_px
    grey = torch.full((1, side, side, 3), context.config.fill, dtype=torch.uint8, device=batch.x.device)
    filled, target = preprocessing.normalise(grey)[0], _target(context, picture)
    try:
        found = sensitivity(
            context.graph, batch.x[0], filled, grid_of(context), target, batch=context.config.window_batch
        )
    except ValueError as error:
        raise RunError(f"sample {picture.sample.key!r}: {error}") from None
    return tables.conform(
        {**_describe(context, picture, found), **_strongest_projection(context, batch, found.feature_map)}, OCCLUSION
    )


def _target(context: Context, picture: Picture) -> int | None:
    """The label, where the images' classes are the network's own."""
    label = picture.sample.label
    same_classes = context.index.classes == context.model.classes
    return label if same_classes and context.index.label_name(label) is not None else None


def _describe(context: Context, picture: Picture, found: Sensitivity) -> dict[str, Any]:
    sample = picture.sample
    row: dict[str, Any] = {
        **context.identity,
        "key": sample.key,
        "shard": sample.shard,
        "label": sample.label,
        "label_name": context.index.label_name(sample.label),
        "target_class": found.target,
        "clean_class": found.clean_class,
        "clean_class_name": context.model.classes[found.clean_class],
        "clean_class_probability": found.clean_class_probability,
        "clean_probability": found.clean_probability,
        "grid_rows": found.grid.rows,
        "grid_cols": found.grid.cols,
        "occluder_px": found.grid.occluder_px,
        "stride_px": found.grid.stride_px,
        "fill": context.config.fill,
        "layer": found.layer,
        "feature_map": found.feature_map,
        "image_png": png(picture.pixels),
    }
    maps = {
        name: [getattr(found, name).flatten().cpu().numpy()]
        for name in ("activation_map", "probability_map", "class_map")
    }
    return {name: [value] for name, value in row.items()} | maps


def _strongest_projection(context: Context, batch: Batch, feature_map: int) -> dict[str, Any]:
    """Panel (c) of the figure: the strongest map's strongest cell, projected for this image."""
    layer = context.graph.last_convolution
    record = deconv.record(context.graph, batch.x, [layer])
    strongest = record.activation(layer)[0, feature_map]
    row, col = divmod(int(strongest.flatten().argmax()), strongest.shape[1])
    cell = Cells(*(torch.tensor([place], device=batch.x.device) for place in (0, feature_map, row, col)))
    projected = deconv.project(record, layer, cell)
    window = projected.pixels[0].cpu().numpy()
    pixels, _ = cut_to_image(context, window, int(projected.top[0]), int(projected.left[0]))
    top, left, height, width = receptive_field(context.graph, layer).box(row, col)
    place = {"row": row, "col": col, "top": top, "left": left, "height": height, "width": width}
    return {
        "activation": [float(strongest[row, col])],
        **{name: [int(value)] for name, value in place.items()},
        **stored([pixels], "float32"),
        **semantics_columns(Semantics(), 1),
    }


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([OCCLUSION.empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file, in index order."""
    yield Finished("occlusion", SLICE, OCCLUSION, (tables.read(part) for part in parts))


ANALYSIS = Analysis(
    table="occlusion",
    tables=("occlusion",),
    module=__name__,
    part_schema=lambda config: OCCLUSION,
    slices=slices,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 1 + grid_of(context).rows * grid_of(context).cols,
    expected_rows=expected_rows,
    selects=(),
)
