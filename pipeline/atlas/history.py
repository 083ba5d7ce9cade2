"""The run page: what was trained on what, how training went, what went wrong, the papers' tables beside ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from pipeline.atlas import catalogue, confusion, table_charts
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.charts import Chart, Points, chart
from pipeline.atlas.results import pandas_line
from pipeline.atlas.site import Site
from pipeline.papers.beside import beside
from pipeline.runs import Run

SKIPPED_SHOWN = 200
CLASSES_SHOWN = 60
_METRICS = ["epoch", "learning_rate", "train_loss", "train_top1", "validation_loss"]
_METRICS += ["validation_top1", "validation_top5", "seconds"]
_OF_WINDOWS = ["epoch", "learning_rate", "train_loss", "train_right", "validation_loss", "validation_right", "seconds"]
"""Those of a training on windows: a localizer's, or a detector's."""
HEADINGS = {
    "epoch": "Epoch",
    "learning_rate": "Learning rate",
    "train_loss": "Training loss",
    "train_top1": "Training top-1",
    "train_right": "Training windows right",
    "validation_loss": "Validation loss",
    "validation_top1": "Validation top-1",
    "validation_top5": "Validation top-5",
    "validation_right": "Validation windows right",
    "seconds": "Seconds",
}
_SHARES = {"train_top1", "train_right", "validation_top1", "validation_top5", "validation_right"}
_SHOWN_APART = ("architecture", "classes", "model_id", "versions", "preprocessing", "training", "history")


def write(site: Site, run: Run, facts: dict[str, Any], found: Sequence[ResultTable]) -> None:
    """Write run.html."""
    known = epochs(run, found)
    skipped = catalogue.skipped(run)
    matrices = [(table, confusion.of(run, table)) for table in found]
    site.write_page(
        "run.html",
        "run.html.j2",
        run_name=run.location.name,
        run_path=str(run.location),
        facts=facts,
        classes=facts["classes"][:CLASSES_SHOWN],
        recipe=list(flat(facts.get("training", {}))),
        more={name: as_text(value) for name, value in facts.items() if name not in _SHOWN_APART},
        data_ids=data_ids(run, found),
        epochs=known,
        headings=HEADINGS,
        shares=_SHARES,
        charts=charts({"": known}),
        confusions=[(table, matrix) for table, matrix in matrices if matrix],
        papers=beside(run),
        reasons=Counter((row["table"], row["reason"]) for row in skipped).most_common(),
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_total=len(skipped),
        result_tables=[(table, pandas_line(run.location, table)) for table in found],
        file_url=lambda path: quote(f"../{path}"),
    )


def epochs(run: Run, found: Sequence[ResultTable]) -> dict[str, list[Any]]:
    """The metrics that pages show, in the order of the epochs; empty where the run has none, or other ones."""
    for table in (table for table in found if table.name == "metrics"):
        for names in (_METRICS, _OF_WINDOWS):
            if (frame := table_charts.read(run, table, names)) is not None:
                return {str(name): values for name, values in frame.sort_values("epoch").to_dict("list").items()}
    return {"epoch": []}


def flat(settings: Any, name: str = "") -> list[tuple[str, str]]:
    """Settings inside settings, one after another, named by the way to them."""
    if not isinstance(settings, dict):
        return [(name, as_text(settings))]
    return [line for key, value in settings.items() for line in flat(value, f"{name}.{key}" if name else str(key))]


def as_text(value: Any) -> str:
    """A value of run.json for people."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def data_ids(run: Run, found: Sequence[ResultTable]) -> list[str]:
    """The images that the run's tables were made of, by their identity."""
    slices = [entry for table in found for entry in run.manifest(table.name).values()]
    return sorted({entry["fingerprint"]["data_id"] for entry in slices if "data_id" in entry.get("fingerprint", {})})


def charts(runs: dict[str, dict[str, list[Any]]]) -> list[Chart]:
    """Loss and error over the epochs: for each run's name (none where there is one) its metrics."""
    loss: dict[str, Points] = {}
    error: dict[str, Points] = {}
    for name, epochs in runs.items():
        prefix = f"{name}: " if name else ""
        for which in ("train", "validation"):
            loss[f"{prefix}{_WORD[which]}"] = _points(epochs, f"{which}_loss")
        for which in ("validation_top1", "validation_top5", "train_top1", "validation_right", "train_right"):
            if which in epochs:
                error[f"{prefix}{_WORD[which]}"] = [(x, 1 - y) for x, y in _points(epochs, which)]
    found = chart("Loss", loss), chart("Error", error, percent=True)
    return [drawn for drawn in found if drawn]


_WORD = {
    "train": "training",
    "validation": "validation",
    "train_top1": "training top-1",
    "validation_top1": "validation top-1",
    "validation_top5": "validation top-5",
    "train_right": "training windows",
    "validation_right": "validation windows",
}


def _points(epochs: dict[str, list[Any]], name: str) -> list[tuple[float, float]]:
    return list(zip(epochs["epoch"], epochs[name], strict=True)) if name in epochs else []
