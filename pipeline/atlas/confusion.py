"""The confusion table as a matrix, for people: shades of each label's share, and the pairs most often confused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.atlas import table_charts
from pipeline.atlas.catalogue import ResultTable
from pipeline.runs import Run

CLASSES_SHOWN = 30
PAIRS_SHOWN = 20
SHADES = 5


@dataclass(frozen=True)
class Cell:
    """How many images of a label were taken for a class."""

    images: int
    shade: int
    """0 for none, then 1 to SHADES by the share of the label's images."""


@dataclass(frozen=True)
class Confusion:
    """Rows are labels, columns are what the network saw."""

    names: list[str]
    """Of rows and columns; none where there are too many classes for a matrix."""
    rows: list[list[Cell]]
    pairs: list[tuple[str, str, int, float]]
    """Label, what it was taken for, images, share of the label's images: the most frequent first."""


def of(run: Run, table: ResultTable) -> Confusion | None:
    """The matrix of a table confusion, None for any other."""
    columns = ["label", "label_name", "predicted_class", "predicted_name", "images"]
    frame = table_charts.read(run, table, columns) if table.kind == "confusion" else None
    if frame is None or not len(frame):
        return None
    places = zip(frame["label"], frame["predicted_class"], frame["images"], strict=True)
    counts = Counter[tuple[int, int]]()
    for label, seen, images in places:
        counts[int(label), int(seen)] += int(images)
    totals = frame.groupby("label")["images"].sum()
    names = dict(zip(frame["predicted_class"], frame["predicted_name"], strict=True))
    names |= dict(zip(frame["label"], frame["label_name"], strict=True))
    wrong = [(label, seen, images) for (label, seen), images in counts.items() if label != seen and images]
    wrong.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    pairs = [(names[a], names[b], n, n / int(totals[a])) for a, b, n in wrong[:PAIRS_SHOWN]]
    shown = sorted(names) if len(names) <= CLASSES_SHOWN else []
    rows = [[_cell(counts[a, b], int(totals.get(a, 0))) for b in shown] for a in shown]
    return Confusion([names[number] for number in shown], rows, pairs)


def _cell(images: int, total: int) -> Cell:
    return Cell(images, -(-SHADES * images // total) if total else 0)
