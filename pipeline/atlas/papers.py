"""The papers' tables beside this run's: the same measure, of whatever data and network the run has.

The numbers are those of Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, arXiv 1311.2901v3, and
of Sermanet et al., OverFeat, arXiv 1312.6229v4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from pipeline.atlas import views
from pipeline.atlas.catalogue import ResultTable
from pipeline.figures import paper
from pipeline.runs import Run

Rows = list[tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    note: str
    """What is measured, on what, in what unit."""
    heads: tuple[str, ...]
    rows: Callable[[], Rows]
    """The paper's."""
    table: str
    """This run's table that measures the same."""
    columns: tuple[str, ...]
    """What is read of it."""
    ours: Callable[[pd.DataFrame], Rows]
    """This run's rows, from those columns."""


@dataclass(frozen=True)
class Beside:
    """A table of the paper with this run's rows; none where the run has no such table."""

    paper: PaperTable
    ours: Rows


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


_VIEWS = {"centre": "centre crop", "ten": "ten crops", "overfeat": "OverFeat's windows"}


def _errors(frame: pd.DataFrame) -> Rows:
    return [
        (
            f"this run, {row['split']}, {_VIEWS.get(row['views'], row['views'])}, {row['images']} images",
            (_percent(row["top1_error"]), _percent(row["top5_error"])),
        )
        for row in frame.to_dict("records")
    ]


def _correspondence(frame: pd.DataFrame) -> Rows:
    layers = list(dict.fromkeys(frame["layer"]))
    heads = ", ".join(layers)
    return [
        (
            f"this run, {part} ({heads})",
            tuple(f"{group[group['layer'] == layer]['mean'].mean():.3f}" for layer in layers),
        )
        for part, group in frame.groupby("part", sort=False)
    ]


def _transfer(frame: pd.DataFrame) -> Rows:
    counts = sorted(frame["images_per_class"].unique())
    heads = ", ".join(str(count) for count in counts)
    return [
        (
            f"this run, {classifier} ({layer}), {heads} images a class",
            (", ".join(_percent(group[group["images_per_class"] == n]["accuracy"].mean()) for n in counts),),
        )
        for (layer, classifier), group in frame.groupby(["layer", "classifier"], sort=False)
    ]


def _multilabel(frame: pd.DataFrame) -> Rows:
    return [
        (f"this run ({layer})", (_percent(group["average_precision"].mean()),))
        for layer, group in frame.groupby("layer", sort=False)
    ]


def _localization(frame: pd.DataFrame) -> Rows:
    judged = frame["outcome"][frame["outcome"] != "none"]  # images without an object of their class
    return [(f"this run, {len(judged)} images", (_percent((judged != "right").mean()),))]


def _detection(frame: pd.DataFrame) -> Rows:
    known = frame["average_precision"].dropna()
    return [(f"this run, {len(known)} classes", (_percent(known.mean()),))]


def _ablation(frame: pd.DataFrame) -> Rows:
    errors = ("train_top1_error", "top1_error", "top5_error")
    return [
        (f"this run, {row['variant']}: {row['change']}", tuple(_percent(row[name]) for name in errors))
        for row in frame.to_dict("records")
    ]


def _architectures() -> Rows:
    from pipeline.analyses import ablation  # imports all that trains, which takes seconds

    return [
        (f"{network}: {row.change}", tuple(f"{error:.1f}" for error in row.errors))
        for network, rows in ablation.ROWS.items()
        for row in rows
        if row.errors is not None
    ]


def _rows(lines: list[list[str]]) -> Rows:
    return [(line[0], tuple(line[1:])) for line in lines]


PAPER_TABLES = (
    PaperTable(
        "Table 2: errors on ImageNet 2012",
        "Error on the validation images in per cent.",
        ("top-1", "top-5"),
        lambda: _rows(paper.IMAGENET),
        "evaluation",
        ("split", "views", "images", "top1_error", "top5_error"),
        _errors,
    ),
    PaperTable(
        "Table 3: what parts of the network are worth",
        "Errors in per cent, of ImageNet 2012; the first network is their replication of Krizhevsky et al.",
        ("training top-1", "validation top-1", "validation top-5"),
        _architectures,
        "ablation",
        ("variant", "change", "train_top1_error", "top1_error", "top5_error"),
        _ablation,
    ),
    PaperTable(
        "Table 1: correspondence",
        "Mean feature sign change when a part of five dogs' faces is masked; lower is more alike.",
        ("layer 5", "layer 7"),
        lambda: _rows(paper.CORRESPONDENCE),
        "correspondence",
        ("layer", "part", "mean"),
        _correspondence,
    ),
    PaperTable(
        "Table 7: what layers are worth to another task",
        "Mean accuracy over classes in per cent: Caltech-101, 30 images a class, and Caltech-256, 60 images a class.",
        ("Caltech-101", "Caltech-256"),
        lambda: _rows(paper.LAYERS),
        "transfer",
        ("layer", "classifier", "images_per_class", "accuracy"),
        _transfer,
    ),
    PaperTable(
        "Table 6: PASCAL 2012 classification",
        "Mean over classes of the average precision, in per cent.",
        ("mean average precision",),
        lambda: [
            (name, (mean,))
            for name, mean in zip(("Sande et al.", "Yan et al.", "ZFNet"), paper.PASCAL[-1][1:], strict=True)
        ],
        "multilabel",
        ("layer", "average_precision"),
        _multilabel,
    ),
    PaperTable(
        "OverFeat, figure 9: localisation on ImageNet 2012",
        "Images without a right class and box among five guesses, in per cent.",
        ("error",),
        lambda: _rows(paper.LOCALIZATION),
        "localization_images",
        ("outcome",),
        _localization,
    ),
    PaperTable(
        "OverFeat, figure 11: detection on ImageNet 2013",
        "Mean over classes of the average precision, in per cent.",
        ("mean average precision",),
        lambda: _rows(paper.DETECTION),
        "detection_classes",
        ("average_precision",),
        _detection,
    ),
)


def beside(run: Run, found: list[ResultTable]) -> list[Beside]:
    """Each table of the paper with the rows of this run, of all tables of that kind that it has."""
    return [Beside(theirs, [row for table in found for row in _ours(run, theirs, table)]) for theirs in PAPER_TABLES]


def _ours(run: Run, theirs: PaperTable, table: ResultTable) -> Rows:
    frame = views.read(run, table, list(theirs.columns)) if table.kind == theirs.table else None
    return theirs.ours(frame) if frame is not None and len(frame) else []
