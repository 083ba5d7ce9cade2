"""What the pages show of layers and feature maps, from a run's tables: finished slices only, without the pixels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import tables
from pipeline.runs import Run, RunError
from pipeline.storage import Location

SEMANTICS = ("cells", "seed", "unpool", "normalisation", "relu")
_ENTRY = ["feature_map", "rank", "activation", "key", "label", "label_name", "row", "col"]
_FIELD = ["top", "left", "height", "width"]
_BOX = ["box_top", "box_left", "box_height", "box_width"]
_QUANTILES = ("q05", "q25", "q50", "q75", "q95", "q99")
_STATISTICS = ["feature_map", "images", "mean", "maximum", "active_share", "active_cells_share", "dead"]
_STATISTICS += [*_QUANTILES, "histogram", "histogram_edges"]
_GROUPS_SHOWN = 12


@dataclass(frozen=True)
class Entry:
    """One of a feature map's images, by its strongest cell."""

    rank: int
    activation: float
    key: str
    label: str | None
    row: int
    col: int
    field: tuple[int, int, int, int]
    """(top, left, height, width) of the receptive field in input pixels; it may leave the image."""
    box: tuple[float, ...] | None = None
    """(top, left, height, width) in the original image's pixels; None where deconv has not been run."""
    scale: float | None = None
    """Largest absolute value of its projection."""


@dataclass(frozen=True)
class Statistics:
    """A feature map over all images that were swept."""

    images: int
    mean: float
    maximum: float
    active_share: float
    active_cells_share: float
    quantiles: dict[float, float]
    """Of the images' strongest activations, by share."""
    histogram: tuple[int, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Similar:
    """A map that another one resembles."""

    number: int
    correlation: float


@dataclass(frozen=True)
class FeatureMap:
    """What is known of one feature map."""

    number: int
    entries: tuple[Entry, ...]
    statistics: Statistics | None = None
    dead: bool = False
    groups: tuple[tuple[str, tuple[Entry, ...]], ...] = ()
    """Name of the group (top, q0.50, bottom, ...) and its images."""
    similar: tuple[Similar, ...] = ()
    """Maps that answer alike, the most alike first."""

    @property
    def classes(self) -> list[tuple[str | None, int]]:
        """The classes of its strongest images, most frequent first."""
        return Counter(entry.label for entry in self.entries).most_common()

    @property
    def maximum(self) -> float | None:
        """Largest activation of any cell."""
        if self.statistics is None:
            return self.entries[0].activation if self.entries else None
        return self.statistics.maximum

    @property
    def active_share(self) -> float | None:
        """Share of images that activate it."""
        return self.statistics.active_share if self.statistics else None

    @property
    def contrasts(self) -> list[float]:
        """Each projection's largest value over the largest of all: 1 for the strongest signal of the map."""
        scales = [entry.scale or 0.0 for entry in self.entries]
        return [scale / (max(scales) or 1.0) for scale in scales]


@dataclass(frozen=True)
class Layer:
    """What is known of one layer."""

    name: str
    maps: tuple[FeatureMap, ...]
    field_px: tuple[int, int] | None
    """Height and width of the receptive field."""
    semantics: dict[str, str] | None
    """How its cells were projected; None where they were not."""

    @property
    def images(self) -> int | None:
        """Images that were swept."""
        return next((map_.statistics.images for map_ in self.maps if map_.statistics), None)

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

    @property
    def classes(self) -> list[str]:
        """Every class among the strongest images of its maps, in order."""
        return sorted({entry.label for map_ in self.maps for entry in map_.entries if entry.label is not None})


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The run and the names of the tables to show."""

    run: Run
    top9: str = "top9"
    deconv: str = "deconv"
    occlusion: str = "occlusion"
    groups: str = "groups"
    duplicates: str = "duplicates"
    evolution: str = "evolution"
    pictures: str = "pictures"
    pictures_of_groups: str = "pictures-groups"

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
        """Everything but the pixels of one layer: statistics, strongest images, groups, similar maps."""
        statistics_of = self.slice(self.feature_maps, name)
        rows = tables.read(statistics_of, _STATISTICS).to_pylist() if statistics_of else []
        entries, semantics = self._entries(name, self.slice(self.deconv, name))
        known = {row["feature_map"]: row for row in rows}
        groups, similar = self._groups(name), self._similar(name)
        maps = [
            replace(
                _feature_map(number, entries.get(number, ()), known.get(number)),
                groups=groups.get(number, ()),
                similar=similar.get(number, ()),
            )
            for number in sorted(known | entries)
        ]
        return Layer(name, tuple(maps), self._field(name), semantics)

    def _entries(self, layer: str, deconv: Location | None) -> tuple[dict[int, tuple[Entry, ...]], Any]:
        """Strongest images by feature map: those that were projected, or else those that were found."""
        location = deconv or self.slice(self.top9, layer)
        found: defaultdict[int, tuple[Entry, ...]] = defaultdict(tuple)
        if location is None:
            return found, None
        columns = [*_ENTRY, *_FIELD, *_BOX, "projection_scale", *SEMANTICS] if deconv else [*_ENTRY, *_FIELD]
        rows = tables.read(location, columns).to_pylist()
        for row in rows:
            found[row["feature_map"]] += (_entry(row),)
        return found, {name: rows[0][name] for name in SEMANTICS} if deconv and rows else None

    def semantics(self, table: str, layer: str) -> dict[str, str]:
        """How a table of projections was made, of a layer that it has, at least for one cell."""
        location = self.slice(table, layer)
        rows = tables.read(location, list(SEMANTICS)).slice(0, 1).to_pylist() if location else []
        return dict(rows[0]) if rows else {}

    def _groups(self, layer: str) -> dict[int, tuple[tuple[str, tuple[Entry, ...]], ...]]:
        """Groups of images by feature map, in the table's order."""
        location = self.slice(self.groups, layer)
        found: defaultdict[int, dict[str, list[Entry]]] = defaultdict(dict)
        for row in tables.read(location, ["class", "group", *_ENTRY, *_FIELD]).to_pylist() if location else []:
            name = row["group"] if row["class"] is None else f"{row['group']}, class {row['class']}"
            of_map = found[row["feature_map"]]
            if name in of_map or len(of_map) < _GROUPS_SHOWN:
                of_map.setdefault(name, []).append(_entry(row))
        return {number: tuple((n, tuple(e)) for n, e in groups.items()) for number, groups in found.items()}

    def _similar(self, layer: str) -> dict[int, tuple[Similar, ...]]:
        """Similar maps by feature map; the table has each pair once, the most alike first."""
        location = self.slice(self.duplicates, layer)
        found: defaultdict[int, tuple[Similar, ...]] = defaultdict(tuple)
        for row in tables.read(location, ["feature_map", "other_map", "correlation"]).to_pylist() if location else []:
            one, other = row["feature_map"], row["other_map"]
            found[one] += (Similar(other, row["correlation"]),)
            found[other] += (Similar(one, row["correlation"]),)
        return found

    def occlusion_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the occlusion table, one image at a time; none where it is not finished."""
        for name in self.run.manifest(self.occlusion):
            location = self.slice(self.occlusion, name)
            assert location is not None
            with location.open() as file:
                for batch in tables.opened(file).iter_batches(batch_size=1):
                    yield with_arrays(batch)


def _feature_map(number: int, entries: tuple[Entry, ...], row: dict[str, Any] | None) -> FeatureMap:
    if row is None:
        return FeatureMap(number, entries)
    statistics = Statistics(
        row["images"],
        row["mean"],
        row["maximum"],
        row["active_share"],
        row["active_cells_share"],
        {int(name[1:]) / 100: row[name] for name in _QUANTILES},
        tuple(row["histogram"]),
        tuple(row["histogram_edges"]),
    )
    return FeatureMap(number, entries, statistics, row["dead"])


def _entry(row: dict[str, Any]) -> Entry:
    label = row["label_name"] if row["label_name"] is not None or row["label"] is None else f"class {row['label']}"
    box = tuple(row[side] for side in _BOX) if _BOX[0] in row else None
    field = (row["top"], row["left"], row["height"], row["width"])
    cell = (row["rank"], row["activation"], row["key"], label, row["row"], row["col"])
    return Entry(*cell, field, box, row.get("projection_scale"))


def with_arrays(batch: pa.RecordBatch) -> dict[str, Any]:
    """A row as a dictionary, its lists of numbers as arrays."""
    row = {name: batch[name][0] for name in batch.schema.names}
    return {n: v.values.to_numpy() if pa.types.is_list(v.type) else v.as_py() for n, v in row.items()}
