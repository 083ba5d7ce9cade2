"""Deconvnet projections of the top-9 cells, beside the patches that caused them (ZFNet section 2.1, figure 2).

A row for each row of `top9`: the projection down to input pixels, cut to the image; the patch, which is the
receptive field's crop of the network's own input; and its box in the original image's pixels. With
`--semantics.cells all` it is the cell's whole feature map that is projected, over the whole image. Each image is run
forward at most once for all its cells, and every activation must come back as it was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.projections import SEMANTICS_COLUMNS, cut_to_image, png, projection_columns, semantics_columns, stored
from pipeline.runs import RunError, require_at_least_one
from pipeline.storage import Location
from zfnet import deconv
from zfnet.deconv import Cells, Projections, Semantics
from zfnet.receptive import receptive_field

ASK_ABOVE_BYTES = 2 * 10**9
AGREES_WITHIN = 1e-5
"""Of the layer's largest activation: how well an activation must come back (DESIGN section 4)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of deconv."""

    layers: tuple[str, ...] = ()
    """Layers to project; default all layers of the top9 table."""
    top9: str = "top9"
    """Table whose cells are projected: top9, or top9-NAME."""
    semantics: Semantics = field(default_factory=Semantics)
    """Which of the published deconvnets; the defaults are the paper's."""
    values: Literal["float32", "float16", "png"] | None = None
    """How projections are stored; png: 8 bit with a scale. Default float32 while that is below 2 GB."""
    part_size: int = 64
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 16
    """Images that go through the network together."""
    memory_mb: float = deconv.MEMORY_MB
    """Megabytes that windows on their way to the pixels take together, beside the images' own forward pass."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "part_size", "batch_size", "memory_mb")


def schema(config: Config) -> pa.Schema:
    """Columns of the table."""
    return tables.schema(
        "deconv",
        row="a cell of top9: its projection down to pixels, its patch, and its box in the original image",
        file="layer",
        key=("layer", "feature_map", "rank"),
        columns=[
            tables.MODEL_ID,
            tables.DATA_ID,
            *tables.CELL,
            *projection_columns(config.values or "float32"),
            tables.column("patch_png", pa.binary(), "PNG of the input pixels under the projection, RGB."),
            tables.column("box_top", pa.float32(), "First row of the patch in the original image's pixels."),
            tables.column("box_left", pa.float32(), "First column of the patch in the original image's pixels."),
            tables.column("box_height", pa.float32(), "Height of the patch in the original image's pixels."),
            tables.column("box_width", pa.float32(), "Width of the patch in the original image's pixels."),
            *SEMANTICS_COLUMNS,
        ],
    )


DECONV = schema(Config())


def resolve(context: Context) -> Config:
    """Float32 where the forecast allows it. Raises: RunError where the size makes the choice the user's."""
    config: Config = context.config
    if config.values is not None:
        return config
    finished = _finished(context)
    forecast = sum(finished[layer]["rows"] * bytes_of(context, layer) for layer in finished)
    if forecast >= ASK_ABOVE_BYTES:
        raise RunError(
            f"the projections would take {forecast / 1e9:.1f} GB as float32: choose with --values float32, float16 "
            f"({forecast / 2e9:.1f} GB) or png (about {forecast / 8e9:.1f} GB), or name fewer --layers"
        )
    return replace(config, values="float32")


def bytes_of(context: Context, layer: str) -> int:
    """Bytes of a projection as float32."""
    size = context.model.preprocessing.crop_px
    _, _, height, width = receptive_field(context.graph, layer).box(0, 0)
    if context.config.semantics.cells == "all":
        height = width = size
    return 12 * min(int(height), size) * min(int(width), size)


def _finished(context: Context) -> dict[str, Any]:
    """The top9 slices to project. Raises: RunError where they are missing, or of another model or images."""
    found = context.run.manifest(context.config.top9)
    if not found:
        raise RunError(f"there is no table {context.config.top9} in {context.run.location}: run jobs/top9.py first")
    layers = context.config.layers or tuple(found)
    if unknown := [layer for layer in layers if layer not in found]:
        raise RunError(f"{context.config.top9} has no layer {', '.join(unknown)}; it has {', '.join(found)}")
    for layer in layers:
        made = {name: found[layer]["fingerprint"].get(name) for name in context.identity}
        if made != context.identity:
            raise RunError(
                f"{context.config.top9} was made of {made}, and this run and these shards are {context.identity}: "
                "give the run and the --data it was made of, or run jobs/top9.py again under another --name"
            )
    return {layer: found[layer] for layer in layers}


def slices(context: Context) -> list[str]:
    """The layers to project. Raises: Unprojectable, RunError."""
    layers = list(_finished(context))
    blank = torch.zeros(1, *context.graph.input_shape, device=context.device)
    deconv.record(context.graph, blank, layers, context.config.semantics)  # refuses what cannot be projected
    return layers


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The cells come from this slice of top9."""
    entry = context.run.manifest(context.config.top9).get(layer, {})
    return {context.config.top9: {name: entry.get(name) for name in ("fingerprint", "rows", "samples", "skipped")}}


def samples(context: Context, layers: list[str]) -> pa.Table:
    """The images that hold a cell of these layers."""
    keys = _cells(context, layers)["key"].combine_chunks().unique()
    rows = context.index.split(context.split)
    return rows.filter(pc.is_in(rows["key"], keys))


def expected_rows(context: Context, layer: str, skipped: set[str]) -> int:
    """A row for each cell, but for those in images that could not be read."""
    keys = _cells(context, [layer])["key"].to_pylist()
    return sum(key not in skipped for key in keys)


def _cells(context: Context, layers: list[str]) -> pa.Table:
    names = [column.name for column in tables.CELL]
    return pa.concat_tables([tables.read(context.run.slice(context.config.top9, layer), names) for layer in layers])


@dataclass(frozen=True)
class LayerCells:
    """The cells of a layer that are to be projected."""

    rows: pa.Table
    of_key: dict[str, npt.NDArray[np.int64]]
    """Key -> rows that lie in that image."""
    maximum: float

    @classmethod
    def of(cls, rows: pa.Table) -> LayerCells:
        """The cells of these rows."""
        of_key = rows.select(["key"]).to_pandas().groupby("key").indices
        return cls(rows, of_key, pc.max(rows["activation"]).as_py() or 0.0)


def setup(context: Context, layers: list[str]) -> dict[str, LayerCells]:
    """Read the cells of each layer."""
    return {layer: LayerCells.of(_cells(context, [layer])) for layer in layers}


def map_batch(context: Context, cells: dict[str, LayerCells], batch: Batch) -> pa.Table:
    """The rows of all cells that lie in these images."""
    chosen = {layer: _chosen(layer_cells, batch.pictures) for layer, layer_cells in cells.items()}
    chosen = {layer: (image, rows) for layer, (image, rows) in chosen.items() if len(rows)}
    rows_of = {layer: cells[layer].rows.take(pa.array(rows)) for layer, (_, rows) in chosen.items()}
    where = {layer: _places(image, rows_of[layer]) for layer, (image, _) in chosen.items()}
    config: Config = context.config
    pieces = [schema(config).empty_table()]
    for layer, which, activation, projections in deconv.project_images(
        context.graph, batch.x, where, config.semantics, config.memory_mb
    ):
        some = which.cpu().numpy()
        rows = rows_of[layer].take(pa.array(some))
        _require_same(context, activation.cpu().numpy(), rows, cells[layer].maximum)
        pieces.append(_rows(context, rows, [batch.pictures[i] for i in chosen[layer][0][some]], projections))
    return pa.concat_tables(pieces)


def _chosen(cells: LayerCells, pictures: list[Picture]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Image of the batch and row of the layer's cells, for all cells in these pictures."""
    nothing = np.array([], dtype=np.int64)
    rows = [cells.of_key.get(picture.sample.key, nothing) for picture in pictures]
    image = np.repeat(np.arange(len(pictures)), [len(r) for r in rows])
    return image, np.concatenate(rows)


def _places(image: npt.NDArray[np.int64], rows: pa.Table) -> Cells:
    columns = [image, *(rows[name].to_numpy() for name in ("feature_map", "row", "col"))]
    return Cells(*(torch.as_tensor(column.astype(np.int64)) for column in columns))


def _require_same(context: Context, again: npt.NDArray[np.float32], rows: pa.Table, maximum: float) -> None:
    """What the sweep recorded must come back: a cheap check of the whole way from shard to cell."""
    recorded = rows["activation"].to_numpy()
    worst = int(np.argmax(np.abs(again - recorded)))  # NaN is the largest
    if not abs(float(again[worst] - recorded[worst])) <= AGREES_WITHIN * maximum:  # NaN agrees with nothing
        cell = rows.slice(worst, 1).to_pylist()[0]
        raise RunError(
            f"the cell {cell['layer']} map {cell['feature_map']} ({cell['row']}, {cell['col']}) of {cell['key']!r} is "
            f"{again[worst]:.8g} and {context.config.top9} says {recorded[worst]:.8g}: the shards were changed since "
            "that table was made; bring them back or make it again under another --name"
        )


def _rows(context: Context, rows: pa.Table, pictures: list[Picture], projections: Projections) -> pa.Table:
    """The table's rows: one for each projection."""
    config: Config = context.config
    cut = [cut_to_image(context, p, t, le) for p, t, le in zip(*_on_cpu(projections), strict=True)]
    boxes = [picture.crop.to_original(*box) for picture, (_, box) in zip(pictures, cut, strict=True)]
    columns: dict[str, Any] = {
        **{name: [value] * rows.num_rows for name, value in context.identity.items()},
        **{name: rows[name] for name in rows.column_names},
        **stored([pixels for pixels, _ in cut], config.values or "float32"),
        "patch_png": [_patch(picture, box) for picture, (_, box) in zip(pictures, cut, strict=True)],
        **{f"box_{side}": [box[i] for box in boxes] for i, side in enumerate(("top", "left", "height", "width"))},
        **semantics_columns(config.semantics, rows.num_rows),
    }
    return tables.conform(columns, schema(config))


def _patch(picture: Picture, box: tuple[int, int, int, int]) -> bytes:
    """The input pixels under a box, as PNG."""
    top, left, height, width = box
    return png(picture.pixels[top : top + height, left : left + width])


def _on_cpu(projections: Projections) -> tuple[npt.NDArray[np.float32], list[int], list[int]]:
    return projections.pixels.cpu().numpy(), projections.top.tolist(), projections.left.tolist()


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """All rows of a part, so sorted that the fold can read a range of feature maps."""
    table = pa.concat_tables([schema(context.config).empty_table(), *results])
    order = [("layer", "ascending"), ("feature_map", "ascending"), ("rank", "ascending")]
    return table.take(pc.sort_indices(table.select(["layer", "feature_map", "rank"]), sort_keys=order))


def fold(context: Context, parts: list[Location], layers: list[str]) -> Iterator[Finished]:
    """A file for each layer, sorted by feature map and rank."""
    for layer in layers:
        yield Finished("deconv", layer, schema(context.config), _in_order(context, parts, layer))


def _in_order(context: Context, parts: list[Location], layer: str) -> Iterator[pa.Table]:
    """The layer's rows in order, as many feature maps at a time as fill a row group: memory stays bounded."""
    maps = context.graph[context.graph.activation_of(layer)].shape[0]
    ranks = tables.read(context.run.slice(context.config.top9, layer), ["rank"])["rank"]
    together = max(1, tables.ROW_GROUP_BYTES // (bytes_of(context, layer) * max(1, pc.max(ranks).as_py() or 1)))
    for first in range(0, maps, together):
        wanted = [("layer", "=", layer), ("feature_map", ">=", first), ("feature_map", "<", first + together)]
        rows = pa.concat_tables([tables.read(part, filters=wanted) for part in parts])
        order = [("feature_map", "ascending"), ("rank", "ascending")]
        yield rows.take(pc.sort_indices(rows.select(["feature_map", "rank"]), sort_keys=order))


ANALYSIS = Analysis(
    table="deconv",
    then="occlusion.py --run {run} --data {data}",
    tables=("deconv",),
    module=__name__,
    part_schema=schema,
    resolve=resolve,
    slices=slices,
    sources=sources,
    samples=samples,
    setup=setup,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    expected_rows=expected_rows,
)
