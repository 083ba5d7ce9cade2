"""Are the projections to be believed? Weights randomised from the top down, and patches run forward again.

A row for each cell of `top9` and stage. Stage 0 is the network as it is: the cell's receptive field alone, pasted at
its own place on grey, is run forward, and must give back the activation that `top9` recorded, because a cell depends on
nothing else. At stage n the n topmost layers that the cell depends on have random weights (Adebayo et al., NeurIPS
2018, cascading), the same cell of the same image is projected again, and its rank correlation with the projection of
stage 0 is noted. Layers above the cell's own do not matter to its projection and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline import tables
from pipeline.analyses import deconv as deconv_table
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.projections import cut_to_image
from pipeline.runs import Run, RunError, named, require_at_least_one
from pipeline.storage import Location
from zfnet import deconv
from zfnet.deconv import Cells, Semantics
from zfnet.graph import Graph
from zfnet.receptive import receptive_field
from zfnet.sanity import cascade, randomised, rank_correlation
from zfnet.tracing import trace

CORRELATIONS = ("spearman_absolute", "spearman_signed")

AGREES_WITHIN = 1e-5
"""Of the recorded activation: how well it must come back from its patch alone."""

SEMANTICS = Semantics(seed="one")
"""The paper's way down, but each cell starts with 1: where a randomised cell is silent there is still a picture, and
ranks do not see the scale."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of sanity."""

    layers: tuple[str, ...] = ()
    """Layers whose cells are checked; default all layers of the top9 table."""
    top9: str = "top9"
    """Table whose cells are checked: top9, or top9-NAME."""
    ranks: int = 9
    """Cells of each feature map: those of this rank or better."""
    seed: int = 0
    """Seed of the random weights."""
    grey: int = 124
    """What surrounds a patch, 0 to 255, filled in before the mean is subtracted."""
    part_size: int = 64
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 16
    """Images that go through the network together."""
    memory_mb: float = deconv.MEMORY_MB
    """Megabytes that windows on their way to the pixels take together."""

    @property
    def semantics(self) -> Semantics:
        """How cells are projected."""
        return SEMANTICS

    def __post_init__(self) -> None:
        require_at_least_one(self, "ranks", "part_size", "batch_size", "memory_mb")
        if not 0 <= self.grey <= 255:
            raise RunError(f"--grey is {self.grey}: give a grey from 0 to 255")


SCHEMA = tables.schema(
    "sanity",
    row="a projected cell with so many layers random, and its patch run forward again",
    file="layer",
    key=("layer", "feature_map", "rank", "stage"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        *tables.CELL,
        tables.column("inside", pa.bool_(), "Whether the whole receptive field lies in the image."),
        tables.column("stage", pa.int32(), "How many of the layers that the cell depends on are random, from the top."),
        tables.or_null("randomised", pa.string(), "The last of them; null at stage 0."),
        tables.or_null(
            "spearman_absolute",
            pa.float64(),
            "Rank correlation of the projection's absolute values with stage 0; null where one of both is constant.",
        ),
        tables.or_null("spearman_signed", pa.float64(), "The same of its values as they are."),
        tables.or_null("again", pa.float32(), "Stage 0: the activation of the patch alone."),
        tables.or_null("relative_error", pa.float64(), "Stage 0: |again - activation| / activation."),
    ],
)


def part_schema(config: Config) -> pa.Schema:
    """Columns of a part: those of the table."""
    return SCHEMA


def slices(context: Context) -> list[str]:
    """The layers to check. Raises: Unprojectable, RunError."""
    return deconv_table.slices(context)


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The cells come from this slice of top9."""
    return deconv_table.sources(context, layer)


def samples(context: Context, layers: list[str]) -> pa.Table:
    """The images that hold a cell of these layers."""
    keys = pa.chunked_array([_cells(context, layer)["key"].combine_chunks() for layer in layers], pa.string())
    rows = context.index.split(context.split)
    return rows.filter(pc.is_in(rows["key"], keys.unique()))


def expected_rows(context: Context, layer: str, skipped: set[str]) -> int:
    """Each cell at each stage, but for those in images that could not be read."""
    cells = sum(key not in skipped for key in _cells(context, layer)["key"].to_pylist())
    return cells * (1 + len(cascade(context.graph, layer)))


def forwards(context: Context) -> int:
    """As it is, at every stage, and each cell's patch; the mean over images."""
    layers = slices(context)
    cells = sum(int(_cells(context, layer).num_rows) for layer in layers)
    return 1 + len(_order(context, layers)) + -(-cells // max(1, int(samples(context, layers).num_rows)))


def _cells(context: Context, layer: str) -> pa.Table:
    names = [column.name for column in tables.CELL]
    rows = tables.read(context.run.slice(context.config.top9, layer), names)
    return rows.filter(pc.less_equal(rows["rank"], context.config.ranks))


def _order(context: Context, layers: list[str]) -> list[str]:
    """All layers that any of these depends on, from the top."""
    needed = {name for layer in layers for name in cascade(context.graph, layer)}
    return [name for name in reversed(context.graph.layers) if name in needed]


@dataclass(frozen=True)
class Prepared:
    """What an actor holds: the cells, and the network at every stage."""

    cells: dict[str, pa.Table]
    """Of each layer."""
    of_key: dict[str, dict[str, Any]]
    """Layer -> key -> rows of its cells in that image."""
    random: dict[str, Graph]
    """The network in which a layer and all above it are random. One cascade does for all cells: what is random above a
    cell's own layer does not reach it."""


def setup(context: Context, layers: list[str]) -> Prepared:
    """Read the cells, randomise the layers one after another; each network shares all else with the one before."""
    cells = {layer: _cells(context, layer) for layer in layers}
    of_key = {layer: rows.select(["key"]).to_pandas().groupby("key").indices for layer, rows in cells.items()}
    random, network = {}, context.model.network
    for name in _order(context, layers):
        network = randomised(network, [name], context.config.seed)
        random[name] = trace(network, context.graph.input_shape)
    return Prepared(cells, of_key, random)


@dataclass(frozen=True)
class Chosen:
    """A layer's cells in the images of a batch."""

    rows: pa.Table
    cells: Cells


def map_batch(context: Context, prepared: Prepared, batch: Batch) -> pa.Table:
    """The rows of all cells that lie in these images, at all stages."""
    chosen = {layer: _choose(prepared, layer, batch.pictures) for layer in prepared.cells}
    chosen = {layer: some for layer, some in chosen.items() if some.rows.num_rows}
    before = _projections(context, context.graph, batch.x, chosen)
    pieces = [SCHEMA.empty_table()]
    for layer, some in chosen.items():
        again = _again(context, layer, some, batch.pictures)
        stage = {"stage": 0, "again": again, **_correlations(before[layer], before[layer])}
        pieces.append(_rows(context, some.rows, stage, None))
    for name, graph in prepared.random.items():
        touched = {layer: some for layer, some in chosen.items() if name in cascade(context.graph, layer)}
        after = _projections(context, graph, batch.x, touched)
        for layer, some in touched.items():
            number = 1 + cascade(context.graph, layer).index(name)
            stage = {"stage": number, "again": None, **_correlations(before[layer], after[layer])}
            pieces.append(_rows(context, some.rows, stage, name))
    return pa.concat_tables(pieces)


def _choose(prepared: Prepared, layer: str, pictures: list[Picture]) -> Chosen:
    of_key = prepared.of_key[layer]
    pairs = [(image, row) for image, picture in enumerate(pictures) for row in of_key.get(picture.sample.key, ())]
    images, places = zip(*pairs, strict=True) if pairs else ((), ())
    rows = prepared.cells[layer].take(pa.array(places, pa.int64()))
    columns = [np.array(images), *(rows[name].to_numpy() for name in ("feature_map", "row", "col"))]
    return Chosen(rows, Cells(*(torch.as_tensor(column.astype(np.int64)) for column in columns)))


def _projections(
    context: Context, graph: Graph, x: Tensor, chosen: dict[str, Chosen]
) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Of each layer the projections of its cells, in their order, cut to the image."""
    where = {layer: some.cells for layer, some in chosen.items()}
    found: dict[str, dict[int, Any]] = {layer: {} for layer in chosen}
    for layer, which, _, projections in deconv.project_images(graph, x, where, SEMANTICS, context.config.memory_mb):
        pixels, top, left = projections
        windows = zip(which.tolist(), pixels.cpu().numpy(), top.tolist(), left.tolist(), strict=True)
        for place, window, top_px, left_px in windows:
            found[layer][place] = cut_to_image(context, window, top_px, left_px)[0]
    return {layer: [some[place] for place in range(len(some))] for layer, some in found.items()}


def _correlations(one: list[Any], other: list[Any]) -> dict[str, list[float | None]]:
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(one, other, strict=True)]
    absolute = [rank_correlation(a.abs(), b.abs()) for a, b in pairs]
    signed = [rank_correlation(a, b) for a, b in pairs]
    columns = dict(zip(CORRELATIONS, (absolute, signed), strict=True))
    return {name: [None if math.isnan(value) else value for value in values] for name, values in columns.items()}


def _again(context: Context, layer: str, chosen: Chosen, pictures: list[Picture]) -> list[float]:
    """The cells' activations from their receptive fields alone, each at its own place on grey."""
    config: Config = context.config
    size, target = context.model.preprocessing.crop_px, context.graph.activation_of(layer)
    image, feature_map, row, col = (column.tolist() for column in chosen.cells)
    field = receptive_field(context.graph, layer)
    found: list[float] = []
    for first in range(0, len(row), config.batch_size):
        some = range(first, min(first + config.batch_size, len(row)))
        pasted = np.full((len(some), size, size, 3), config.grey, np.uint8)
        for place, cell in enumerate(some):
            top, left, height, width = field.box(row[cell], col[cell])
            box = np.s_[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
            pasted[place][box] = pictures[image[cell]].pixels[box]
        x = context.model.preprocessing.normalise(torch.from_numpy(pasted).to(context.device))
        activation = context.graph.run(x, [target])[target]
        maps = activation if activation.ndim == 4 else activation[:, :, None, None]
        cells = [torch.tensor([column[cell] for cell in some]) for column in (feature_map, row, col)]
        found += maps[torch.arange(len(some)), cells[0], cells[1], cells[2]].tolist()
    return found


def _rows(context: Context, rows: pa.Table, stage: dict[str, Any], name: str | None) -> pa.Table:
    """The table's rows of some cells of a layer at one stage."""
    count, size = rows.num_rows, context.model.preprocessing.crop_px
    recorded, again = rows["activation"].to_numpy(), stage.pop("again")
    error = None if again is None else np.abs(np.array(again, np.float64) - recorded) / recorded
    box = {side: rows[side].to_numpy() for side in ("top", "left", "height", "width")}
    leaves = (box["top"] + box["height"] > size) | (box["left"] + box["width"] > size)
    columns = {
        **{column: [value] * count for column, value in context.identity.items()},
        **{column: rows[column] for column in rows.column_names},
        "inside": (box["top"] >= 0) & (box["left"] >= 0) & ~leaves,
        "randomised": [name] * count,
        "again": [None] * count if again is None else again,
        "relative_error": [None] * count if error is None else error,
        **stage,
        "stage": [stage["stage"]] * count,
    }
    return tables.conform(columns, SCHEMA)


_ORDER = [("stage", "ascending"), ("feature_map", "ascending"), ("rank", "ascending")]


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """All rows of a part, by layer, so that the fold reads only its own."""
    table = pa.concat_tables([SCHEMA.empty_table(), *results])
    return table.sort_by([("layer", "ascending"), *_ORDER])


def fold(context: Context, parts: list[Location], layers: list[str]) -> Iterator[Finished]:
    """A file for each layer, by stage, feature map and rank."""
    others = [name for name in SCHEMA.names if name != "layer"]
    for layer in layers:
        rows = pa.concat_tables([tables.read_equal(part, others, "layer", layer) for part in parts])
        rows = rows.add_column(2, "layer", pa.array([layer] * rows.num_rows, pa.string()))
        yield Finished("sanity", layer, SCHEMA, iter([tables.conform(rows.sort_by(_ORDER), SCHEMA)]))


def report(run: Run, name: str | None) -> Iterator[str]:
    """Layer by layer, how many patches give back their activation, and how random layers change projections."""
    table = named("sanity", name)
    for layer in run.manifest(table):
        rows = tables.read(run.slice(table, layer)).to_pandas()
        first = rows[rows.stage == 0]
        agree, worst = (first.relative_error <= AGREES_WITHIN).sum(), first.relative_error.max()
        own, deepest = (
            " and ".join(f"{rows.loc[rows.stage == stage, name].mean():.2f}" for name in CORRELATIONS)
            for stage in (1, rows.stage.max())
        )
        yield (
            f"{table}: {layer}: {agree} of {len(first)} patches give back their activation within {AGREES_WITHIN:g} "
            f"(worst {worst:.1e}); rank correlation, absolute and signed, with its own layer random {own}, with all "
            f"that it depends on random {deepest}"
        )


ANALYSIS = Analysis(
    table="sanity",
    tables=("sanity",),
    module=__name__,
    part_schema=part_schema,
    slices=slices,
    sources=sources,
    samples=samples,
    setup=setup,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=forwards,
    expected_rows=expected_rows,
    report=report,
)
