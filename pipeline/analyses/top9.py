"""The nine images that excite each feature map most (ZFNet section 4, figure 2), and the statistics of every map.

Two tables: `top9`, a row for each feature map and rank, and `feature_maps`, a row for each feature map. One entry
an image: its strongest cell. The order is total: activation descending, key ascending, row, col; so the table is
the same, bit for bit, whatever the workers, the order of shards or the restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import tables
from pipeline.analysis import Analysis, Finished, fold_tree
from pipeline.context import Batch, Context
from pipeline.runs import RunError
from pipeline.storage import Location
from zfnet.activations import NONE, Statistics, Strongest, TopK, edges, strongest
from zfnet.receptive import receptive_field

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of top9 and feature_maps."""

    layers: tuple[str, ...] = ()
    """Layers to sweep; default all convolutions. Fully connected layers count as maps of one cell."""
    k: int = 9
    """Images kept for each feature map."""
    part_size: int = 256
    """Samples of a part, the unit of work and of resume."""
    batch_size: int = 32
    """Images that go through the network together."""

    def __post_init__(self) -> None:
        for name in ("k", "part_size", "batch_size"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")


TOP9 = pa.schema([tables.MODEL_ID, tables.DATA_ID, *tables.CELL])

FEATURE_MAPS = pa.schema(
    [
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column("images", pa.int64(), "Images that were swept."),
        tables.column("mean", pa.float64(), "Mean activation over all cells of all images."),
        tables.column("maximum", pa.float32(), "Largest activation of any cell."),
        tables.column("active_share", pa.float64(), "Share of images with any activation above zero."),
        tables.column("active_cells_share", pa.float64(), "Share of all cells with an activation above zero."),
        tables.column("dead", pa.bool_(), "Whether no image has any activation above zero."),
        *(
            tables.column(
                f"q{round(share * 100):02d}",
                pa.float32(),
                f"Quantile {share:g} of the images' strongest activations, to the upper edge of a bin 6 % wide.",
            )
            for share in QUANTILES
        ),
        tables.column("histogram", pa.list_(pa.int64()), "Images by their strongest activation, where above zero."),
        tables.column("histogram_edges", pa.list_(pa.float32()), "Edges of the histogram's bins, one more than bins."),
    ]
)

_BOX = ("top", "left", "height", "width")
_INTS = pa.list_(pa.int64())
PART = pa.schema(
    [
        ("layer", pa.string()),
        ("feature_map", pa.int32()),
        ("activation", pa.list_(pa.float32())),
        ("sample", _INTS),
        ("row", _INTS),
        ("col", _INTS),
        ("images", pa.int64()),
        ("cells", pa.int64()),
        ("total", pa.float64()),
        ("maximum", pa.float32()),
        ("active_images", pa.int64()),
        ("active_cells", pa.int64()),
        ("bin", _INTS),
        ("count", _INTS),
    ]
)


def slices(context: Context) -> list[str]:
    """The layers to sweep. Raises: UnknownLayer."""
    layers = list(context.config.layers) or [
        name for name in context.graph.layers if context.graph[name].kind == "conv"
    ]
    for layer in layers:
        receptive_field(context.graph, layer)
    return layers


def samples(context: Context, layers: list[str]) -> pa.Table:
    """All samples of the split."""
    return context.index.split(context.split)


def map_batch(context: Context, layers: list[str], batch: Batch) -> dict[str, tuple[TopK, Statistics]]:
    """The state of each layer after one batch."""
    nodes = {layer: context.graph.activation_of(layer) for layer in layers}
    activations = context.graph.run(batch.x, list(nodes.values()))
    samples = np.array([picture.number for picture in batch.pictures], dtype=np.int64)
    return {layer: _state(strongest(activations[node]), samples, context.config.k) for layer, node in nodes.items()}


def _state(found: Strongest, samples: np.ndarray, k: int) -> tuple[TopK, Statistics]:
    return TopK.of(found, samples, k), Statistics.of(found)


def _merge(states: list[tuple[TopK, Statistics]]) -> tuple[TopK, Statistics]:
    top, statistics = zip(*states, strict=True)
    return TopK.merge(list(top)), Statistics.merge(list(statistics))


def reduce_part(context: Context, results: list[dict[str, tuple[TopK, Statistics]]]) -> pa.Table:
    """The states of a part, a row for each feature map; none if no image could be read."""
    layers = list(results[0]) if results else []
    merged = {layer: _merge([result[layer] for result in results]) for layer in layers}
    return pa.concat_tables([_to_rows(layer, *state) for layer, state in merged.items()] or [PART.empty_table()])


def _to_rows(layer: str, top: TopK, statistics: Statistics) -> pa.Table:
    maps = len(statistics.total)
    bins = [np.flatnonzero(counts) for counts in statistics.histogram]
    columns: dict[str, Any] = {
        "layer": [layer] * maps,
        "feature_map": np.arange(maps),
        **{name: list(getattr(top, name)) for name in ("activation", "sample", "row", "col")},
        "images": [statistics.images] * maps,
        "cells": [statistics.cells] * maps,
        **{name: getattr(statistics, name) for name in ("total", "maximum", "active_images", "active_cells")},
        "bin": bins,
        "count": [counts[used] for counts, used in zip(statistics.histogram, bins, strict=True)],
    }
    return tables.conform(columns, PART)


def _from_rows(rows: pa.Table) -> tuple[TopK, Statistics]:
    """Back from the rows of one layer of a part."""

    def places(name: str) -> np.ndarray:
        return np.stack(rows[name].to_numpy())

    top = TopK(*(places(name) for name in ("activation", "sample", "row", "col")))
    histogram = np.zeros((rows.num_rows, len(edges()) - 1), dtype=np.int64)
    for counts, bins, values in zip(histogram, rows["bin"].to_numpy(), rows["count"].to_numpy(), strict=True):
        counts[bins] = values
    vectors = {name: rows[name].to_numpy() for name in ("total", "maximum", "active_images", "active_cells")}
    scalars = {name: rows[name][0].as_py() for name in ("images", "cells")}
    return top, Statistics(**scalars, **vectors, histogram=histogram)


def fold(context: Context, parts: list[Location], layers: list[str]) -> Iterator[Finished]:
    """A file of feature_maps and one of top9 for each layer."""
    rows = context.index.split(context.split).sort_by("number")
    for layer in layers:
        found = (tables.read(part, filters=[("layer", "=", layer)]) for part in parts)
        top, statistics = fold_tree((_from_rows(some) for some in found if some.num_rows), _merge)
        yield Finished("feature_maps", layer, FEATURE_MAPS, iter([_feature_maps(context, layer, statistics)]))
        yield Finished("top9", layer, TOP9, iter([_top9(context, layer, top, rows)]))


def _feature_maps(context: Context, layer: str, statistics: Statistics) -> pa.Table:
    maps = len(statistics.total)
    quantiles = statistics.quantiles(QUANTILES)
    cells = statistics.images * statistics.cells
    spans = [np.flatnonzero(counts) for counts in statistics.histogram]
    ends = [(int(span[0]), int(span[-1]) + 1) if len(span) else (0, 0) for span in spans]
    columns: dict[str, Any] = {
        **{name: [value] * maps for name, value in context.identity.items()},
        "layer": [layer] * maps,
        "feature_map": np.arange(maps),
        "images": [statistics.images] * maps,
        "mean": statistics.total / cells,
        "maximum": statistics.maximum,
        "active_share": statistics.active_images / statistics.images,
        "active_cells_share": statistics.active_cells / cells,
        "dead": statistics.active_images == 0,
        **{f"q{round(share * 100):02d}": quantiles[:, i] for i, share in enumerate(QUANTILES)},
        "histogram": [counts[a:b] for counts, (a, b) in zip(statistics.histogram, ends, strict=True)],
        "histogram_edges": [edges()[a : b + 1] if b else edges()[:0] for a, b in ends],
    }
    return tables.conform(columns, FEATURE_MAPS)


def _top9(context: Context, layer: str, top: TopK, samples: pa.Table) -> pa.Table:
    feature_map, place = np.nonzero(top.sample != NONE)
    row, col = top.row[feature_map, place], top.col[feature_map, place]
    chosen = samples.take(pa.array(top.sample[feature_map, place]))
    box = receptive_field(context.graph, layer).box(row, col)
    count = len(place)
    columns: dict[str, Any] = {
        **{name: [value] * count for name, value in context.identity.items()},
        "layer": [layer] * count,
        "feature_map": feature_map,
        "rank": place + 1,
        "activation": top.activation[feature_map, place],
        **{name: chosen[name] for name in ("key", "shard", "label")},
        "label_name": [context.index.label_name(label) for label in chosen["label"].to_pylist()],
        "row": row,
        "col": col,
        **{side: np.broadcast_to(np.asarray(v), count) for side, v in zip(_BOX, box, strict=True)},
    }
    return tables.conform(columns, TOP9)


ANALYSIS = Analysis(
    table="top9",
    tables=("feature_maps", "top9"),
    module=__name__,
    part_schema=lambda config: PART,
    slices=slices,
    samples=samples,
    setup=lambda context, layers: layers,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
)
