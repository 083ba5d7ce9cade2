"""Occlusion: what the network sees when a grey square hides part of the image (ZFNet section 4.2, figure 7).

A row for each image and size of the occluder: the three maps of the paper over the square's positions (the summed
activation of the strongest feature map of the last hidden convolution, the probability of the true class, the most
probable class), all from one set of forwards, with the grid's geometry, the clean prediction, and the strongest map's
projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from pipeline import tables
from pipeline.analyses.chosen import Chosen, samples, target_class
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.fills import as_input, require_fill
from pipeline.projections import SEMANTICS_COLUMNS, cut_to_image, png, projection_columns, semantics_columns, stored
from pipeline.runs import RunError, require_at_least_one
from pipeline.storage import Location
from zfnet import deconv
from zfnet.deconv import Cells, Semantics
from zfnet.occlusion import Grid, Sensitivity, computed_positions, sensitivity, watched_layer
from zfnet.receptive import receptive_field

SLICE = "images"


@dataclass(frozen=True, kw_only=True)
class Config(Chosen):
    """What decides the content of occlusion."""

    occluder_px: tuple[str, ...] = ()
    """Sides of the occluder in input pixels: 50 for a square, 64x16 for a rectangle (height x width); several give a
    row each. Default a square of 50 at an input of 224, in proportion."""
    stride_px: int | None = None
    """Distance of the occluder's positions in input pixels; default 6 at an input of 224, in proportion."""
    overhang: Literal["leave", "clip"] = "leave"
    """clip: one more position where the image is not covered to its end, cut off at the border, as captum has it."""
    fill: str = "124"
    """What the occluder shows, filled in before the mean is subtracted: a grey from 0 to 255, a colour as R,G,B, mean
    (the preprocessing's own, for each pixel where it has one) or blur (the image under a Gaussian; sigma is 10 pixels
    at an input of 224, in proportion)."""
    refine: float = 1.0
    """Below 1 the maps are NOT EXACT: every 4th row and column of positions is computed, then this share of all where
    most changes, and the rest is interpolated. The column `exact` says so."""
    probabilities: bool = False
    """Also keep the probabilities of all classes: 4 bytes a position and class (3.6 MB an image for 30 x 30 positions
    and 1000 classes)."""
    part_size: int = 4
    """Images of a part, the unit of work and of resume."""
    memory_mb: int = 256
    """Occluded images go through the network so many at a time that they need about this much, for each image that is
    worked on at once."""

    @property
    def batch_size(self) -> int:
        """Images at a time: one, whose occluded copies fill the batch."""
        return 1

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """Height and width of each occluder; None for the default."""
        return [_size(text) for text in self.occluder_px] or [None]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "part_size", "memory_mb")
        if not 0 <= self.refine <= 1:
            raise RunError(f"--refine is {self.refine}: give a share from 0 to 1; 1 is exact")
        if len(set(self.sizes)) < len(self.sizes):
            raise RunError(f"--occluder-px is {' '.join(self.occluder_px)}: give each size once")
        require_fill(self.fill)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not height.isdecimal() or not (width or height).isdecimal():
        raise RunError(f"--occluder-px is {text!r}: give the side of a square, as 50, or height x width, as 64x16")
    return int(height), int(width or height)


OCCLUSION = tables.schema(
    "occlusion",
    row="an image under an occluder: the paper's three maps, and the strongest map's projection",
    file="",
    key=("key", "occluder_px", "occluder_width_px"),
    columns=[
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
        tables.column("occluder_px", pa.int32(), "Side of the square, height of the rectangle, in input pixels."),
        tables.column("occluder_width_px", pa.int32(), "Width in input pixels; that of a square is occluder_px."),
        tables.column(
            "stride_px", pa.int32(), "Position (i, j) has its top at i * stride_px, its left at j * stride_px."
        ),
        tables.column("fill", pa.string(), "What the occluder shows: a grey 0 to 255, R,G,B, mean or blur."),
        tables.column("exact", pa.bool_(), "Whether every position was computed; false: interpolated in part."),
        tables.column(
            "dense_from", pa.string(), "First operation that was run whole, not in windows; the input where all were."
        ),
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column(
            "activation_map", pa.list_(pa.float32()), "Activation of the strongest map, summed over its cells."
        ),
        tables.column("probability_map", pa.list_(pa.float32()), "Probability of target_class."),
        tables.column("class_map", pa.list_(pa.int32()), "Most probable class."),
        *(
            tables.column(f"{name}_top5_{what}", pa.list_(kind), f"{doc} {which}.")
            for name, which in (
                ("clean", "of the image without a square"),
                ("lowest", "with the square where probability_map is lowest"),
            )
            for what, kind, doc in (
                ("classes", pa.int32(), "The five most probable classes, or all, best first,"),
                ("probabilities", pa.float32(), "Probabilities of the five most probable classes"),
            )
        ),
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
    ],
)

WITH_PROBABILITIES = pa.schema(
    [
        *OCCLUSION,
        tables.column(
            "probabilities",
            pa.list_(pa.float32()),
            "With --probabilities, those of all classes: grid_rows x grid_cols x classes.",
        ),
        tables.column(
            "probabilities_classes", pa.int32(), "With --probabilities, the number of classes in probabilities."
        ),
    ],
    OCCLUSION.metadata,
)


def schema(config: Config) -> pa.Schema:
    """The table's columns, with the probabilities of all classes where they are asked for."""
    return WITH_PROBABILITIES if config.probabilities else OCCLUSION


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for an occluder that does not fit, keys or classes that do not occur; Unprojectable."""
    context.model.require_classes(context.analysis)
    blank = torch.zeros(1, *context.graph.input_shape, device=context.device)
    deconv.record(context.graph, blank, [watched_layer(context.graph)])  # refuses what cannot be projected
    grids_of(context)
    samples(context, [SLICE])
    return [SLICE]


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each size and image that could be read."""
    return (int(samples(context, [slice_]).num_rows) - len(skipped)) * len(grids_of(context))


def grids_of(context: Context) -> list[Grid]:
    """The positions of every size of the occluder for this network's input."""
    config: Config = context.config
    side = context.model.preprocessing.crop_px
    grids = []
    for size in config.sizes:
        try:
            default = Grid.of(side, size and size[0], config.stride_px)
            width = None if size is None or size[0] == size[1] else size[1]
            grids.append(replace(default, occluder_width_px=width, overhang=config.overhang))
        except ValueError as error:
            raise RunError(str(error)) from None
    return grids


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """One image: its maps for every size, and the projection of its strongest cell."""
    (picture,) = batch.pictures
    config: Config = context.config
    fill, target = filled(context, batch), target_class(context, picture)
    try:
        found = [
            sensitivity(
                context.graph,
                batch.x[0],
                fill,
                grid,
                target,
                memory_mb=config.memory_mb,
                refine=config.refine,
                all_probabilities=config.probabilities,
            )
            for grid in grids_of(context)
        ]
    except ValueError as error:
        raise RunError(f"sample {picture.sample.key!r}: {error}") from None
    projection = _strongest_projection(context, batch, found[0].feature_map)  # the clean image's, whatever the size
    rows = [{**_describe(context, picture, of_size), **projection} for of_size in found]
    return pa.concat_tables([tables.conform(row, schema(config)) for row in rows])


def filled(context: Context, batch: Batch) -> Tensor:
    """[3, rows, cols]: what hides parts of the one picture, as the network takes it."""
    pixels = torch.from_numpy(batch.pictures[0].pixels.copy()).to(batch.x.device)
    return as_input(context.config.fill, pixels, context.model.preprocessing)


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
        "occluder_width_px": found.grid.width_px,
        "stride_px": found.grid.stride_px,
        "fill": context.config.fill,
        "exact": found.exact,
        "dense_from": found.dense_from,
        "layer": found.layer,
        "feature_map": found.feature_map,
        "image_png": png(picture.pixels),
    }
    maps = {
        name: [getattr(found, name).flatten().cpu().numpy()]
        for name in ("activation_map", "probability_map", "class_map")
    }
    for name in ("clean", "lowest"):
        best = getattr(found, f"{name}_probabilities").sort(descending=True, stable=True)
        maps[f"{name}_top5_classes"] = [best.indices[:5].cpu().numpy()]
        maps[f"{name}_top5_probabilities"] = [best.values[:5].cpu().numpy()]
    if found.probabilities is not None:
        maps["probabilities"] = [found.probabilities.flatten().cpu().numpy()]
        row["probabilities_classes"] = found.probabilities.shape[2]
    return {name: [value] for name, value in row.items()} | maps


def _strongest_projection(context: Context, batch: Batch, feature_map: int) -> dict[str, Any]:
    """Panel (c) of the figure: the strongest map's strongest cell, projected for this image."""
    layer = watched_layer(context.graph)
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
    return pa.concat_tables([schema(context.config).empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file, in index order."""
    yield Finished("occlusion", SLICE, schema(context.config), (tables.read(part) for part in parts))


ANALYSIS = Analysis(
    table="occlusion",
    tables=("occlusion",),
    module=__name__,
    part_schema=schema,
    slices=slices,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 1 + sum(computed_positions(grid, context.config.refine) for grid in grids_of(context)),
    expected_rows=expected_rows,
    selects=(),
    then="pictures.py --run {run} --data {data}",
)
