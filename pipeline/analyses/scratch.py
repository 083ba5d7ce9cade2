"""What transfer is measured against: a network trained from scratch on N images a class (ZFNet Tab. 4 and 5).

The paper resets layers 1 to 7 to random values and trains them on the other data set alone. For each N and fold this is
an ordinary training in a folder of its own, RUN/scratch/N-FOLD, on the very images that `transfer` draws for that fold,
and an ordinary evaluation on those that it tests on, so that a row here stands beside a row of `transfer`. The table
has a slice for each N, written when its folds are done.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cluster, sweep, tables, train
from pipeline.analyses import evaluation, vectors
from pipeline.analyses.transfer import SCHEMA as TRANSFER
from pipeline.context import Options as SweepOptions
from pipeline.indexing import write_choice
from pipeline.progress import say, suggest
from pipeline.runs import Run, RunError, environment, require_at_least_one
from pipeline.shards import Index
from pipeline.sources.default import shards_or_default
from pipeline.storage import Location
from zfnet import transfer
from zfnet.transfer import Draw, TooFewImages


@dataclass(frozen=True, kw_only=True)
class Options(train.Common):
    """What it takes: a training's options, for every draw, and transfer's draws."""

    run: str = "runs/demo"
    """Run whose table `transfer` this stands beside: a local path, s3:// or gs://."""
    architecture: str | None = None
    """Network, by name; default the run's own."""
    images_per_class: tuple[int, ...] = (15, 30)
    """Images to train on, of each class; those of jobs/transfer.py, since the largest decides which are tested on."""
    folds: int = 5
    """Draws of the images."""
    test_images: int = 50
    """Images to test on, of each class at most."""
    seed: int = 0
    """Decides the draws, with the fold, as in jobs/transfer.py; and each training's weights, order and augmentation."""
    train_split: str = "train"
    """A split whose images are drawn from."""
    validation_split: str = "val"
    """Another; the images of both are taken together."""
    keep_epochs: tuple[int, ...] = ()
    """Epochs of each training whose weights are kept, beside the last two."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "folds", "test_images")
        if not self.images_per_class or min(self.images_per_class) < 1:
            raise RunError(f"--images-per-class is {self.images_per_class}: give numbers from 1 on")


SCHEMA = tables.schema(
    "scratch",
    row="a network trained from scratch on so many images a class",
    file="images_per_class",
    key=("images_per_class",),
    columns=[
        TRANSFER.field("data_id"),
        tables.column("architecture", pa.string(), "Network, by name."),
        TRANSFER.field("images_per_class"),
        *(TRANSFER.field(name) for name in ("accuracy", "spread", "fold_accuracy", "class_labels", "class_accuracy")),
        TRANSFER.field("test_images"),
        tables.column("epochs", pa.int32(), "Passes over the training images."),
        tables.column("model_ids", pa.list_(pa.string()), "Of each fold: identity of the network that was trained."),
    ],
)


def run(options: Options) -> int:
    """Train and evaluate every draw, or go on, and write the table. Returns the worst exit status.

    Raises: RunError where a class has too few images; and as a training and an evaluation do.
    """
    started = time.monotonic()
    directory = Run.at(options.run)
    architecture = options.architecture or str(directory.describe()["architecture"])
    index = shards_or_default(options.data, options.index)
    rows, draws = _drawn(options, index)
    status = 0
    with nullcontext() if options.workers.num == 0 else cluster.connected(options.address):
        for per_class in sorted(set(options.images_per_class)):
            runs = []
            for fold, draw in enumerate(draws):
                place = directory.location / "scratch" / f"{per_class}-{fold}"
                chosen = {"train": draw.train(per_class), "val": draw.test}
                write_choice(index, {name: rows[places] for name, places in chosen.items()}, place / "images")
                status = max(status, _trained(options, architecture, place))
                runs.append(Run.at(place))
            _record(options, index, directory, per_class, runs)
    say(f"scratch: finished in {time.monotonic() - started:.1f} s: {directory.results('scratch')}")
    suggest("figures.py --run {run}", run=options.run)
    return status


def _drawn(options: Options, index: Index) -> tuple[npt.NDArray[np.int64], list[Draw]]:
    """The rows of index.samples that have a label, in transfer's order, and of them each fold's images."""
    splits = (options.train_split, options.validation_split)
    for split in splits:
        index.split(split)  # refuses what there is not
    samples = index.samples
    usable = pc.and_(pc.is_in(samples["split"], pa.array(splits)), pc.is_valid(samples["label"]))
    rows = np.flatnonzero(np.asarray(usable))
    rows = rows[vectors.in_order(samples.take(pa.array(rows)))]
    labels = samples["label"].take(pa.array(rows)).to_numpy().astype(np.int64)
    most = max(options.images_per_class)
    try:
        return rows, [transfer.draw(labels, most, options.test_images, options.seed, f) for f in range(options.folds)]
    except TooFewImages as error:
        raise RunError(f"--images-per-class {most}: {error}, or give shards without the class") from None


def _trained(options: Options, architecture: str, place: Location) -> int:
    """Train and evaluate one draw, or go on. Returns the worst exit status."""
    given = {one.name: getattr(options, one.name) for one in fields(train.Common)}
    given |= {"data": str(place / "images"), "index": None, "train_split": "train", "validation_split": "val"}
    training = train.Options(**given, run=str(place), architecture=architecture)
    sweeping = SweepOptions(
        run=str(place),
        data=training.data,
        address=options.address,
        max_skipped=options.max_skipped,
        workers=options.workers,
    )
    return max(
        train.run(training, f"scratch: {place.name}"),
        sweep.run(evaluation.ANALYSIS, sweeping, evaluation.Config()),
    )


def _record(options: Options, index: Index, directory: Run, per_class: int, runs: list[Run]) -> None:
    """Write the slice of one N, where it is not there, and say its accuracy."""
    described = [one.describe() for one in runs]
    made = {"trainings": [{name: one[name] for name in ("model_id", "training")} for one in described]}
    made = json.loads(json.dumps(made))
    if directory.missing("scratch", {str(per_class): made}):
        row = _row(options, index, per_class, runs, described)
        tables.write(
            tables.conform({name: [value] for name, value in row.items()}, SCHEMA),
            directory.slice("scratch", str(per_class)),
        )
        entry = {"rows": 1, "fingerprint": made, "environment": environment("cpu")}
        directory.finish("scratch", str(per_class), entry, directory.unfinished("scratch"))
        directory.unfinished("scratch").delete()
    (row,) = tables.read(directory.slice("scratch", str(per_class))).to_pylist()
    about = "" if row["spread"] is None else f" +- {100 * row['spread']:.1f}"
    say(f"scratch: {row['architecture']}, {per_class} a class: {100 * row['accuracy']:.1f}{about} %")


def _row(
    options: Options, index: Index, per_class: int, runs: list[Run], described: list[dict[str, Any]]
) -> dict[str, Any]:
    """The table's row, from the evaluations of its folds."""
    classes = [tables.read(one.slice("class_errors", evaluation.SLICE)).to_pandas().set_index("label") for one in runs]
    accuracies = pd.concat([1 - frame["top1_error"] for frame in classes], axis=1).dropna(how="all").sort_index()
    folds = accuracies.mean()
    splits = {options.train_split, options.validation_split}
    return {
        "data_id": "+".join(index.data_id(split) for split in sorted(splits)),
        "architecture": described[0]["architecture"],
        "images_per_class": per_class,
        "accuracy": float(folds.mean()),
        "spread": float(folds.std()) if len(folds) > 1 else None,
        "fold_accuracy": folds.tolist(),
        "class_labels": accuracies.index.tolist(),
        "class_accuracy": accuracies.mean(axis=1).tolist(),
        "test_images": int(classes[0]["images"].sum()),
        "epochs": described[0]["training"]["recipe"]["epochs"],
        "model_ids": [one["model_id"] for one in described],
    }
