"""Images with several classes each, by PASCAL's protocol: a softmax and the average precision (ZFNet section 5.2).

The paper trains a softmax over PASCAL's 20 classes on fixed features, which names one class exclusively, and ranks the
test images by each class's probability. The classes of an image are those of the boxes in its json, its own class
where there are none. How the paper trains on an image of several classes is not said: here it counts once for each
of them. A row for each layer and class. Needs the table `features`, no images and no Ray.
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
from pipeline.derive import Context, Derivation
from pipeline.progress import say
from pipeline.runs import RunError
from zfnet import transfer


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of multilabel."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table."""
    features: str = "features"
    """Table to read: features, or features-NAME."""
    train: tuple[str, ...] = ("train",)
    """Splits to train on."""
    test: tuple[str, ...] = ("val",)
    """Splits to test on."""
    softmax_c: float = 10.0
    """Weight of the images' losses against the penalty on the weights (scikit-learn's C)."""

    def __post_init__(self) -> None:
        if not self.softmax_c > 0:
            raise RunError(f"--softmax-c is {self.softmax_c}: give a number above 0")
        if not self.train or not self.test or set(self.train) & set(self.test):
            raise RunError(
                f"--train is {' '.join(self.train) or 'empty'} and --test {' '.join(self.test) or 'empty'}: "
                "give each a split that the other has not"
            )


SCHEMA = tables.schema(
    "multilabel",
    row="a class on images of several classes: its average precision",
    file="layer",
    key=("layer", "label_name"),
    columns=[
        tables.MODEL_ID,
        tables.column("data_id", pa.string(), "Identity of the images: those of all splits, joined by '+'."),
        tables.LAYER,
        tables.column("label_name", pa.string(), "The class: one that an image to train on has."),
        tables.or_null("average_precision", pa.float64(), "Area under precision over recall; null without a positive."),
        tables.column("train_positives", pa.int32(), "Images with the class, of those trained on."),
        tables.column("test_positives", pa.int32(), "Images with the class, of those tested."),
        tables.column("train_images", pa.int32(), "Images that were trained on."),
        tables.column("test_images", pa.int32(), "Images that were tested."),
        tables.column("converged", pa.bool_(), "Whether the solver converged."),
    ],
)


def slices(context: Context) -> list[str]:
    """The layers that are wanted."""
    config: Config = context.config
    return vectors.layers(context, config.features, config.layers, (*config.train, *config.test))


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The features to train on and to test."""
    config: Config = context.config
    return Vectors.of(context, config.features, layer, (*config.train, *config.test)).sources()


@dataclass(frozen=True, eq=False)
class Data:
    """The images of some splits that have a class, by split and key."""

    data_ids: list[str]
    features: npt.NDArray[np.float32]
    """[N, values]"""
    classes: list[list[str]]
    """Of each image."""

    def having(self, name: str) -> npt.NDArray[np.bool_]:
        """[N] whether an image has the class."""
        return np.array([name in names for names in self.classes])


def read(context: Context, layer: str, splits: tuple[str, ...]) -> Data:
    """All of a layer's features in memory. Raises: RunError where no image has a class."""
    found = Vectors.of(context, context.config.features, layer, splits)
    images = found.images()
    pairs = zip(images["box_labels"].to_pylist(), images["label_name"].to_pylist(), strict=True)
    classes = [boxes or ([own] if own is not None else []) for boxes, own in pairs]
    order = [row for row in vectors.in_order(images) if classes[row]]
    if not order:
        raise RunError(f"no image of {', '.join(splits)} has boxes with labels, or a class: give shards that have")
    features = np.concatenate(list(found.blocks()))[order]
    return Data(images["data_id"].unique().to_pylist(), features, [classes[row] for row in order])


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The classes of a layer, sorted by name. Says the mean average precision."""
    config: Config = context.config
    train, test = read(context, layer, config.train), read(context, layer, config.test)
    names = sorted({name for names in train.classes for name in names})
    if len(names) < 2:
        raise RunError(f"all images to train on are {names[0]}: give images of several classes")
    image, place = np.nonzero(np.stack([train.having(name) for name in names], axis=1))
    given, tested = transfer.scaled(train.features, test.features)
    classifier, converged = transfer.fitted("softmax", config.softmax_c, given[image], place)
    probabilities = classifier.predict_proba(tested)
    having = [test.having(name) for name in names]
    precision = [transfer.average_precision(probabilities[:, i], having[i]) for i in range(len(names))]
    known = [value for value in precision if not np.isnan(value)]
    if known:
        about = f"{np.mean(known):.1%} over {len(known)} of {len(names)} classes"
        say(f"{context.table}: {layer}: mean average precision {about}")
    columns = {
        "model_id": [context.model.model_id] * len(names),
        "data_id": ["+".join(dict.fromkeys(train.data_ids + test.data_ids))] * len(names),
        "layer": [layer] * len(names),
        "label_name": names,
        "average_precision": [None if np.isnan(value) else value for value in precision],
        "train_positives": [int(train.having(name).sum()) for name in names],
        "test_positives": [int(found.sum()) for found in having],
        "train_images": [len(train.classes)] * len(names),
        "test_images": [len(test.classes)] * len(names),
        "converged": [converged] * len(names),
    }
    yield tables.conform(columns, SCHEMA)


ANALYSIS = Derivation(table="multilabel", schema=SCHEMA, slices=slices, sources=sources, make=make)
