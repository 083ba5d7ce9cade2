"""Every table of the run: its files, what its columns mean, and its first rows, as the Parquet files themselves say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.runs import Run
from pipeline.storage import Location

ABOUT = {
    "metrics": "Loss and accuracy of every epoch of training.",
    "feature_maps": "Statistics of every feature map: mean, maximum, quantiles, share of active images, dead or not.",
    "top9": "The strongest images of every feature map, with the cell and its receptive field.",
    "maxima": "The strongest activation of every feature map in every image, and its cell.",
    "groups": "Images of every feature map from its whole range: the strongest, the weakest, those around quantiles.",
    "duplicates": "Pairs of feature maps that answer alike to every image, and each map's nearest ones.",
    "deconv": "Projection and patch of every top-9 cell.",
    "pictures": "The whole pictures behind the cells, small.",
    "evolution": "Projections of every feature map's strongest cell at chosen epochs of training.",
    "evolution_cells": "The strongest cell of every feature map at chosen epochs of training.",
    "evolution_convergence": "How far every feature map is at chosen epochs from what it becomes.",
    "occlusion": "The three occlusion maps of every chosen image, with its clean prediction.",
    "object_occlusion": "What hiding an image's known object costs, against as much elsewhere.",
    "predictions": "Every image's five most probable classes, and its loss.",
    "confusion": "How often each label was taken for each class.",
    "class_errors": "Errors of every class.",
    "evaluation": "Errors over all images.",
    "localization": "Five guesses of a class and a box for each image.",
    "localization_images": "What was right or wrong with each image's guesses.",
    "localization_windows": "The windows behind each image's best guess.",
    "detection": "Boxes that were found in each image, and what they are.",
    "detection_objects": "The true boxes of each image, and what became of them.",
    "detection_windows": "The windows behind each image's boxes.",
    "detection_curves": "Precision and recall of each class.",
    "detection_classes": "Average precision of each class, and its boxes and objects by kind.",
    "invariance": "Features and probability of images that are moved, enlarged and turned.",
    "correspondence": "Whether masking the same part of an object changes the features of all images alike.",
    "correspondence_pairs": "The pairs of images behind correspondence.",
    "correspondence_images": "The images behind correspondence, with their masks.",
    "ablation": "Networks of which a part is removed or changed, each trained alike: what it costs.",
    "units": "Every feature map's condition: dead, double, dominant, its frequencies and classes.",
    "units_comparison": "Measures of this network's feature maps beside another's.",
    "sanity": "Projections with layers made random, and patches run forward again.",
    "features": "Every image's activations in a layer.",
    "transfer": "New classifiers on a layer's features: accuracy by images a class.",
    "scratch": "Networks trained from scratch on the images that transfer trains on: accuracy by images a class.",
    "transfer_duplicates": "Images that another set holds, too.",
    "multilabel": "Average precision of every class on images of several classes.",
    "retrieval": "The nearest images of every image, by a layer's features.",
    "dense_maps": "The probability of a class in every window of an image, at several scales.",
    "skipped": "Samples that could not be read, and why.",
    "account": "Parts, attempts and seconds of every job.",
}
"""What a row is about; a table that is not named here has a page all the same."""

ROWS_SHOWN = 100
_NUMBERS_SHOWN = 6


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    name: str
    path: str
    """From the run directory."""
    data_id: str | None = None
    """The images that it is of, where its manifest says it."""

    def is_of(self, data_id: str | None) -> bool:
        """Whether it may speak of these images: keys alone do not tell two sets of images apart."""
        return None in (data_id, self.data_id) or data_id == self.data_id


@dataclass(frozen=True)
class ResultTable:
    """A table that pandas reads, with what its manifest says."""

    name: str
    path: str
    """From the run directory."""
    files: tuple[TableFile, ...]
    rows: int | None = None
    samples: int | None = None
    """Images that were read, at most, for a slice."""
    skipped: int = 0
    """Of them, those that could not be read."""
    foreign: bool = False
    """Whether some slice was made of another network than the run's."""

    @property
    def kind(self) -> str:
        """The table's own name, without the further one of --name."""
        return self.name.partition("-")[0]

    @property
    def about(self) -> str:
        """What it holds, in a sentence."""
        return ABOUT.get(self.kind, "A table of this run.")

    @property
    def page(self) -> str:
        """Its page in the atlas; a --name holds nothing that a file name may not."""
        return f"tables/{self.name}.html"


@dataclass(frozen=True)
class Column:
    """A column, as its Parquet schema documents it."""

    name: str
    kind: str
    doc: str
    nullable: bool
    lowest: str | None
    highest: str | None


def find(run: Run, model_id: str | None) -> list[ResultTable]:
    """Every table of the run, with the metrics of training first; `model_id` is of its network, where it has one."""
    found = [_folder(run, "metrics", "metrics")] if (run.location / "metrics").names() else []
    folder = run.location / "results"
    for name in (folder / "manifests").names():
        found.append(_finished(run, name, model_id))
    for name in ("skipped", "account"):
        if (folder / name).names():
            found.append(_folder(run, name, f"results/{name}"))
    return found


def _folder(run: Run, name: str, path: str) -> ResultTable:
    location = within(run.location, path)
    files = [TableFile(file.removesuffix(".parquet"), f"{path}/{file}") for file in location.names()]
    return ResultTable(name, path, tuple(file for file in files if file.path.endswith(".parquet")))


def _finished(run: Run, name: str, model_id: str | None) -> ResultTable:
    slices = run.manifest(name)
    path = f"results/{name}"
    # Slices made by one call share its samples, so the worst slice speaks for all.
    worst: dict[str, Any] = max(slices.values(), key=lambda entry: sum(entry.get("skipped", {}).values()), default={})
    present = [slice_ for slice_ in slices if run.slice(name, slice_).exists()]
    return ResultTable(
        name,
        path,
        tuple(
            TableFile(
                slice_, f"{path}/{run.slice(name, slice_).name}", slices[slice_].get("fingerprint", {}).get("data_id")
            )
            for slice_ in present
        ),
        rows=sum(entry["rows"] for entry in slices.values()),
        samples=worst.get("samples"),
        skipped=sum(worst.get("skipped", {}).values()),
        foreign=model_id is not None
        and any(entry.get("fingerprint", {}).get("model_id", model_id) != model_id for entry in slices.values()),
    )


def within(location: Location, path: str) -> Location:
    """The place of a path with "/" under another place."""
    for part in path.split("/"):
        location = location / part
    return location


def skipped(run: Run) -> list[dict[str, str]]:
    """The rows of all skipped tables."""
    folder = run.location / "results" / "skipped"
    names = [name for name in folder.names() if name.endswith(".parquet")]
    return [row for name in names for row in tables.read(folder / name).to_pylist()]


def columns(run: Run, table: ResultTable) -> list[Column]:
    """The columns with their range over all files: from the files' footers alone, no value is read."""
    footers = []
    for file in table.files:
        with within(run.location, file.path).open() as opened:
            parquet = tables.opened(opened)
            footers.append((parquet.schema_arrow, parquet.metadata))
    return [_column(field, footers) for field in footers[0][0]] if footers else []


def _column(field: pa.Field, footers: list[tuple[pa.Schema, pq.FileMetaData]]) -> Column:
    doc = (field.metadata or {}).get(b"doc", b"").decode()
    lowest, highest = _range(field, [metadata for _, metadata in footers])
    return Column(field.name, str(field.type), doc, field.nullable, lowest, highest)


def _range(field: pa.Field, footers: list[pq.FileMetaData]) -> tuple[str | None, str | None]:
    """Smallest and largest value of a column of numbers, where every row group with a value says it."""
    if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
        return None, None
    found = []
    for metadata in footers:
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
            found += [chunk.statistics for chunk in chunks if chunk.path_in_schema == field.name]
    known = [s for s in found if s is not None and s.has_min_max]
    if not known:
        return None, None
    return in_words(min(s.min for s in known)), in_words(max(s.max for s in known))


def first_rows(run: Run, table: ResultTable, most: int = ROWS_SHOWN) -> Iterator[dict[str, Any]]:
    """The first rows of each file, as many in all as a page shows, one at a time: a row may hold a whole image."""
    each = -(-most // max(1, len(table.files)))
    left = most
    for file in table.files:
        with within(run.location, file.path).open() as opened:
            taken = 0
            for batch in tables.opened(opened).iter_batches(batch_size=1):
                if taken == min(each, left):
                    break
                taken += 1
                yield {name: batch[name][0] for name in batch.schema.names}
            left -= taken


def in_words(value: Any) -> str:
    """A cell of a table for people: numbers to five digits, long lists by their first numbers."""
    if isinstance(value, pa.Scalar):
        if pa.types.is_list(value.type) and value.is_valid:
            return _list_in_words(value.values)
        value = value.as_py()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value + 0.0:.5g}"  # no minus before zero
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return str(value)


def _list_in_words(values: pa.Array) -> str:
    shown = ", ".join(in_words(value) for value in values.slice(0, _NUMBERS_SHOWN))
    return shown if len(values) <= _NUMBERS_SHOWN else f"{shown}, … ({len(values):,} in all)"
