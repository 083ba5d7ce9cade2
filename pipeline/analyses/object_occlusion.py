"""Does the network look at the object? Its box hidden, against as much hidden elsewhere (ZFNet section 4.2).

A row for each image. Where the sample has a box of its class (`boxes` in its json): the probability of the class with
the box under grey, and with as many pixels outside it, around places drawn from a seed. Of a box that covers more than
half of the input only the middle is hidden, as much as lies outside. And for the strongest map of the last hidden
convolution: how much of its activity is lost to a grey square whose middle lies in the support of the map's projection,
against one whose middle lies outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import tables
from pipeline.analyses.chosen import target_class
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.objects import objects_of
from pipeline.projections import cut_to_image
from pipeline.runs import Run, RunError, named, require_at_least_one
from pipeline.storage import Location
from zfnet import deconv
from zfnet.boxes import Box, Mask, elsewhere, in_crop, mask, shrunk, squares_on, support
from zfnet.deconv import Cells
from zfnet.occlusion import Grid, watched_layer

SLICE = "images"
CLASSES_SAID = 10
"""Classes that the job names at its end, those that lose most; all are in the table."""
_DROPS = ["object_drop", "elsewhere_drop", "clean_probability"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of object_occlusion."""

    classes: tuple[str, ...] = ()
    """Classes of the images, by name; default all."""
    per_class: int = 20
    """At most this many images of each class, in the order of the shards."""
    places: int = 8
    """Places elsewhere that are hidden in turn; squares inside the support, and outside."""
    support: float = 0.5
    """The support of a projection: the fewest pixels that hold this share of its energy."""
    grey: int = 124
    """What hides, 0 to 255, filled in before the mean is subtracted."""
    seed: int = 0
    """Seed of the places."""
    part_size: int = 32
    """Images of a part, the unit of work and of resume."""

    @property
    def batch_size(self) -> int:
        """Images at a time: one, whose occluded copies fill the batch."""
        return 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "per_class", "places", "part_size")
        if not 0 < self.support < 1:
            raise RunError(f"--support is {self.support}: give a share between 0 and 1")
        if not 0 <= self.grey <= 255:
            raise RunError(f"--grey is {self.grey}: give a grey from 0 to 255")


SCHEMA = tables.schema(
    "object_occlusion",
    row="an image: what hiding its known object costs, against as much elsewhere",
    file="",
    key=("key",),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("target_class", pa.int32(), "Class whose probability is followed: the label, else clean_class."),
        tables.column("clean_class", pa.int32(), "Most probable class of the image as it is."),
        tables.column("clean_probability", pa.float64(), "Probability of target_class for the image as it is."),
        tables.or_null(
            "object_top", pa.int32(), "First row of the object's box in input pixels; null where there is none."
        ),
        tables.or_null("object_left", pa.int32(), "First column of the object's box."),
        tables.or_null("object_height", pa.int32(), "Height of the object's box."),
        tables.or_null("object_width", pa.int32(), "Width of the object's box."),
        tables.or_null("object_share", pa.float64(), "Share of the input that the box covers."),
        tables.or_null("hidden_share", pa.float64(), "Share of the box that is hidden, about its middle."),
        tables.or_null("object_probability", pa.float64(), "Probability of target_class with that hidden."),
        tables.or_null("object_drop", pa.float64(), "clean_probability - object_probability."),
        tables.or_null(
            "object_activity_drop", pa.float64(), "Share of the strongest map's activity that is lost with it."
        ),
        tables.column("places", pa.int32(), "Places elsewhere of as many pixels that were hidden in turn."),
        tables.or_null("elsewhere_probability", pa.float64(), "Mean probability of target_class with a place hidden."),
        tables.or_null("elsewhere_drop", pa.float64(), "clean_probability - elsewhere_probability; null at 0 places."),
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column("activity", pa.float64(), "Sum of the strongest map's activations for the image as it is."),
        tables.column("support_share", pa.float64(), "Share of the input that its projection's support covers."),
        tables.column("square_px", pa.int32(), "Side of the squares that hide parts of the support, in input pixels."),
        tables.column("inside", pa.int32(), "Squares with their middle in the support."),
        tables.column("outside", pa.int32(), "Squares with their middle beside it."),
        tables.or_null("inside_drop", pa.float64(), "Mean share of the activity that is lost to a square inside."),
        tables.or_null("outside_drop", pa.float64(), "The same of a square outside."),
    ],
)


def part_schema(config: Config) -> pa.Schema:
    """Columns of a part: those of the table."""
    return SCHEMA


def slices(context: Context) -> list[str]:
    """One slice. Raises: RunError for a network without classes, and classes that do not occur."""
    context.model.require_classes(context.analysis)
    samples(context, [SLICE])
    return [SLICE]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """The first images of each class, in index order. Raises: RunError for classes that do not occur."""
    config: Config = context.config
    rows, names = context.index.split(context.split), context.index.classes
    if unknown := [name for name in config.classes if name not in names]:
        raise RunError(f"there is no class {', '.join(map(repr, unknown))}: give some of {', '.join(names[:20])}")
    wanted = [names.index(name) for name in config.classes] or range(len(names))
    labels = rows["label"].to_numpy(zero_copy_only=False)
    places = [np.flatnonzero(labels == label)[: config.per_class] for label in wanted]
    return rows.take(pa.array(np.sort(np.concatenate([np.array([], np.int64), *places]))))


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each image that could be read."""
    return int(samples(context, [slice_]).num_rows) - len(skipped)


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """One image: what is lost to each occluder. All its copies go through the network together."""
    (picture,) = batch.pictures
    config: Config = context.config
    rng = _generator(config.seed, picture.sample.key)
    size = context.model.preprocessing.crop_px
    box, part, hidden = _hidden(context, picture, rng)
    layer, feature_map, projection = _strongest(context, batch.x)
    seen, side = support(projection, config.support), Grid.of(size).occluder_px
    inside, outside = (squares_on(places, side, config.places, rng) for places in (seen, ~seen))
    scores, activity = _run(context, picture, layer, feature_map, [*hidden, *inside, *outside])
    if not (np.isfinite(scores).all() and np.isfinite(activity).all()):
        raise RunError(f"sample {picture.sample.key!r} gives activations or scores that are not finite numbers")
    clean_class = int(np.argmax(scores[0]))
    label = target_class(context, picture)
    target = clean_class if label is None else label
    probability = scores[1:, target]
    lost = 1 - activity[1:] / activity[0] if activity[0] else np.full(len(activity) - 1, np.nan)
    beside = lost[len(hidden) :]
    row = {
        **context.identity,
        "key": picture.sample.key,
        "shard": picture.sample.shard,
        "label": picture.sample.label,
        "label_name": context.index.label_name(picture.sample.label),
        "target_class": target,
        "clean_class": clean_class,
        "clean_probability": scores[0, target],
        **{f"object_{side}": None if box is None else getattr(box, side) for side in Box._fields},
        "object_share": None if box is None else box.area / size**2,
        "hidden_share": None if box is None or part is None else part.area / box.area,
        "object_probability": _mean(probability[:1] if hidden else []),
        "object_drop": _mean(scores[0, target] - probability[:1] if hidden else []),
        "object_activity_drop": _mean(lost[:1] if hidden else []),
        "places": max(0, len(hidden) - 1),
        "elsewhere_probability": _mean(probability[1 : len(hidden)]),
        "elsewhere_drop": _mean(scores[0, target] - probability[1 : len(hidden)]),
        "layer": layer,
        "feature_map": feature_map,
        "activity": activity[0],
        "support_share": seen.mean(),
        "square_px": side,
        "inside": len(inside),
        "outside": len(outside),
        "inside_drop": _mean(beside[: len(inside)]),
        "outside_drop": _mean(beside[len(inside) :]),
    }
    return tables.conform({name: [value] for name, value in row.items()}, SCHEMA)


def _hidden(context: Context, picture: Picture, rng: np.random.Generator) -> tuple[Box | None, Box | None, list[Mask]]:
    """The object's box, what of it is hidden, and what is hidden in turn: that, then places elsewhere."""
    size = context.model.preprocessing.crop_px
    box = _object(context, picture)
    part = None if box is None or box.area == size**2 else shrunk(box, size)
    if box is None or part is None:
        return box, part, []
    return box, part, [mask(part, size), *elsewhere(box, part.area, size, context.config.places, rng)]


def _generator(seed: int, key: str) -> np.random.Generator:
    """The draws of an image depend on the seed and its key alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _mean(values: Sequence[float] | npt.NDArray[np.float64]) -> float | None:
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def _object(context: Context, picture: Picture) -> Box | None:
    """The largest box of the sample's class, in input pixels; None where it has none that lies in the crop."""
    crop, label = picture.crop, picture.sample.label
    found = []
    for top, left, bottom, right in objects_of(picture.sample, context.index.classes).of(
        -1 if label is None else label
    ):
        corners = crop.from_original(top, left)[:2] + crop.from_original(bottom, right)[:2]
        box = in_crop(corners, crop.size_px)
        found += [] if box is None else [box]
    return max(found, key=lambda box: box.area, default=None)


def _strongest(context: Context, x: Tensor) -> tuple[str, int, npt.NDArray[np.float32]]:
    """The last hidden convolution, its map with the largest single activation, and that cell's projection in place."""
    layer = watched_layer(context.graph)
    record = deconv.record(context.graph, x, [layer])
    maps = record.activation(layer)[0]
    feature_map, cell = divmod(int(maps.flatten().argmax()), maps[0].numel())
    row, col = divmod(cell, maps.shape[2])
    where = Cells(*(torch.tensor([place], device=x.device) for place in (0, feature_map, row, col)))
    projected = deconv.project(record, layer, where)
    window = projected.pixels[0].cpu().numpy()
    pixels, (top, left, height, width) = cut_to_image(context, window, int(projected.top[0]), int(projected.left[0]))
    whole = np.zeros((*x.shape[2:], 3), np.float32)
    whole[top : top + height, left : left + width] = pixels
    return layer, feature_map, whole


def _run(
    context: Context, picture: Picture, layer: str, feature_map: int, masks: list[Mask]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Probabilities [1 + masks, classes] and the map's summed activity, of the image and with each mask under grey."""
    graph, preprocessing = context.graph, context.model.preprocessing
    pixels = np.repeat(picture.pixels[None], 1 + len(masks), 0)
    for number, hidden in enumerate(masks, start=1):
        pixels[number, hidden] = context.config.grey
    target = graph.activation_of(layer)
    values = graph.run(preprocessing.normalise(torch.from_numpy(pixels).to(context.device)), [target, graph.output])
    scores = values[graph.output].double()
    probabilities = scores if graph.operations[graph.output].kind == "softmax" else scores.softmax(1)
    activity = values[target][:, feature_map].double().sum((1, 2))
    return probabilities.cpu().numpy(), activity.cpu().numpy()


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([SCHEMA.empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file, in index order."""
    yield Finished("object_occlusion", SLICE, SCHEMA, (tables.read(part) for part in parts))


def report(run: Run, name: str | None) -> Iterator[str]:
    """What is lost on average over all images, then in the classes that lose most."""
    table = named("object_occlusion", name)
    rows = tables.read(run.slice(table, SLICE)).to_pandas()
    boxed = rows.dropna(subset=["elsewhere_drop"])
    of = f"{len(boxed)} of {len(rows)} images have a box of their class"
    if len(boxed):
        mean = boxed[[*_DROPS, "hidden_share"]].mean()
        of += (
            f": hiding it (on average {mean.hidden_share:.0%} of it) costs {mean.object_drop:.3f} of a probability of "
            f"{mean.clean_probability:.3f}, as much elsewhere {mean.elsewhere_drop:.3f}"
        )
    both = rows[["inside_drop", "outside_drop"]].dropna().mean()
    if not both.isna().any():
        of += (
            f". The strongest map loses {both.inside_drop:.1%} to a square in its projection's support, "
            f"{both.outside_drop:.1%} beside it"
        )
    yield f"{table}: {of}"
    classes = boxed.groupby("label_name", sort=False)[_DROPS].agg(["mean", "size"])
    for label, row in classes.sort_values(("object_drop", "mean"), ascending=False).head(CLASSES_SAID).iterrows():
        lost, elsewhere_, clean = (row[(drop, "mean")] for drop in _DROPS)
        count = int(row[("object_drop", "size")])
        yield f"{table}: {label}, {count} images: the object {lost:.3f} of {clean:.3f}, elsewhere {elsewhere_:.3f}"


ANALYSIS = Analysis(
    table="object_occlusion",
    tables=("object_occlusion",),
    module=__name__,
    part_schema=part_schema,
    slices=slices,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 2 + 3 * int(context.config.places) + 1,
    expected_rows=expected_rows,
    selects=(),
    report=report,
)
