"""ZFNet figure 9: accuracy on another data set over the number of training images of each class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cycler import cycler
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from pipeline.figures.sheet import sheet
from pipeline.figures.source import Row, Source
from pipeline.runs import Run

_POINT = ["images_per_class", "accuracy", "spread"]
_COLUMNS = ["layer", "classifier", *_POINT]
_LOOKS = cycler(marker="osD^") * cycler(color=list(TABLEAU_COLORS))
"""Forty lines that can be told apart: a colour comes back with another marker."""


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A line for each run, layer and classifier, and for training from scratch where it was tried, with the spread over
    the folds. Raises: Missing."""
    figure, ((axis,),) = sheet(1, 1, width=6.5, height=3.2)
    axis.set_prop_cycle(_LOOKS)
    for style, run in {"-": source.run, "--": source.against}.items():
        for label, line in _lines(source, run).items() if run is not None else ():
            counts, accuracy, spread = np.array(sorted(_point(row) for row in line)).T
            axis.errorbar(counts, accuracy, spread, linestyle=style, capsize=2, markersize=3, label=label)
    axis.set(xlabel="training images of each class", ylabel="accuracy (%), mean over classes")
    figure.legend(loc="outside right upper")  # beside the lines: there may be two for every layer
    yield "figure9", figure


def _lines(source: Source, run: Run) -> dict[str, list[Row]]:
    """What each line is, and its rows."""
    found: dict[str, list[Row]] = {}
    for row in source.rows("transfer", _COLUMNS, run=run):
        found.setdefault(f"{run.location.name}: {row['layer']}, {row['classifier']}", []).append(row)
    for row in source.rows("scratch", ["architecture", *_POINT], run=run) if run.manifest("scratch") else ():
        found.setdefault(f"{row['architecture']}, from scratch", []).append(row)
    return found


def _point(row: Row) -> tuple[float, float, float]:
    """Images of each class, accuracy and spread in percent; one fold has no spread."""
    return row["images_per_class"], 100 * row["accuracy"], 100 * np.nan_to_num(row["spread"])
