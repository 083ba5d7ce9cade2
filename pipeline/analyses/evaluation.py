"""How well the run's network classifies a split, alone or averaged with others (AlexNet and ZFNet, table 2).

Four tables: `predictions`, a row for each image; `confusion`, a row for each pair of a label and a predicted class that
occurs; `class_errors`, a row for each class; `evaluation`, one row for all. Errors are counts of images, losses are
sums over images, never means of batches. Images without a usable label are skipped, each with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import tyro

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context, read
from pipeline.runs import Model, Run, RunError, named, require_at_least_one
from pipeline.shards import Sample, Skipped, with_label
from pipeline.storage import Location
from pipeline.views import Crops, Viewer, Windows, checked_scales, sliding_of
from zfnet import evaluation, images
from zfnet.dense import MaximumOf, Stride
from zfnet.evaluation import Errors, Predictions
from zfnet.graph import Graph
from zfnet.tracing import trace

SLICE = "images"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of an evaluation."""

    views: Literal["centre", "ten", "overfeat"] = "centre"
    """What the network is shown of an image: its centre crop; or ten crops (corners, centre and their reflections),
    over which the softmax is averaged; or all windows of the image and its reflection at several scales, of which each
    class's strongest at each scale is averaged (OverFeat networks)."""
    scales: tuple[int, ...] = ()
    """Under overfeat: which of the paper's six; default all. Its four are 1 2 4 6."""
    stride: Stride = "fine"
    """Under overfeat: fine: windows at every offset of the last pool; coarse: at the first alone."""
    maximum_of: MaximumOf = "probabilities"
    """Under overfeat: each class's largest probability over the windows, or the softmax of its largest scores."""
    others: Annotated[tuple[str, ...], tyro.conf.arg(name="with")] = ()
    """Further runs; the softmax is averaged over the networks of all of them. Their order does not matter."""
    part_size: int = 256
    """Samples of a part, the unit of work and of resume."""
    batch_size: int = 32
    """Images that go through a network together, one view at a time."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "part_size", "batch_size")
        if self.views == "overfeat":
            checked_scales(self.scales)
        elif self.scales or self.stride != "fine" or self.maximum_of != "probabilities":
            raise RunError(f"--scales, --stride and --maximum-of go with --views overfeat; --views is {self.views}")


_WITH_MODEL_IDS = tables.column(
    "with_model_ids", pa.list_(pa.string()), "Further networks over which the softmax was averaged; empty: none."
)
_VIEWS = [
    tables.column("views", pa.string(), "What the network was shown of an image: centre, ten, or overfeat's windows."),
    tables.column("scales", pa.list_(pa.int32()), "Scales of overfeat's windows, from 1; empty for other views."),
    tables.or_null("stride", pa.string(), "Their distance: fine or coarse; null for other views."),
    tables.or_null("maximum_of", pa.string(), "Their probabilities or scores; null for other views."),
]
_HOW = [tables.MODEL_ID, _WITH_MODEL_IDS, tables.DATA_ID, *_VIEWS]
_IMAGES = tables.column("images", pa.int64(), "Images that were evaluated.")
_PREDICTED = [
    tables.column("predicted_class", pa.int32(), "Most probable class; of equals the one with the lowest number."),
    tables.column("predicted_name", pa.string(), "Its name."),
]

PREDICTIONS = tables.schema(
    "predictions",
    row="an image: its most probable classes and its loss",
    file="",
    key=("key",),
    columns=[
        *_HOW,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        *_PREDICTED,
        tables.column("label_rank", pa.int32(), "Place of the label among all classes by probability, from 1."),
        tables.column("loss", pa.float64(), "Cross-entropy: minus the natural logarithm of the label's probability."),
        tables.column("top5_classes", pa.list_(pa.int32()), "The five most probable classes, or all, best first."),
        tables.column("top5_probabilities", pa.list_(pa.float32()), "Their probabilities."),
    ],
)

CONFUSION = tables.schema(
    "confusion",
    row="a label and a class that was predicted for it",
    file="",
    key=("label", "predicted_class"),
    columns=[
        *_HOW,
        tables.LABEL,
        tables.LABEL_NAME,
        *_PREDICTED,
        tables.column("images", pa.int64(), "Images of this label for which this class was the most probable."),
    ],
)

CLASS_ERRORS = tables.schema(
    "class_errors",
    row="a class and its errors",
    file="",
    key=("label",),
    columns=[
        *_HOW,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("images", pa.int64(), "Images of this class that were evaluated."),
        tables.column("top1_wrong", pa.int64(), "Those whose label is not the most probable class."),
        tables.column("top5_wrong", pa.int64(), "Those whose label is not among the five most probable classes."),
        tables.or_null("top1_error", pa.float64(), "top1_wrong / images; null without images."),
        tables.or_null("top5_error", pa.float64(), "top5_wrong / images; null without images."),
    ],
)

EVALUATION = tables.schema(
    "evaluation",
    row="the errors of all images",
    file="",
    key=("split",),
    columns=[
        *_HOW,
        tables.column("split", pa.string(), "Split of the shards."),
        _IMAGES,
        tables.column("top1_wrong", pa.int64(), "Images whose label is not the most probable class."),
        tables.column("top5_wrong", pa.int64(), "Images whose label is not among the five most probable classes."),
        tables.column("top1_error", pa.float64(), "top1_wrong / images."),
        tables.column("top5_error", pa.float64(), "top5_wrong / images."),
        tables.column("mean_class_accuracy", pa.float64(), "Mean of 1 - top1_error over the classes that have images."),
        tables.column("loss", pa.float64(), "Mean of the images' losses."),
    ],
)


def resolve(context: Context) -> Config:
    """With absolute paths: a worker's current folder is not the driver's."""
    config: Config = context.config
    scales = checked_scales(config.scales) if config.views == "overfeat" else ()
    return replace(config, scales=scales, others=tuple(str(Location.of(path)) for path in config.others))


def networks(context: Context) -> list[Viewer]:
    """The run's network and the further ones, sorted by model_id.

    Raises: RunError for one without a classifier, of other classes than the run's, that cannot have these views, or
        given twice.
    """
    found = [(context.model, context.graph)]
    for path in context.config.others:
        model = Run.at(path).load_model()
        model.network.to(context.device)
        side = model.preprocessing.crop_px
        found.append((model, trace(model.network, (3, side, side))))
        _agreed(context.model.classes, model.classes, f"--with {path}", "give runs of networks with the same classes")
    viewers = []
    for (model, graph), path in zip(found, [context.run.location, *context.config.others], strict=True):
        outputs = graph[graph.output].shape
        if tuple(outputs) != (len(model.classes),):
            raise RunError(
                f"{path}: the network gives {list(outputs)} numbers for an image and has {len(model.classes)} "
                "classes: only a classifier can be evaluated, give a run with one"
            )
        viewers.append(_viewer(context.config, model, graph, path))
    ids = [viewer.model.model_id for viewer in viewers]
    if len(set(ids)) < len(ids):
        raise RunError(f"the runs hold the models {', '.join(ids)}, one of them twice: give each network once")
    return sorted(viewers, key=lambda viewer: viewer.model.model_id)


def _viewer(config: Config, model: Model, graph: Graph, path: object) -> Viewer:
    if config.views == "overfeat":
        return Windows(model, sliding_of(model, path), config.scales, config.stride, config.maximum_of)
    return Crops(model, graph, config.views)


def class_names(context: Context) -> tuple[str, ...]:
    """Names of the network's classes, which the labels count. Raises: RunError where the shards have others."""
    known, labels = context.model.classes, context.index.classes
    if _unnamed(labels) and len(labels) <= len(known):
        return known
    what_to_do = (
        "the labels must count the network's classes. If they do and only the names differ, import the network again "
        "with --classes CLASSES.TXT of the shards; else give other shards"
    )
    return _agreed(known, labels, f"the index of {context.index.folder}", what_to_do)


def _agreed(known: tuple[str, ...], found: tuple[str, ...], who: str, what_to_do: str) -> tuple[str, ...]:
    """The names of the same classes, of which one side may have numbers alone. Raises: RunError."""
    if len(known) != len(found):
        raise RunError(f"{who} has {len(found)} classes and the network of --run {len(known)}: {what_to_do}")
    if known == found or _unnamed(found):
        return known
    if _unnamed(known):
        return found
    number = next(i for i, (one, other) in enumerate(zip(known, found, strict=True)) if one != other)
    raise RunError(
        f"{who} has other classes than the network of --run: class {number} is {found[number]!r} there and "
        f"{known[number]!r} in the network: {what_to_do}"
    )


def _unnamed(classes: tuple[str, ...]) -> bool:
    return all(name == str(number) for number, name in enumerate(classes))


def slices(context: Context) -> list[str]:
    """One. Raises: RunError for networks and shards that do not go together, and where there is not one label."""
    networks(context)
    class_names(context)
    labels = context.index.split(context.split)["label"]
    if not pc.any(pc.less(labels, len(context.index.classes))).as_py():
        raise RunError(
            f"no image of the split {context.split!r} has a label below {len(context.index.classes)}: evaluation needs "
            "samples with a class number, KEY.cls"
        )
    return [SLICE]


def sources(context: Context, slice_: str) -> dict[str, Any]:
    """The further networks are part of what decides the content; where they lie is not."""
    ids = _model_ids(context)
    return {"with": [id_ for id_ in ids if id_ != context.model.model_id]} if len(ids) > 1 else {}


def _model_ids(context: Context) -> list[str]:
    """Of all networks, sorted."""
    return sorted([context.model.model_id, *(str(Run.at(p).describe()["model_id"]) for p in context.config.others)])


def samples(context: Context, slices: list[str]) -> pa.Table:
    """All samples of the split; those without a usable label are skipped on the way, and counted."""
    return context.index.split(context.split)


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each image that was not skipped."""
    return int(samples(context, [slice_]).num_rows) - len(skipped)


@dataclass(frozen=True, eq=False)
class Viewed:
    """A decoded sample, and for each geometry what is seen of it."""

    sample: Sample
    seen: dict[tuple[Any, ...], Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, and for each geometry what is seen of them, on the device."""

    pictures: list[Viewed]
    seen: dict[tuple[Any, ...], Any]


def decode(context: Context, networks: list[Viewer], rows: pa.Table) -> tuple[list[Viewed], list[Skipped]]:
    """The images with a label, decoded once, and cropped once for all networks of one geometry."""
    rows, unlabelled = with_label(rows, len(context.index.classes))
    viewers = {network.geometry: network for network in networks}
    sides = set().union(*(viewer.sides for viewer in viewers.values()))

    def look(sample: Sample, number: int) -> Viewed:
        resized, original = images.decode_resized(sample.image, sides, scaled=context.decode == "scaled")
        return Viewed(sample, {geometry: viewer.look(resized, original) for geometry, viewer in viewers.items()})

    viewed, skipped = read(context, rows, look)
    return viewed, unlabelled + skipped


def as_batch(context: Context, networks: list[Viewer], viewed: list[Viewed]) -> Batch:
    """What each geometry sees of them, stacked on the device."""
    viewers = {network.geometry: network for network in networks}
    seen = {
        geometry: viewer.stack([picture.seen[geometry] for picture in viewed], context.device)
        for geometry, viewer in viewers.items()
    }
    return Batch(viewed, seen)


def map_batch(context: Context, networks: list[Viewer], batch: Batch) -> pa.Table:
    """The rows of predictions of a batch."""
    found = [network.log_probabilities(batch.seen[network.geometry]) for network in networks]
    averaged = evaluation.average(found)
    if context.config.views == "overfeat":  # the largest of each class over windows do not sum to one
        averaged = averaged.log_softmax(1)
    samples = [picture.sample for picture in batch.pictures]
    labels = [sample.label for sample in samples]
    said = Predictions.of(averaged, torch.tensor(labels, device=context.device))
    names = class_names(context)
    classes = said.classes.cpu().numpy()
    columns = {
        **_how(context, [network.model.model_id for network in networks], len(samples)),
        "key": [sample.key for sample in samples],
        "shard": [sample.shard for sample in samples],
        "label": labels,
        "label_name": pa.array(names).take(pa.array(labels)),
        "predicted_class": classes[:, 0],
        "predicted_name": pa.array(names).take(pa.array(classes[:, 0])),
        "label_rank": said.label_rank.cpu().numpy(),
        "loss": said.loss.cpu().numpy(),
        "top5_classes": tables.flat_lists(list(classes), pa.int32()),
        "top5_probabilities": tables.flat_lists(list(said.probabilities.float().cpu().numpy()), pa.float32()),
    }
    return tables.conform(columns, PREDICTIONS)


def _how(context: Context, model_ids: list[str], count: int) -> dict[str, Any]:
    """The columns that say how it was evaluated, for this many rows."""
    config: Config = context.config
    others = [id_ for id_ in model_ids if id_ != context.model.model_id]
    slid = config.views == "overfeat"
    how = {
        **context.identity,
        "with_model_ids": others,
        "views": config.views,
        "scales": config.scales,
        "stride": config.stride if slid else None,
        "maximum_of": config.maximum_of if slid else None,
    }
    return {name: [value] * count for name, value in how.items()}


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part, in index order."""
    return pa.concat_tables([PREDICTIONS.empty_table(), *results])


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """The predictions in index order, and what is counted of them."""
    yield Finished("predictions", SLICE, PREDICTIONS, (tables.read(part) for part in parts))
    columns = ["label", "predicted_class", "label_rank", "loss"]
    rows = pa.concat_tables([tables.read(part, columns) for part in parts])
    label, predicted, rank, loss = (rows[name].to_numpy() for name in columns)
    names = class_names(context)
    errors = Errors.of(label, rank, len(names))
    yield Finished("confusion", SLICE, CONFUSION, iter([_confusion(context, names, label, predicted)]))
    yield Finished("class_errors", SLICE, CLASS_ERRORS, iter([_class_errors(context, names, errors)]))
    yield Finished("evaluation", SLICE, EVALUATION, iter([_in_all(context, errors, loss)]))


def _confusion(context: Context, names: tuple[str, ...], label: Any, predicted: Any) -> pa.Table:
    pairs, counts = np.unique(np.stack([label, predicted]), axis=1, return_counts=True)
    columns = {
        **_how(context, _model_ids(context), len(counts)),
        "label": pairs[0],
        "label_name": [names[number] for number in pairs[0]],
        "predicted_class": pairs[1],
        "predicted_name": [names[number] for number in pairs[1]],
        "images": counts,
    }
    return tables.conform(columns, CONFUSION)


def _class_errors(context: Context, names: tuple[str, ...], errors: Errors) -> pa.Table:
    shares = {
        f"{name}_error": [wrong / count if count else None for wrong, count in zip(some, errors.images, strict=True)]
        for name, some in (("top1", errors.top1), ("top5", errors.top5))
    }
    columns = {
        **_how(context, _model_ids(context), len(names)),
        "label": np.arange(len(names)),
        "label_name": list(names),
        "images": errors.images,
        "top1_wrong": errors.top1,
        "top5_wrong": errors.top5,
        **shares,
    }
    return tables.conform(columns, CLASS_ERRORS)


def _in_all(context: Context, errors: Errors, loss: Any) -> pa.Table:
    images_, top1, top5 = (int(counts.sum()) for counts in (errors.images, errors.top1, errors.top5))
    row = {
        **{name: value for name, (value,) in _how(context, _model_ids(context), 1).items()},
        "split": context.split,
        "images": images_,
        "top1_wrong": top1,
        "top5_wrong": top5,
        "top1_error": top1 / images_,
        "top5_error": top5 / images_,
        "mean_class_accuracy": errors.mean_class_accuracy,
        "loss": math.fsum(loss) / images_,  # the sum is exact, so it has no order
    }
    return tables.conform({name: [value] for name, value in row.items()}, EVALUATION)


def forwards(context: Context) -> int:
    """Of each network: views, or scales and their reflections, whatever their size."""
    config: Config = context.config
    views = 2 * len(config.scales) if config.views == "overfeat" else evaluation.VIEWS[config.views]
    return (1 + len(config.others)) * views


def report(run: Run, name: str | None) -> Iterator[str]:
    """The errors."""
    table = named("evaluation", name)
    (row,) = tables.read(run.slice(table, SLICE)).to_pylist()
    others = len(row["with_model_ids"])
    averaged = f", average of {1 + others} networks" if others else ""
    scales = f" ({row['stride']}, scales {' '.join(map(str, row['scales']))})" if row["scales"] else ""
    yield (
        f"{table}: {row['images']} images, views {row['views']}{scales}{averaged}: "
        f"top-1 error {row['top1_error']:.2%} ({row['top1_wrong']} wrong), "
        f"top-5 error {row['top5_error']:.2%} ({row['top5_wrong']} wrong), "
        f"mean per-class accuracy {row['mean_class_accuracy']:.2%}, loss {row['loss']:.4f}"
    )


ANALYSIS = Analysis(
    table="predictions",
    then="top9.py --run {run} --data {data}",
    tables=("predictions", "confusion", "class_errors", "evaluation"),
    module=__name__,
    part_schema=lambda config: PREDICTIONS,
    resolve=resolve,
    selects=("others",),
    slices=slices,
    sources=sources,
    samples=samples,
    setup=lambda context, slices: networks(context),
    decode=decode,
    batch=as_batch,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=forwards,
    expected_rows=expected_rows,
    report=report,
)
