"""The nine images that excite each feature map most (ZFNet section 4, figure 2), and the statistics of every map.

Three tables: `top9`, a row for each feature map and rank; `feature_maps`, a row for each feature map; and, below
--maxima-gb, `maxima`, a row for each image with the strongest activation of every map, from which other analyses
(`groups`, `duplicates`) answer further questions without a new sweep. One entry an image: its strongest cell. The
order is total: activation descending, key ascending, row, col; so the table is the same, bit for bit, whatever the
workers, the order of shards or the restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context
from pipeline.fold import Parts, fold_tree
from pipeline.progress import say
from pipeline.runs import RunError, require_at_least_one
from pipeline.storage import Location
from zfnet.activations import NONE, Statistics, Strongest, TopK, edges, strongest_of_layers
from zfnet.graph import UnknownLayer
from zfnet.models.layers import is_convolution
from zfnet.receptive import receptive_field

MAXIMA_BYTES = 6
"""Of a feature map and image in the table maxima: a float32 and, packed, the cell."""

_FEW = 256
"""Images that are worth a table in the fold: one takes 10 kB besides its rows."""

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
    batch_size: int = 16
    """Images that go through the network together."""
    maxima_gb: float = 4.0
    """Keep every image's maxima (table maxima) if those of all layers asked for take less; 0: never."""

    def __post_init__(self) -> None:
        if not self.maxima_gb >= 0:
            raise RunError(f"--maxima-gb is {self.maxima_gb}: give 0 or more gigabytes")
        require_at_least_one(self, "k", "part_size", "batch_size")


TOP9 = tables.schema(
    "top9",
    row="one of the strongest images of a feature map, and the cell that it excites most",
    file="layer",
    key=("layer", "feature_map", "rank"),
    columns=[tables.MODEL_ID, tables.DATA_ID, *tables.CELL],
)

FEATURE_MAPS = tables.schema(
    "feature_maps",
    row="a feature map: its activity over all images",
    file="layer",
    key=("layer", "feature_map"),
    columns=[
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
    ],
)

MAXIMA = tables.schema(
    "maxima",
    row="an image: the strongest activation of every feature map, and its cell",
    file="layer",
    key=("layer", "key"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("maxima", pa.list_(pa.float32()), "Strongest activation of each feature map, in their order."),
        tables.column("cells", pa.list_(pa.int32()), "Cell that holds it, first of equals: row * map_width + col."),
        tables.column("map_height", pa.int32(), "Rows of a feature map."),
        tables.column("map_width", pa.int32(), "Columns of a feature map."),
    ],
)

_INTS = pa.list_(pa.int64())
_PLACES = ("activation", "sample", "row", "col")
_OF_EACH_MAP = ("total", "maximum", "active_images", "active_cells")


def part_schema(config: Config) -> pa.Schema:
    """A row for each layer; lists are arrays of its maps, row-major. The last four are there if maxima are kept."""
    state = [
        ("layer", pa.string()),
        ("activation", pa.list_(pa.float32())),  # [maps, k], as sample, row and col
        ("sample", _INTS),
        ("row", _INTS),
        ("col", _INTS),
        ("images", pa.int64()),
        ("cells", pa.int64()),
        ("total", pa.list_(pa.float64())),  # [maps], as the next three
        ("maximum", pa.list_(pa.float32())),
        ("active_images", _INTS),
        ("active_cells", _INTS),
        ("bins", _INTS),
        ("counts", _INTS),
    ]
    kept = [
        ("number", _INTS),  # [images]
        ("maxima", pa.list_(pa.float32())),  # [images, maps], as positions
        ("positions", pa.list_(pa.int32())),
        ("map_width", pa.int32()),
    ]
    return pa.schema(state + (kept if config.maxima_gb else []))


def resolve(context: Context) -> Config:
    """Without maxima where they would take more than is allowed."""
    config: Config = context.config
    images = context.index.split(context.split).num_rows
    takes = MAXIMA_BYTES * images * sum(_maps(context, layer) for layer in slices(context)) / 1e9
    if config.maxima_gb and takes > config.maxima_gb:
        say(
            f"{context.table}: the maxima would take {takes:.1f} GB and are not kept (--maxima-gb {config.maxima_gb:g})"
        )
        return replace(config, maxima_gb=0.0)
    return config


def _maps(context: Context, layer: str) -> int:
    return context.graph[context.graph.activation_of(layer)].shape[0]


def further(context: Context) -> tuple[str, ...]:
    """The table maxima, where they are kept."""
    return ("maxima",) if context.config.maxima_gb else ()


def slices(context: Context) -> list[str]:
    """The layers to sweep. Raises: UnknownLayer."""
    layers = list(context.config.layers) or [
        name for name in context.graph.layers if is_convolution(context.graph[name].module)
    ]
    if not layers:
        raise UnknownLayer(f"this network has no convolution: give --layers, of {', '.join(context.graph.layers)}")
    for layer in layers:
        receptive_field(context.graph, layer)
    return layers


def samples(context: Context, layers: list[str]) -> pa.Table:
    """All samples of the split."""
    return context.index.split(context.split)


def setup(context: Context, layers: list[str]) -> list[str]:
    """On a CPU the weights are laid out as the images are, else every batch turns them. It changes no bit."""
    if context.device == "cpu":
        context.model.network.to(memory_format=torch.channels_last)
    return layers


@dataclass(frozen=True, eq=False)
class Found:
    """What a batch gives: the strongest cells of each layer, and the numbers of the images."""

    layers: dict[str, Strongest]
    numbers: np.ndarray


State = dict[str, tuple[TopK, Statistics]]
"""Of each layer."""


def map_batch(context: Context, layers: list[str], batch: Batch) -> Found:
    """The strongest cells of each layer. Only what the layers need is run."""
    numbers = np.array([picture.number for picture in batch.pictures], dtype=np.int64)
    return Found(strongest_of_layers(context.graph, batch.x, layers), numbers)


def reduce_part(context: Context, results: list[Found]) -> pa.Table:
    """The states of a part, a row for each layer; none if no image could be read."""
    schema = part_schema(context.config)
    if not results:
        return schema.empty_table()
    numbers = np.concatenate([result.numbers for result in results])
    rows = []
    for layer in results[0].layers:
        found = Strongest.join([result.layers[layer] for result in results])
        state = TopK.of(found, numbers, context.config.k), Statistics.of(found)
        kept = {"number": numbers, "maxima": found.value, "positions": found.position, "map_width": found.shape[1]}
        rows.append(_to_row(layer, *state) | (kept if context.config.maxima_gb else {}))
    columns = {field.name: _column([row[field.name] for row in rows], field.type) for field in schema}
    return pa.table(columns, schema=schema)


def _to_row(layer: str, top: TopK, statistics: Statistics) -> dict[str, Any]:
    return {
        "layer": layer,
        **{name: getattr(top, name) for name in _PLACES},
        **{name: getattr(statistics, name) for name in ("images", "cells", *_OF_EACH_MAP, "bins", "counts")},
    }


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    return tables.flat_lists(values, kind.value_type) if pa.types.is_list(kind) else pa.array(values, kind)


def _states(part: Location) -> State | None:
    """Back from a part, but for the maxima; None where none of its images could be read."""
    columns = [field.name for field in part_schema(Config(maxima_gb=0.0))]
    return {row["layer"]: _from_row(row) for row in _rows(tables.read(part, columns))} or None


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows with their lists as arrays."""
    for place in range(table.num_rows):
        row = {name: table[name][place] for name in table.column_names}
        yield {name: v.values.to_numpy() if isinstance(v, pa.ListScalar) else v.as_py() for name, v in row.items()}


def _from_row(row: dict[str, Any]) -> tuple[TopK, Statistics]:
    maps = len(row["total"])
    top = TopK(*(row[name].reshape(maps, -1) for name in _PLACES))
    return top, Statistics(**{name: row[name] for name in ("images", "cells", *_OF_EACH_MAP, "bins", "counts")})


def _merge(states: list[State]) -> State:
    layers = {layer: zip(*(state[layer] for state in states), strict=True) for layer in states[0]}
    return {layer: (TopK.merge(list(top)), Statistics.merge(list(found))) for layer, (top, found) in layers.items()}


def fold(context: Context, parts: Parts, layers: list[str]) -> Iterator[Finished]:
    """A file of each table for each layer. The states of all layers are merged in one pass over the parts."""
    rows = context.index.split(context.split).sort_by("number")
    merged = fold_tree(parts, _states, _merge)
    for layer in layers:
        top, statistics = merged[layer]
        yield Finished("feature_maps", layer, FEATURE_MAPS, iter([_feature_maps(context, layer, statistics)]))
        yield Finished("top9", layer, TOP9, iter([_top9(context, layer, top, rows)]))
        if "maxima" in further(context):
            yield Finished("maxima", layer, MAXIMA, _maxima(context, layer, parts, rows))


def _maxima(context: Context, layer: str, parts: Parts, samples: pa.Table) -> Iterator[pa.Table]:
    """The rows of one layer in the order of the parts, so many at a time as fill a row group."""
    gathered, size = [MAXIMA.empty_table()], 0
    for group in parts.groups(partial(_kept, layer)):
        for row in group:
            gathered.append(_images(context, layer, row, samples))
            size += gathered[-1].nbytes
            if size > tables.ROW_GROUP_BYTES:
                yield pa.concat_tables(gathered)
                gathered, size = [MAXIMA.empty_table()], 0
    yield pa.concat_tables(gathered)


def _kept(layer: str, parts: list[Location]) -> list[dict[str, Any]]:
    """What some parts keep of a layer, in their order; those of few images are joined."""
    columns = ["number", "maxima", "positions", "map_width", "cells"]
    kept: list[dict[str, Any]] = []
    few: list[dict[str, Any]] = []
    for part in parts:
        few += _rows(tables.read_equal(part, columns, "layer", layer))
        if sum(len(row["number"]) for row in few) >= _FEW:
            kept.append(_joined(few))
            few = []
    return [*kept, _joined(few)] if few else kept


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of neighbouring parts, as if they were one."""
    if len(rows) == 1:
        return rows[0]
    return rows[0] | {name: np.concatenate([row[name] for row in rows]) for name in ("number", "maxima", "positions")}


def _images(context: Context, layer: str, row: dict[str, Any], samples: pa.Table) -> pa.Table:
    """The images of some parts with their maxima in a layer."""
    count = len(row["number"])
    columns = {
        **{name: [value] * count for name, value in context.identity.items()},
        "layer": [layer] * count,
        **sample_columns(context, samples.take(pa.array(row["number"]))),
        "maxima": tables.flat_lists(list(row["maxima"].reshape(count, -1)), pa.float32()),
        "cells": tables.flat_lists(list(row["positions"].reshape(count, -1)), pa.int32()),
        "map_height": [row["cells"] // row["map_width"]] * count,
        "map_width": [row["map_width"]] * count,
    }
    return tables.conform(columns, MAXIMA)


def sample_columns(context: Context, samples: pa.Table) -> dict[str, Any]:
    """The shared columns that say which samples these are."""
    names = [context.index.label_name(label) for label in samples["label"].to_pylist()]
    return {**{name: samples[name] for name in ("key", "shard", "label")}, "label_name": names}


def _feature_maps(context: Context, layer: str, statistics: Statistics) -> pa.Table:
    maps = len(statistics.total)
    quantiles = statistics.quantiles(QUANTILES)
    cells = statistics.images * statistics.cells
    histogram = statistics.histogram
    spans = [np.flatnonzero(counts) for counts in histogram]
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
        "histogram": [counts[a:b] for counts, (a, b) in zip(histogram, ends, strict=True)],
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
        **sample_columns(context, chosen),
        "row": row,
        "col": col,
        **tables.box_columns(box, count),
    }
    return tables.conform(columns, TOP9)


ANALYSIS = Analysis(
    table="top9",
    tables=("feature_maps", "top9"),
    module=__name__,
    further=further,
    part_schema=part_schema,
    resolve=resolve,
    selects=("layers", "maxima_gb"),
    slices=slices,
    samples=samples,
    setup=setup,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    in_groups=True,
    then="deconv.py --run {run} --data {data}",
)
