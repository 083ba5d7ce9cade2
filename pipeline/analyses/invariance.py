"""Invariance: how far features move when the image is moved, enlarged or turned (ZFNet on arXiv v3, figure 5).

A row for each image, transform, amount and layer: the Euclidean distance of the layer's features from those of the
image as it is, and the probability of the true class. The altered images are made of the network's own input pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analyses.chosen import Chosen, samples, target_class
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.fills import colour
from pipeline.runs import Run, RunError, named, require_at_least_one
from pipeline.storage import Location
from zfnet.activations import NotFinite
from zfnet.features import first_layer, last_hidden_layer
from zfnet.invariance import BORDERS, TRANSFORMS, Border, Interpolation, Response, Transform, altered, response

SLICE = "images"
PAPERS_PX = 224
SMALLEST_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(Chosen):
    """What decides the content of invariance."""

    first: int = 5
    """At most this many images, in the order of the shards (of the class, where one is given); the paper shows 5."""
    layers: tuple[str, ...] = ()
    """Layers to compare; default the first and the last hidden one (the paper's layers 1 and 7), or what the classes
    are computed from where there is no hidden fully connected layer."""
    transforms: tuple[Transform, ...] = TRANSFORMS
    """What is done to the images: moved down, moved to the right, enlarged about the centre, turned about it."""
    translations_px: tuple[float, ...] = ()
    """Amounts of vertical (down) and horizontal (to the right) in input pixels; default -60 to 60 in steps of 10 at an
    input of 224, in proportion."""
    scales: tuple[float, ...] = tuple(round(1 + step / 10, 1) for step in range(9))
    """Amounts of scale, above 1 enlarges; default 1 to 1.8 in steps of 0.1."""
    rotations_deg: tuple[float, ...] = tuple(float(step) for step in range(0, 360, 10))
    """Amounts of rotation, counter-clockwise; default 0 to 350 in steps of 10."""
    interpolation: Interpolation = "bilinear"
    """Between pixels, where the altered image's fall between those of the image."""
    fill: str = "124"
    """What is shown where the image ends: a grey from 0 to 255, a colour as R,G,B, edge (its outermost pixels), reflect
    (its mirror image) or wrap (itself again)."""
    part_size: int = 4
    """Images of a part, the unit of work and of resume."""
    copies: int = 32
    """Altered copies that go through the network together."""

    @property
    def batch_size(self) -> int:
        """Images at a time: one, whose altered copies fill the batch."""
        return 1

    @property
    def shown(self) -> Border | tuple[int, ...]:
        """What is shown beyond the image. Raises: RunError."""
        return self.fill if self.fill in BORDERS else colour(self.fill, "edge, reflect or wrap")

    def amounts(self) -> list[tuple[Transform, float]]:
        """Every altered copy of an image, in the order of the rows."""
        of = {"scale": self.scales, "rotation": self.rotations_deg}
        return [(name, amount) for name in self.transforms for amount in of.get(name, self.translations_px)]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "part_size", "copies")
        for name in ("layers", "transforms", "translations_px", "scales", "rotations_deg"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise RunError(f"--{name.replace('_', '-')} is {' '.join(map(str, given))}: give each once")
        if not all(SMALLEST_SCALE <= scale < float("inf") for scale in self.scales):
            raise RunError(f"--scales is {' '.join(map(str, self.scales))}: give ratios of at least {SMALLEST_SCALE}")
        if not all(np.isfinite(degrees) for degrees in self.rotations_deg):
            raise RunError(f"--rotations-deg is {' '.join(map(str, self.rotations_deg))}: give degrees")
        _ = self.shown


INVARIANCE = tables.schema(
    "invariance",
    row="an image, moved, enlarged or turned, at a layer: how far its features move",
    file="",
    key=("layer", "key", "transform", "amount"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("transform", pa.string(), "What was done: vertical, horizontal, scale or rotation."),
        tables.column("amount", pa.float64(), "Input pixels down or to the right; ratio; degrees counter-clockwise."),
        tables.LAYER,
        tables.column(
            "distance", pa.float64(), "Euclidean distance of the layer's features from those of the clean image."
        ),
        tables.or_null(
            "relative_distance",
            pa.float64(),
            "The same, divided by the length of the clean image's feature vector; null where that is 0.",
        ),
        tables.or_null(
            "target_class",
            pa.int32(),
            "Class of probability: the label, or the clean class without one; null in a network without classes.",
        ),
        tables.or_null("probability", pa.float32(), "Probability of target_class; null in a network without classes."),
        tables.or_null("clean_probability", pa.float32(), "The same of the clean image."),
    ],
)


def resolve(context: Context) -> Config:
    """The layers and the translations by name and number. Raises: RunError where there is no such layer to choose."""
    config: Config = context.config
    side = context.model.preprocessing.crop_px
    default = tuple(float(round(step * 10 * side / PAPERS_PX)) for step in range(-6, 7))
    try:
        layers = config.layers or (first_layer(context.graph), last_hidden_layer(context.graph, _has_classes(context)))
    except ValueError as error:
        raise RunError(str(error)) from None
    return replace(config, layers=tuple(dict.fromkeys(layers)), translations_px=config.translations_px or default)


def _has_classes(context: Context) -> bool:
    return bool(context.model.classes)


def slices(context: Context) -> list[str]:
    """One. Raises: UnknownLayer; RunError for amounts that leave nothing of the image, unknown keys or classes."""
    side = context.model.preprocessing.crop_px
    config: Config = context.config
    if not all(abs(amount) < side for amount in config.translations_px):
        raise RunError(
            f"--translations-px is {' '.join(map(str, config.translations_px))}: the input has {side} px, so give "
            f"amounts between -{side} and {side}"
        )
    for layer in config.layers:
        context.graph.activation_of(layer)
    samples(context, [SLICE])
    return [SLICE]


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """One image: a row for each transform, amount and layer. Copies that are equal go through the network once."""
    (picture,) = batch.pictures
    config: Config = context.config
    places: dict[bytes, int] = {picture.pixels.tobytes(): 0}
    distinct, place_of = [picture.pixels], []
    for transform, amount in config.amounts():
        copy = altered(picture.pixels, transform, amount, config.interpolation, config.shown)
        place = places.setdefault(copy.tobytes(), len(distinct))
        distinct += [copy] if place == len(distinct) else []
        place_of.append(place)
    x = context.model.preprocessing.normalise(torch.from_numpy(np.stack(distinct)).to(batch.x.device))
    try:
        found = response(context.graph, x, config.layers, config.copies)
    except NotFinite as error:
        raise NotFinite(0, error.feature_map) from None  # the copies are of one image
    return _rows(context, picture, found, place_of)


def _rows(context: Context, picture: Picture, found: Response, place_of: list[int]) -> pa.Table:
    config: Config = context.config
    amounts, layers = config.amounts(), config.layers
    count, each = len(amounts) * len(layers), len(layers)
    distance = np.stack([found.distance[layer].cpu().numpy()[place_of] for layer in layers], axis=1).ravel()
    length = np.tile([found.length[layer] for layer in layers], len(amounts))
    target, probability = _probabilities(context, picture, found)
    sample = picture.sample
    about = {
        **context.identity,
        "key": sample.key,
        "shard": sample.shard,
        "label": sample.label,
        "label_name": context.index.label_name(sample.label),
        "target_class": target,
        "clean_probability": None if probability is None else probability[0],
    }
    columns: dict[str, Any] = {
        **{name: [value] * count for name, value in about.items()},
        "transform": [transform for transform, _ in amounts for _ in layers],
        "amount": [amount for _, amount in amounts for _ in layers],
        "layer": list(layers) * len(amounts),
        "distance": distance,
        "relative_distance": pa.array(distance / np.where(length > 0, length, 1), mask=length == 0),
        "probability": [None] * count if probability is None else np.repeat(probability[place_of], each),
    }
    return tables.conform(columns, INVARIANCE)


def _probabilities(context: Context, picture: Picture, found: Response) -> tuple[int | None, np.ndarray | None]:
    """The target class and its probability for every copy; nothing in a network without classes."""
    if not _has_classes(context):
        return None, None
    is_softmax = context.graph[context.graph.output].kind == "softmax"
    probabilities = (found.output if is_softmax else found.output.softmax(1)).cpu().numpy()
    target = target_class(context, picture)
    target = int(probabilities[0].argmax()) if target is None else target
    return target, probabilities[:, target]


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([INVARIANCE.empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file, in index order."""
    yield Finished("invariance", SLICE, INVARIANCE, (tables.read(part) for part in parts))


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each transform, amount and layer of each image that could be read."""
    config: Config = context.config
    return (int(samples(context, [slice_]).num_rows) - len(skipped)) * len(config.amounts()) * len(config.layers)


def report(run: Run, name: str | None) -> Iterator[str]:
    """For each transform, how far features move and what becomes of the probability, on average over its amounts."""
    table = named("invariance", name)
    rows = tables.read(run.slice(table, SLICE)).to_pandas()
    for transform, altered_ in rows[rows.distance > 0].groupby("transform", sort=False):
        layers = altered_.groupby("layer", sort=False).relative_distance.mean()
        moved = ", ".join(f"{layer} {distance:.2f}" for layer, distance in layers.items())
        means = altered_[["probability", "clean_probability"]].mean()
        kept = (
            "" if means.isna().any() else f"; probability {means.iloc[0]:.3f}, of the clean image {means.iloc[1]:.3f}"
        )
        yield f"{table}: {transform}: features move by this share of their length: {moved}{kept}"


ANALYSIS = Analysis(
    table="invariance",
    tables=("invariance",),
    module=__name__,
    part_schema=lambda config: INVARIANCE,
    resolve=resolve,
    selects=(),
    slices=slices,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 1 + len(context.config.amounts()),
    expected_rows=expected_rows,
    report=report,
)
