"""The metrics of training: a Parquet file an epoch, so that a crash loses nothing; and the pace inside an epoch.

Where Ray runs, the same numbers are gauges that Prometheus reads: ray_zfnet_train_loss{run="..."} and so on.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pyarrow as pa

from pipeline import gauges, tables
from pipeline.runs import Run
from pipeline.storage import Location, StorageError

METRICS = tables.schema(
    "metrics",
    row="an epoch of training",
    file="epoch",
    key=("epoch",),
    columns=[
        tables.column("epoch", pa.int32(), "Epoch, from 1."),
        tables.column("learning_rate", pa.float64(), "Learning rate at the end of the epoch."),
        tables.column("train_samples", pa.int64(), "Images that the epoch trained on."),
        tables.column("train_loss", pa.float64(), "Mean cross-entropy over them, while training (dropout on)."),
        tables.column("train_top1", pa.float64(), "Share of them classified rightly, while training."),
        tables.column("validation_samples", pa.int64(), "Validation images, centre crop."),
        tables.column("validation_loss", pa.float64(), "Mean cross-entropy over them."),
        tables.column("validation_top1", pa.float64(), "Share of them whose class is the most probable."),
        tables.column("validation_top5", pa.float64(), "Share of them whose class is among the five most probable."),
        tables.column("skipped", pa.int64(), "Training samples of the epoch that could not be read."),
        tables.column("workers", pa.int32(), "Training workers at the end of the epoch."),
        tables.column("images_per_second", pa.float64(), "Training images a second, all workers together."),
        tables.column("data_wait_share", pa.float64(), "Share of the training time spent waiting for images."),
        tables.column("seconds", pa.float64(), "Seconds of the epoch, validation included."),
    ],
)


def _meaning(schema: pa.Schema) -> dict[str, str]:
    return {name: str(schema.field(name).metadata[b"doc"].decode()) for name in schema.names}


MEANING = {**_meaning(METRICS), "step": "Steps of training so far."}
"""Of the gauges of training, tagged `run`."""


def write(run: Run, row: dict[str, float], schema: pa.Schema = METRICS) -> None:
    """Commit the row of one epoch."""
    table = tables.conform({name: [row[name]] for name in schema.names}, schema)
    tables.write(table, run.location / "metrics" / f"epoch-{int(row['epoch']):04d}.parquet", run.training)
    gauge(run, {name: row[name] for name in schema.names}, _meaning(schema))


def read(run: Run, after: int = 0) -> pa.Table:
    """The epochs so far but for the first `after`, in order; nothing is read where there are none."""
    location = run.location / "metrics"
    names = sorted(location.names())[after:]
    return pa.concat_tables([tables.read(location / name) for name in names] or [METRICS.empty_table()])


def gauge(run: Run, values: dict[str, float], meaning: dict[str, str] | None = None) -> None:
    """Set Prometheus gauges zfnet_NAME, tagged with the run's name; nothing where Ray does not run."""
    gauges.show(values, meaning or MEANING, run=run.location.name)


def write_tensorboard(run: Run, rows: list[dict[str, float]]) -> None:
    """Add rows of the table to the event files in RUN/tensorboard, a curve a column."""
    from tensorboardX import SummaryWriter  # Ray Train brings it

    with SummaryWriter(str((run.location / "tensorboard").local)) as writer:
        for row in rows:
            for name in set(row) - {"epoch"}:
                writer.add_scalar(name, row[name], int(row["epoch"]))


class Pace:
    """How fast an epoch goes, written for the driver every few seconds: it may be on another machine."""

    def __init__(self, run: Run, every_seconds: float) -> None:
        self.run, self.every = run, every_seconds
        self.said = time.monotonic()
        self.step: int | None = None
        self.waited = 0.0

    def advance(self, step: int, total: int, steps: int, batch: int, waited: float) -> None:
        """A step is done.

        Args:
            step: steps so far, over all epochs.
            total: steps of the whole training.
            steps: steps of an epoch.
            batch: images a step, over all workers.
            waited: seconds spent waiting for images, in this epoch.
        """
        now = time.monotonic()
        if self.step is None:  # the first step warms up: it counts for nothing
            self.step, self.said, self.waited = step, now, waited
        seconds = now - self.said
        if seconds < self.every:
            return
        rate = (step - self.step) / seconds
        values = {"images_per_second": rate * batch, "data_wait_share": (waited - self.waited) / seconds}
        gauge(self.run, {**values, "step": step})
        where = {"step": step, "steps": steps, "seconds_left": (total - step) / rate}
        pace_file(self.run).write(json.dumps({**where, **values}).encode(), self.run.training)
        self.step, self.said, self.waited = step, now, waited


def pace_file(run: Run) -> Location:
    """The file that says how fast the current epoch goes."""
    return run.location / "checkpoints" / "pace.json"


def pace(run: Run) -> dict[str, Any] | None:
    """What was last written of the pace, or None; nothing rests on it, so it may be damaged too."""
    try:
        found = pace_file(run).read_json()
    except (FileNotFoundError, StorageError):
        return None
    sound = isinstance(found, dict) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in found.values()
    )
    return found if sound else None
