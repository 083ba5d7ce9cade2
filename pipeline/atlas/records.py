"""What the pages show, read from a run's tables: finished slices only, and without the pixels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.runs import Run, RunError
from pipeline.storage import Location

SEMANTICS = ("cells", "seed", "unpool", "normalisation", "relu")
_ENTRY = ["feature_map", "rank", "activation", "key", "label", "label_name", "row", "col"]
_BOX = ["box_top", "box_left", "box_height", "box_width"]
_STATISTICS = ["feature_map", "images", "mean", "maximum", "active_share", "dead"]


@dataclass(frozen=True)
class Entry:
    """One of a feature map's strongest images."""

    rank: int
    activation: float
    key: str
    label: str | None
    row: int
    col: int
    box: tuple[float, ...] | None
    """(top, left, height, width) in the original image's pixels; None where deconv has not been run."""


@dataclass(frozen=True)
class FeatureMap:
    """What is known of one feature map."""

    number: int
    entries: tuple[Entry, ...]
    maximum: float | None = None
    mean: float | None = None
    active_share: float | None = None
    dead: bool = False

    @property
    def classes(self) -> list[tuple[str | None, int]]:
        """The classes of its strongest images, most frequent first."""
        return Counter(entry.label for entry in self.entries).most_common()


@dataclass(frozen=True)
class Layer:
    """What is known of one layer."""

    name: str
    maps: tuple[FeatureMap, ...]
    images: int | None
    field_px: tuple[int, int] | None
    """Height and width of the receptive field."""
    semantics: dict[str, str] | None
    """How its cells were projected; None where they were not."""

    @property
    def alive(self) -> list[FeatureMap]:
        """Maps that some image activates."""
        return [map_ for map_ in self.maps if not map_.dead]

    @property
    def dead(self) -> list[FeatureMap]:
        """Maps that no image activates."""
        return [map_ for map_ in self.maps if map_.dead]

    @property
    def mean_share(self) -> float | None:
        """Share of images that activate a map, on average over the maps."""
        shares = [map_.active_share for map_ in self.maps if map_.active_share is not None]
        return sum(shares) / len(shares) if shares else None


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    name: str
    path: str
    """From the run directory."""


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


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The run and the names of the tables to show."""

    run: Run
    top9: str
    deconv: str
    occlusion: str

    @property
    def input_px(self) -> int:
        """Side of the network's input."""
        return int(self.run.describe()["preprocessing"]["crop_px"])

    @property
    def feature_maps(self) -> str:
        """The table that is made together with top9, under the same further name."""
        return "feature_maps" + self.top9.removeprefix("top9")

    def slice(self, table: str, name: str) -> Location | None:
        """The file of a finished slice, None where it is not finished."""
        if name not in self.run.manifest(table):
            return None
        location = self.run.slice(table, name)
        if not location.exists():
            raise RunError(
                f"the manifest of {table} lists {name}, and there is no file {location}: bring it back, or delete "
                f"{self.run.results(table)} with its manifests and make the table again"
            )
        return location

    def layers(self) -> list[str]:
        """The layers that were swept, from the pixels up: by receptive field, then in the order they were swept."""
        names = list(self.run.manifest(self.feature_maps) | self.run.manifest(self.top9))
        sizes = {name: self._field(name) or (math.inf, math.inf) for name in names}
        return sorted(names, key=lambda name: math.prod(sizes[name]))

    def _field(self, layer: str) -> tuple[int, int] | None:
        location = self.slice(self.top9, layer)
        sizes = tables.read(location, ["height", "width"]).slice(0, 1).to_pylist() if location else []
        return (sizes[0]["height"], sizes[0]["width"]) if sizes else None

    def layer(self, name: str) -> Layer:
        """A layer's feature maps with their statistics and strongest images."""
        statistics_of, deconv_of = self.slice(self.feature_maps, name), self.slice(self.deconv, name)
        statistics = tables.read(statistics_of, _STATISTICS).to_pylist() if statistics_of else []
        entries, semantics = self._entries(name, deconv_of)
        known = {row["feature_map"]: row for row in statistics}
        maps = [_feature_map(number, entries[number], known.get(number)) for number in sorted(known | entries)]
        images = statistics[0]["images"] if statistics else None
        return Layer(name, tuple(maps), images, self._field(name), semantics)

    def _entries(self, layer: str, deconv: Location | None) -> tuple[dict[int, tuple[Entry, ...]], Any]:
        """Strongest images by feature map: those that were projected, or else those that were found."""
        location = deconv or self.slice(self.top9, layer)
        found: defaultdict[int, tuple[Entry, ...]] = defaultdict(tuple)
        if location is None:
            return found, None
        columns = [*_ENTRY, *_BOX, *SEMANTICS] if deconv else _ENTRY
        rows = tables.read(location, columns).to_pylist()
        for row in rows:
            found[row["feature_map"]] += (_entry(row),)
        return found, {name: rows[0][name] for name in SEMANTICS} if deconv and rows else None

    def occlusion_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the occlusion table, one image at a time; none where it is not finished."""
        for name in self.run.manifest(self.occlusion):
            location = self.slice(self.occlusion, name)
            assert location is not None
            with location.open() as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1):
                    yield _with_arrays(batch)


def _feature_map(number: int, entries: tuple[Entry, ...], statistics: dict[str, Any] | None) -> FeatureMap:
    if statistics is None:
        return FeatureMap(number, entries, maximum=entries[0].activation)
    known = {name: statistics[name] for name in ("maximum", "mean", "active_share", "dead")}
    return FeatureMap(number, entries, **known)


def _entry(row: dict[str, Any]) -> Entry:
    label = row["label_name"] if row["label_name"] is not None or row["label"] is None else f"class {row['label']}"
    box = tuple(row[side] for side in _BOX) if _BOX[0] in row else None
    return Entry(row["rank"], row["activation"], row["key"], label, row["row"], row["col"], box)


def _with_arrays(batch: pa.RecordBatch) -> dict[str, Any]:
    """A row as a dictionary, its lists of numbers as arrays."""
    row = {name: batch[name][0] for name in batch.schema.names}
    return {n: v.values.to_numpy() if pa.types.is_list(v.type) else v.as_py() for n, v in row.items()}


def skipped(run: Run) -> list[dict[str, str]]:
    """The rows of all skipped tables."""
    folder = run.location / "results" / "skipped"
    names = [name for name in folder.names() if name.endswith(".parquet")]
    return [row for name in names for row in tables.read(folder / name).to_pylist()]


def result_tables(run: Run, model_id: str) -> list[ResultTable]:
    """Every table of the run, with the metrics of training first."""
    found = [_folder(run, "metrics", "metrics")] if (run.location / "metrics").names() else []
    folder = run.location / "results"
    for name in (folder / "manifests").names():
        found.append(_finished(run, name, model_id))
    for name in ("skipped", "account"):
        if (folder / name).names():
            found.append(_folder(run, name, f"results/{name}"))
    return found


def _folder(run: Run, name: str, path: str) -> ResultTable:
    location = run.location
    for part in path.split("/"):
        location = location / part
    files = [TableFile(file.removesuffix(".parquet"), f"{path}/{file}") for file in location.names()]
    return ResultTable(name, path, tuple(files))


def _finished(run: Run, name: str, model_id: str) -> ResultTable:
    slices = run.manifest(name)
    path = f"results/{name}"
    # Slices made by one call share its samples, so the worst slice speaks for all.
    worst: dict[str, Any] = max(slices.values(), key=lambda entry: sum(entry.get("skipped", {}).values()), default={})
    present = [slice_ for slice_ in slices if run.slice(name, slice_).exists()]
    return ResultTable(
        name,
        path,
        tuple(TableFile(slice_, f"{path}/{run.slice(name, slice_).name}") for slice_ in present),
        rows=sum(entry["rows"] for entry in slices.values()),
        samples=worst.get("samples"),
        skipped=sum(worst.get("skipped", {}).values()),
        foreign=any(entry.get("fingerprint", {}).get("model_id", model_id) != model_id for entry in slices.values()),
    )
