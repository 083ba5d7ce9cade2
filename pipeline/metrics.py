"""The metrics table of training: a row an epoch, a Parquet file a row, so that a crash loses nothing."""

from __future__ import annotations

import pyarrow as pa

from pipeline import tables
from pipeline.runs import Run

METRICS = pa.schema(
    [
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
        tables.column("images_per_second", pa.float64(), "Training images a second, all workers together."),
        tables.column("data_wait_share", pa.float64(), "Share of the training time spent waiting for images."),
        tables.column("seconds", pa.float64(), "Seconds of the epoch, validation included."),
    ]
)


def write(run: Run, row: dict[str, float]) -> None:
    """Commit the row of one epoch."""
    table = tables.conform({name: [row[name]] for name in METRICS.names}, METRICS)
    tables.write(table, run.location / "metrics" / f"epoch-{int(row['epoch']):04d}.parquet")


def read(run: Run) -> pa.Table:
    """All epochs so far, in order; no rows where there are none."""
    location = run.location / "metrics"
    return tables.read(location) if location.names() else METRICS.empty_table()
