"""The papers' tables and beside them this run's: the same measure, of whatever data and network the run has.

The numbers are those of Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, arXiv 1311.2901v3, of
Krizhevsky, Sutskever and Hinton's paper on AlexNet, and of Sermanet et al., OverFeat, arXiv 1312.6229v4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import tables
from pipeline.papers import numbers
from pipeline.papers.parts import ROWS
from pipeline.runs import Run

Rows = list[dict[str, Any]]
Cell = tuple[str, Any, str]
"""A line's name, a column's, and what stands there."""
NONE = "–"


@dataclass(frozen=True)
class Line:
    """A line of a table, as text."""

    name: str
    cells: tuple[str, ...]
    ours: bool = False


@dataclass(frozen=True)
class Grid:
    """Lines under the same columns."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Measured:
    """A table of a run that measures what a table of a paper does."""

    table: str
    columns: tuple[str, ...]
    """What is read of it."""
    cells: Callable[[Rows], Iterable[Cell]]


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper."""

    title: str
    note: str
    """What is measured, on what, in what unit."""
    lines: str
    """What a line is of."""
    theirs: tuple[Grid, ...]
    ours: tuple[Measured, ...]


@dataclass(frozen=True)
class Beside:
    """A table of a paper, this run's lines first; the paper's alone where the run has not measured it."""

    paper: PaperTable
    grids: tuple[Grid, ...]
    """Lines with the same columns are together."""

    @property
    def measured(self) -> bool:
        """Whether there is a line of this run."""
        return any(line.ours for grid in self.grids for line in grid.lines)


def beside(run: Run) -> list[Beside]:
    """Every table of the papers with the lines of this run, of all its tables of that kind (TABLE, TABLE-NAME)."""
    finished = (run.location / "results" / "manifests").names()
    return [_beside(run, finished, paper) for paper in PAPER_TABLES]


def _beside(run: Run, finished: Sequence[str], paper: PaperTable) -> Beside:
    cells: list[Cell] = []
    for measured in paper.ours:
        for name in (name for name in finished if name.partition("-")[0] == measured.table):
            about = "" if name == measured.table else f" ({name})"
            found = measured.cells(_rows(run, name, measured.columns))
            cells += [(f"{line}{about}", column, text) for line, column, text in found]
    grids = ([_grid(cells)] if cells else []) + list(paper.theirs)
    together = itertools.groupby(grids, key=lambda grid: grid.heads)
    joined = (Grid(heads, tuple(line for grid in some for line in grid.lines)) for heads, some in together)
    return Beside(paper, tuple(joined))


def _rows(run: Run, table: str, columns: tuple[str, ...]) -> Rows:
    """These columns of a finished table; no rows where another version wrote it, without one of them."""
    frame = tables.load(run.location, table, list(columns))
    rows: Rows = frame.to_dict("records")  # type: ignore[assignment]
    return rows if set(columns) <= set(frame) else []


def _grid(cells: list[Cell]) -> Grid:
    """Lines and columns in the order in which they come first, but numbers ascending; a dash where there is none."""
    heads = list(dict.fromkeys(column for _, column, _ in cells))
    if not any(isinstance(head, str) for head in heads):
        heads.sort()
    found = {(line, column): text for line, column, text in cells}
    names = dict.fromkeys(line for line, _, _ in cells)
    lines = (Line(name, tuple(found.get((name, head), NONE) for head in heads), ours=True) for name in names)
    return Grid(tuple(map(str, heads)), tuple(lines))


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.1f}"


def _spread(mean: float, spread: float, form: str) -> str:
    """Mean and spread; the mean alone where there is no spread."""
    return f"{mean:{form}}" + ("" if math.isnan(spread) else f" +- {spread:{form}}")


def _mean(values: Iterable[float]) -> float:
    """Of those that there are."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _correspondence(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        yield f"this run, {row['part']}", row["layer"], _spread(row["mean"], row["std_pairs"], ".3f")


_VIEWS = {"centre": "centre crop", "ten": "ten crops", "overfeat": "OverFeat's windows"}
_ERRORS = ("top-1", "top-5")
_ABLATION_ERRORS = ("training top-1", "validation top-1", "validation top-5")


def _errors(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        networks = 1 + len(row["with_model_ids"])
        about = f", average of {networks} networks" if networks > 1 else ""
        name = f"this run, {row['split']}, {_VIEWS.get(row['views'], row['views'])}, {row['images']} images{about}"
        for head, error in zip(_ERRORS, ("top1_error", "top5_error"), strict=True):
            yield name, head, _percent(row[error])


def _ablation(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        for head, error in zip(_ABLATION_ERRORS, ("train_top1_error", "top1_error", "top5_error"), strict=True):
            yield f"this run, {row['variant']}: {row['change']}", head, _percent(row[error])


def _costs(rows: Rows) -> Iterator[Cell]:
    """What each change adds to the errors of the network without it, where that was trained too."""
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        if (base := by_name.get(row["compared_with"])) is None:
            continue
        for head, error in zip(_ERRORS, ("top1_error", "top5_error"), strict=True):
            yield f"this run, {row['variant']}: {row['change']}", head, _percent(row[error] - base[error])


def _transfer(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        yield _point(f"this run, {row['classifier']} ({row['layer']})", row)


def _scratch(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        yield _point(f"this run, not pretrained ({row['architecture']})", row)


def _point(name: str, row: dict[str, Any]) -> Cell:
    return name, row["images_per_class"], _spread(100 * row["accuracy"], 100 * row["spread"], ".1f")


def _multilabel(rows: Rows) -> Iterator[Cell]:
    for row in rows:
        yield f"this run, {row['label_name']}", row["layer"], _percent(row["average_precision"])
    for layer in dict.fromkeys(row["layer"] for row in rows):
        yield "this run, mean", layer, _percent(_mean(r["average_precision"] for r in rows if r["layer"] == layer))


def _localization(rows: Rows) -> Iterator[Cell]:
    judged = [row["outcome"] for row in rows if isinstance(row["outcome"], str)]  # images with an object of their class
    if judged:
        wrong = sum(outcome != "right" for outcome in judged) / len(judged)
        yield f"this run, {len(judged)} images", "error", _percent(wrong)


def _detection(rows: Rows) -> Iterator[Cell]:
    known = [row["average_precision"] for row in rows if not math.isnan(row["average_precision"])]
    if known:
        yield f"this run, {len(known)} classes", "mean average precision", _percent(_mean(known))


def _theirs(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Grid:
    return Grid(tuple(heads), tuple(Line(name, tuple(cells)) for name, *cells in rows))


def _called(name: str, grid: Grid) -> Grid:
    """The lines with what they are of before their names, for a paper's table of several sets of images."""
    return replace(grid, lines=tuple(replace(line, name=f"{name}, {line.name}") for line in grid.lines))


def _architectures() -> Iterator[list[str]]:
    for network, rows in ROWS.items():
        for row in rows:
            if row.errors is not None:
                yield [f"{network}: {row.change}", *(f"{error:.1f}" for error in row.errors)]


def _claims() -> Iterator[list[str]]:
    for row in ROWS["alexnet"]:
        if row.table == "claim":
            costs = (NONE if cost is None else f"{cost:.1f}" for cost in row.costs)
            yield [f"{row.change}: {row.says}" if row.says else row.change, *costs]


PAPER_TABLES = (
    PaperTable(
        "Table 1: correspondence",
        "Mean feature sign change when a part of five dogs' faces is masked; lower is more alike.",
        "hidden part",
        (_theirs(("layer 5", "layer 7"), numbers.CORRESPONDENCE),),
        (Measured("correspondence", ("layer", "part", "mean", "std_pairs"), _correspondence),),
    ),
    PaperTable(
        "Table 2: errors on ImageNet 2012",
        "Error on the validation images in per cent.",
        "network",
        (_theirs(_ERRORS, numbers.IMAGENET),),
        (Measured("evaluation", ("split", "views", "with_model_ids", "images", "top1_error", "top5_error"), _errors),),
    ),
    PaperTable(
        "Table 3: what parts of the network are worth",
        "Errors in per cent, of ImageNet 2012; the first network is their replication of Krizhevsky et al.",
        "network",
        (_theirs(_ABLATION_ERRORS, _architectures()),),
        (Measured("ablation", ("variant", "change", "train_top1_error", "top1_error", "top5_error"), _ablation),),
    ),
    PaperTable(
        "AlexNet: what its parts bring",
        "What a change adds to the validation errors of ImageNet, in points of per cent, and what their paper says.",
        "change",
        (_theirs(_ERRORS, _claims()),),
        (Measured("ablation", ("variant", "change", "compared_with", "top1_error", "top5_error"), _costs),),
    ),
    PaperTable(
        "Tables 4, 5 and 7: transfer",
        "Mean accuracy over classes in per cent, by training images of each class; table 7 by layer, with 30 (101) and "
        "60 (256).",
        "classifier",
        (
            _called("Caltech-101", _theirs(("15", "30"), numbers.CALTECH101)),
            _called("Caltech-256", _theirs(("15", "30", "45", "60"), numbers.CALTECH256)),
            _theirs(("Caltech-101", "Caltech-256"), numbers.LAYERS),
        ),
        (
            Measured("transfer", ("layer", "classifier", "images_per_class", "accuracy", "spread"), _transfer),
            Measured("scratch", ("architecture", "images_per_class", "accuracy", "spread"), _scratch),
        ),
    ),
    PaperTable(
        "Table 6: PASCAL 2012 classification",
        "Average precision in per cent.",
        "class",
        (_theirs(("Sande et al.", "Yan et al.", "ZFNet"), numbers.PASCAL),),
        (Measured("multilabel", ("layer", "label_name", "average_precision"), _multilabel),),
    ),
    PaperTable(
        "OverFeat, figure 9: localisation on ImageNet 2012",
        "Images without a right class and box among five guesses, in per cent.",
        "network",
        (_theirs(("error",), numbers.LOCALIZATION),),
        (Measured("localization_images", ("outcome",), _localization),),
    ),
    PaperTable(
        "OverFeat, figure 11: detection on ImageNet 2013",
        "Mean over classes of the average precision, in per cent.",
        "network",
        (_theirs(("mean average precision",), numbers.DETECTION),),
        (Measured("detection_classes", ("average_precision",), _detection),),
    ),
)
