"""Which chart is natural for which table: one line for each, computed by pandas from the table's Parquet files.

A table that is not named here has a page all the same, with its columns and first rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import pandas as pd

from pipeline import tables
from pipeline.atlas.catalogue import ResultTable, within
from pipeline.atlas.charts import Bars, Chart, bars, chart
from pipeline.runs import Run
from zfnet.detection import Fate, Outcome

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The mean of `y` over `x`, a curve for each value of `by`, a chart for each value of `apart`."""

    title: str
    x: str
    y: str
    by: tuple[str, ...] = ()
    apart: str | None = None
    percent: bool = False

    @property
    def columns(self) -> list[str]:
        """What is read."""
        return list(dict.fromkeys([self.x, self.y, *self.by, *([self.apart] if self.apart else [])]))

    def draw(self, frame: pd.DataFrame) -> list[Chart]:
        """The charts, in the order in which their values come first."""
        if self.apart is None:
            return _drawn([self._chart(self.title, frame)])
        groups = frame.groupby(self.apart, sort=False)
        return _drawn([self._chart(f"{self.title}: {name}", group) for name, group in groups])

    def _chart(self, title: str, frame: pd.DataFrame) -> Chart | None:
        curves = {}
        for name, group in frame.groupby(list(self.by), sort=False) if self.by else [((self.y,), frame)]:
            means = group.groupby(self.x)[self.y].mean()
            curves[" ".join(map(str, name))] = list(zip(means.index.astype(float), means.astype(float), strict=True))
        return chart(title, curves, axis=self.x.replace("_", " "), percent=self.percent)


@dataclass(frozen=True, kw_only=True)
class Means:
    """The mean of each column of `values`, for each value of `by`, largest first where `ranked`."""

    title: str
    by: str
    values: tuple[str, ...]
    percent: bool = False
    ranked: bool = False
    mean: bool = False
    """Whether the mean over all of these is said first."""

    @property
    def columns(self) -> list[str]:
        """What is read."""
        return [self.by, *self.values]

    def draw(self, frame: pd.DataFrame) -> list[Bars]:
        """One table of bars."""
        means = frame.groupby(self.by, sort=False)[list(self.values)].mean()
        if self.ranked:
            means = means.sort_values(self.values[0], ascending=False, kind="stable")
        rows = [(str(name), [float(v) for v in row]) for name, row in zip(means.index, means.to_numpy(), strict=True)]
        if self.mean:
            rows.insert(0, ("mean", [float(value) for value in means.mean()]))
        names = [value.replace("_", " ") for value in self.values]
        return _drawn([bars(self.title, names, rows, percent=self.percent)])


@dataclass(frozen=True, kw_only=True)
class _ValueBy:
    """A chart of one column, for each value of another."""

    title: str
    value: str
    by: str

    @property
    def columns(self) -> list[str]:
        """What is read."""
        return [self.value, self.by]


class Spread(_ValueBy):
    """How many rows lie in each tenth of the range of `value`, a curve for each value of `by`."""

    def draw(self, frame: pd.DataFrame) -> list[Chart]:
        """One chart, at the middles of the tenths."""
        values = frame[self.value].to_numpy(dtype=float)
        finite = values[np.isfinite(values)]
        if not len(finite):
            return []
        edges = np.linspace(finite.min(), finite.max() or 1.0, 11)
        curves = {
            str(name): list(zip((edges[:-1] + edges[1:]) / 2, np.histogram(group, edges)[0] / len(group), strict=True))
            for name, group in frame.dropna().groupby(self.by, sort=False)[self.value]
        }
        return _drawn([chart(self.title, curves, axis=self.value.replace("_", " "), percent=True)])


class Shares(_ValueBy):
    """The share of each value of `value`, over all rows and for each value of `by`."""

    def draw(self, frame: pd.DataFrame) -> list[Bars]:
        """One table of bars."""
        counts = pd.crosstab(frame[self.by], frame[self.value], margins=True, margins_name="all")
        shares = counts.drop(columns="all").div(counts["all"], axis=0)
        names = [str(name).replace("_", " ") for name in shares.columns]
        rows = [(str(name), [float(share) for share in row]) for name, row in shares.iloc[::-1].iterrows()]
        return _drawn([bars(self.title, names, rows[:1] + rows[:0:-1], percent=True)])


Natural = Curves | Means | Spread | Shares

_OBJECTS = tuple(f"objects_{fate}" for fate in get_args(Fate))

CHARTS: dict[str, tuple[Natural, ...]] = {
    "metrics": (
        Curves(title="Training loss", x="epoch", y="train_loss"),
        Curves(title="Learning rate", x="epoch", y="learning_rate"),
        Curves(title="Images a second", x="epoch", y="images_per_second"),
    ),
    "feature_maps": (
        Means(
            title="Active images, active cells", by="layer", values=("active_share", "active_cells_share"), percent=True
        ),
        Spread(title="Maps by share of active images", value="active_share", by="layer"),
    ),
    "ablation": (
        Means(title="Error", by="variant", values=("train_top1_error", "top1_error", "top5_error"), percent=True),
        Means(title="Parameters", by="variant", values=("parameters",)),
    ),
    "evolution_convergence": (
        Curves(title="Filters: cosine with their last", x="epoch", y="filter_cosine", by=("layer",)),
        Curves(title="Projections: cosine with their last", x="epoch", y="projection_cosine", by=("layer",)),
        Curves(title="Maps whose image is the last already", x="epoch", y="same_image", by=("layer",), percent=True),
    ),
    "duplicates": (Spread(title="Pairs by correlation", value="correlation", by="layer"),),
    "units": (
        Means(
            title="Share of maps",
            by="layer",
            values=("dead", "nearly_dead", "dominant", "filter_duplicate"),
            percent=True,
        ),
        Spread(title="Maps by entropy of their classes", value="class_entropy", by="layer"),
    ),
    "units_comparison": (
        Means(title="This network beside the other", by="measure", values=("value", "other_value"), percent=True),
    ),
    "sanity": (
        Curves(title="Rank correlation, absolute values", x="stage", y="spearman_absolute", by=("layer",)),
        Curves(title="Rank correlation, signed values", x="stage", y="spearman_signed", by=("layer",)),
    ),
    "object_occlusion": (
        Means(title="Probability lost", by="label_name", values=("object_drop", "elsewhere_drop"), percent=True),
        Means(title="Activity of the map lost", by="layer", values=("inside_drop", "outside_drop"), percent=True),
    ),
    "class_errors": (
        Means(title="Error", by="label_name", values=("top1_error", "top5_error"), percent=True, ranked=True),
    ),
    "evaluation": (Means(title="Error", by="split", values=("top1_error", "top5_error"), percent=True),),
    "predictions": (Means(title="Mean loss", by="label_name", values=("loss",), ranked=True),),
    "localization": (Spread(title="Guesses by IoU with an object of their class", value="iou", by="rank"),),
    "localization_images": (
        Shares(title="What became of the images", value="outcome", by="label_name"),
        Means(title="IoU with the object", by="label_name", values=("iou", "centred_iou"), percent=True),
    ),
    "localization_windows": (Spread(title="Windows by confidence", value="confidence", by="scale"),),
    "detection": (Spread(title="Boxes by IoU with an object of their class", value="iou", by="outcome"),),
    "detection_objects": (Shares(title="What became of the objects", value="fate", by="class_name"),),
    "detection_windows": (Spread(title="Windows by confidence", value="confidence", by="scale"),),
    "detection_curves": (
        Curves(title="Precision and recall", x="recall", y="precision", by=("class_name",), percent=True),
    ),
    "detection_classes": (
        Means(
            title="Average precision",
            by="class_name",
            values=("average_precision",),
            percent=True,
            ranked=True,
            mean=True,
        ),
        Means(title="Objects of the class", by="class_name", values=_OBJECTS),
        Means(title="Boxes of the class", by="class_name", values=get_args(Outcome)),
    ),
    "invariance": (
        Curves(title="Relative distance", x="amount", y="relative_distance", by=("layer",), apart="transform"),
        Curves(title="Probability", x="amount", y="probability", apart="transform", percent=True),
    ),
    "correspondence": (Means(title="Share of changed signs", by="part", values=("mean",)),),
    "transfer": (
        Curves(title="Accuracy", x="images_per_class", y="accuracy", by=("layer", "classifier"), percent=True),
    ),
    "scratch": (Curves(title="Accuracy", x="images_per_class", y="accuracy", by=("architecture",), percent=True),),
    "multilabel": (
        Means(title="Average precision", by="label_name", values=("average_precision",), percent=True, ranked=True),
    ),
    "retrieval": (
        Curves(title="Neighbours of the same class", x="rank", y="same_class", by=("layer",), percent=True),
        Curves(title="Distance", x="rank", y="distance", by=("layer",)),
    ),
}


def charts(run: Run, table: ResultTable) -> list[Chart | Bars]:
    """The natural charts of a table; none where it has no rows, or was made by another version of its analysis."""
    found: list[Chart | Bars] = []
    for natural in CHARTS.get(table.kind, ()):
        frame = read(run, table, natural.columns)
        if frame is not None and len(frame):
            found += natural.draw(frame)
    return found


def read(run: Run, table: ResultTable, columns: list[str]) -> pd.DataFrame | None:
    """These columns of all files of a table, truth as 0 and 1; None where it has no files or not these columns."""
    pieces = []
    for file in table.files:
        location = within(run.location, file.path)
        with location.open() as opened:
            parquet = tables.opened(opened)
            if not set(columns) <= set(parquet.schema_arrow.names):
                return None
            pieces.append(parquet.read(columns).to_pandas())
    if not pieces:
        return None
    frame: pd.DataFrame = pd.concat(pieces, ignore_index=True)
    for name in columns:
        if frame[name].map(type).isin([bool]).any():
            frame[name] = frame[name].astype(float)
        elif frame[name].dtype == object or pd.api.types.is_string_dtype(frame[name]):
            frame[name] = frame[name].fillna("none").astype(str)
    return frame


def _drawn(found: Sequence[T | None]) -> list[T]:
    return [drawn for drawn in found if drawn is not None]
