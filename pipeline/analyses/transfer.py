"""Do the features of a layer transfer: a new linear classifier on N images a class (ZFNet sections 5.2, 5.3).

A row for each layer, classifier and N. The images of all splits are drawn anew for each fold: the largest N of each
class to train on, and up to --test-images of the others to test on, the same ones for every N. Images that
`transfer_duplicates` found in another set are left out first. Needs the table `features`, no images and no Ray.
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
from pipeline.analyses.vectors import Vectors
from pipeline.derive import Context, Derivation, source
from pipeline.progress import say
from pipeline.runs import RunError
from zfnet import transfer
from zfnet.transfer import Classifier, TooFewImages


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of transfer."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table."""
    features: str = "features"
    """Table to read: features, or features-NAME."""
    splits: tuple[str, ...] = ()
    """Splits whose images are drawn from, taken together; default all of the table."""
    classifiers: tuple[Classifier, ...] = ("softmax", "svm")
    """What is trained on the features."""
    images_per_class: tuple[int, ...] = (15, 30)
    """Images to train on, of each class; several numbers give the curve."""
    folds: int = 5
    """Draws of the images."""
    test_images: int = 50
    """Images to test on, of each class at most."""
    softmax_c: float = 10.0
    """Weight of the images' losses against the penalty on the weights (scikit-learn's C), for softmax."""
    svm_c: float = 1.0
    """The same for svm."""
    seed: int = 0
    """Decides the draws, with the fold."""
    duplicates: str | None = None
    """Table of images to leave out: transfer_duplicates, or transfer_duplicates-NAME; default none."""

    def __post_init__(self) -> None:
        for name in ("folds", "test_images", "softmax_c", "svm_c"):
            if not getattr(self, name) > 0:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        if not self.images_per_class or min(self.images_per_class) < 1:
            raise RunError(f"--images-per-class is {self.images_per_class}: give numbers from 1 on")
        if not self.classifiers:
            raise RunError("no --classifiers: give softmax, svm or both")

    def c(self, classifier: Classifier) -> float:
        """Of this classifier."""
        return self.softmax_c if classifier == "softmax" else self.svm_c


_DOUBLES = pa.list_(pa.float64())

SCHEMA = tables.schema(
    "transfer",
    row="a new classifier on a layer's features, trained on so many images a class",
    file="layer",
    key=("layer", "classifier", "images_per_class"),
    columns=[
        tables.MODEL_ID,
        tables.column("data_id", pa.string(), "Identity of the images: those of the splits, joined by '+'."),
        tables.LAYER,
        tables.column(
            "classifier", pa.string(), "softmax (logistic regression) or svm (linear, one class against all)."
        ),
        tables.column("images_per_class", pa.int32(), "Images of each class that it was trained on."),
        tables.column("accuracy", pa.float64(), "Mean over folds and classes of the share predicted right, 0 to 1."),
        tables.or_null("spread", pa.float64(), "Standard deviation over folds (n - 1); null for one."),
        tables.column("fold_accuracy", _DOUBLES, "Of each fold: mean over classes of the share predicted right."),
        tables.column("class_labels", pa.list_(pa.int32()), "The classes, ascending."),
        tables.column("class_accuracy", _DOUBLES, "Of each of these classes: mean over folds of the share right."),
        tables.column("converged", pa.bool_(), "Whether the solver converged in every fold."),
        tables.column("values", pa.int32(), "Values of an image's features."),
        tables.column("test_images", pa.int32(), "Images that were tested in each fold."),
        tables.column("duplicates", pa.int32(), "Images that were left out because another set holds them."),
        tables.column("c", pa.float64(), "Weight of the losses against the penalty."),
    ],
)


def slices(context: Context) -> list[str]:
    """The layers that are wanted."""
    config: Config = context.config
    return vectors.layers(context, config.features, config.layers, config.splits)


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The features, and the images to leave out."""
    found = Vectors.of(context, context.config.features, layer, context.config.splits).sources()
    table = context.config.duplicates
    return found | {f"{table}/{slice_}": source(context, table, slice_) for slice_ in _duplicates(context)}


def _duplicates(context: Context) -> list[str]:
    """The slices of the table of duplicates: one for each layer by which they were found."""
    table = context.config.duplicates
    if table is None:
        return []
    if not (found := list(context.run.manifest(table))):
        raise RunError(f"there is no table {table} in {context.run.location}: run jobs/transfer_duplicates.py first")
    return found


@dataclass(frozen=True, eq=False)
class Data:
    """The labelled images to draw from, by split and key."""

    data_id: str
    features: npt.NDArray[np.float32]
    """[N, values]"""
    labels: npt.NDArray[np.int64]
    duplicates: int
    """Images that were left out."""


def read(context: Context, layer: str) -> Data:
    """All of a layer's features in memory. Raises: RunError where no image has a label."""
    found = Vectors.of(context, context.config.features, layer, context.config.splits)
    images = found.images()
    left_out = set()
    for slice_ in _duplicates(context):
        rows = tables.read(context.run.slice(context.config.duplicates, slice_), ["split", "key"])
        left_out |= set(zip(rows["split"].to_pylist(), rows["key"].to_pylist(), strict=True))
    pairs = zip(images["split"].to_pylist(), images["key"].to_pylist(), strict=True)
    duplicate = np.array([pair in left_out for pair in pairs])
    labelled = ~np.isnan(images["label"].to_numpy().astype(np.float64))
    order = vectors.in_order(images)
    order = order[(labelled & ~duplicate)[order]]
    if not len(order):
        raise RunError(f"no image of {layer} in {context.config.features} has a label: give shards with classes")
    return Data(
        "+".join(dict.fromkeys(images["data_id"].to_pylist())),
        np.concatenate(list(found.blocks()))[order],
        images["label"].to_numpy()[order].astype(np.int64),
        int(duplicate.sum()),
    )


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The rows of a layer. Says each accuracy."""
    config: Config = context.config
    data = read(context, layer)
    try:
        draws = [
            transfer.draw(data.labels, max(config.images_per_class), config.test_images, config.seed, fold)
            for fold in range(config.folds)
        ]
    except TooFewImages as error:
        raise RunError(
            f"--images-per-class {max(config.images_per_class)}: {error}, or give shards without the class"
        ) from None
    for per_class in sorted(set(config.images_per_class)):
        found: dict[Classifier, list[Any]] = {name: [] for name in config.classifiers}
        for draw in draws:
            train = draw.train(per_class)
            given, tested = transfer.scaled(data.features[train], data.features[draw.test])
            for name, results in found.items():
                classifier, converged = transfer.fitted(name, config.c(name), given, data.labels[train])
                right = transfer.class_accuracies(classifier.predict(tested), data.labels[draw.test])
                results.append((right, converged, len(draw.test)))
        for name, results in found.items():
            yield _row(context, layer, data, name, per_class, results)


def _row(
    context: Context, layer: str, data: Data, classifier: Classifier, per_class: int, results: list[Any]
) -> pa.Table:
    accuracies = np.stack([right for right, _, _ in results])
    folds = accuracies.mean(1)
    spread = float(folds.std(ddof=1)) if len(folds) > 1 else None
    row = {
        "model_id": context.model.model_id,
        "data_id": data.data_id,
        "layer": layer,
        "classifier": classifier,
        "images_per_class": per_class,
        "accuracy": float(folds.mean()),
        "spread": spread,
        "fold_accuracy": folds.tolist(),
        "class_labels": np.unique(data.labels).tolist(),
        "class_accuracy": accuracies.mean(0).tolist(),
        "converged": all(converged for _, converged, _ in results),
        "values": data.features.shape[1],
        "test_images": results[0][2],
        "duplicates": data.duplicates,
        "c": context.config.c(classifier),
    }
    about = "" if spread is None else f" +- {100 * spread:.1f}"
    say(f"{context.table}: {layer}, {classifier}, {per_class} a class: {100 * row['accuracy']:.1f}{about} %")
    return tables.conform({name: [value] for name, value in row.items()}, SCHEMA)


ANALYSIS = Derivation(table="transfer", schema=SCHEMA, slices=slices, sources=sources, make=make)
