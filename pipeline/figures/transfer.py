"""ZFNet figure 9: accuracy on another data set over the number of training images of each class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from pipeline.figures.sheet import sheet
from pipeline.figures.source import Row, Source

_COLUMNS = ["layer", "classifier", "images_per_class", "accuracy", "spread"]


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A line for each run, layer and classifier, with the spread over the folds. Raises: Missing."""
    figure, ((axis,),) = sheet(1, 1, width=4.5, height=3.2)
    rows = {"-": source.rows("transfer", _COLUMNS)}
    names = {"-": source.run.location.name}
    if source.against is not None:
        rows["--"] = source.rows("transfer", _COLUMNS, run=source.against)
        names["--"] = source.against.location.name
    for style, name in names.items():
        for layer, classifier in dict.fromkeys((row["layer"], row["classifier"]) for row in rows[style]):
            line = [row for row in rows[style] if (row["layer"], row["classifier"]) == (layer, classifier)]
            counts, accuracy, spread = np.array(sorted(_point(row) for row in line)).T
            label = f"{name}: {layer}, {classifier}"
            axis.errorbar(counts, accuracy, spread, fmt=f"o{style}", capsize=2, markersize=3, label=label)
    axis.set(xlabel="training images of each class", ylabel="accuracy (%), mean over classes")
    axis.legend()
    yield "figure9", figure


def _point(row: Row) -> tuple[float, float, float]:
    """Images of each class, accuracy and spread in percent; one fold has no spread."""
    return row["images_per_class"], 100 * row["accuracy"], 100 * np.nan_to_num(row["spread"])
