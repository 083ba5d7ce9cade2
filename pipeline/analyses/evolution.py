"""How feature maps grow as training goes on (ZFNet section 4, figure 4).

For each chosen epoch the strongest activation of every feature map over the **training** images, and its projection, as
`deconv` makes them; and whether it comes from another image than at the epoch shown before: "sudden jumps in appearance
result from a change in the image from which the strongest activation originates". A slice is an epoch. A new checkpoint
costs one sweep over the images and the projections of its cells; epochs that are finished are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline import derive, sweep, tables
from pipeline.analyses import deconv as deconv_table
from pipeline.analyses import evolution_cells, evolution_convergence
from pipeline.analyses.deconv import LayerCells
from pipeline.analyses.evolution_cells import at_epoch, chosen_epochs, epoch_of, first_model, model_id
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Options, open_context
from pipeline.progress import say
from pipeline.runs import Run, RunError, named, require_at_least_one
from pipeline.sources.default import shards_or_default
from pipeline.storage import Location
from zfnet import deconv
from zfnet.deconv import Semantics


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of evolution."""

    epochs: tuple[int, ...] = ()
    """Epochs to show, which must have a checkpoint; default the paper's 1 2 5 10 20 30 40 64, those that exist."""
    layers: tuple[str, ...] = ()
    """Layers to show; default all convolutions."""
    semantics: Semantics = field(default_factory=Semantics)
    """Which of the published deconvnets; the defaults are the paper's."""
    values: Literal["float32", "float16", "png"] | None = None
    """How projections are stored; png: 8 bit with a scale. Default float32 while that is below 2 GB."""
    part_size: int = 64
    """Images of a part of the projections, the unit of work and of resume."""
    sweep_part_size: int = 256
    """Training images of a part of the sweep."""
    batch_size: int = 16
    """Images that go through the networks together."""
    memory_mb: float = deconv.MEMORY_MB
    """Megabytes that windows on their way to the pixels take together, beside the images' own forward pass."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "part_size", "sweep_part_size", "batch_size", "memory_mb")

    @property
    def cells(self) -> evolution_cells.Config:
        """Of the sweep that finds the cells."""
        return evolution_cells.Config(
            epochs=self.epochs, layers=self.layers, part_size=self.sweep_part_size, batch_size=self.batch_size
        )

    @property
    def projections(self) -> deconv_table.Config:
        """Of the projections of one epoch's cells."""
        return deconv_table.Config(
            top9="evolution_cells", semantics=self.semantics, values=self.values, memory_mb=self.memory_mb
        )


_BEFORE = [
    tables.or_null("previous_epoch", pa.int32(), "The epoch shown before this one; null for the first."),
    tables.or_null(
        "image_changed",
        pa.bool_(),
        "Whether the map's strongest image then was another one, or none; null for the first epoch.",
    ),
]


def schema(config: Config) -> pa.Schema:
    """Columns of the table: those of deconv, and the epochs."""
    model, data, *others = deconv_table.schema(config.projections)
    return tables.schema(
        "evolution",
        row="a feature map at an epoch of training: its strongest training image then, projected",
        file="epoch",
        key=("epoch", "layer", "feature_map"),
        columns=[model, data, evolution_cells.EPOCH, *_BEFORE, *others],
    )


EVOLUTION = schema(Config())


def part_schema(config: Config) -> pa.Schema:
    """Columns of a part."""
    return pa.schema([evolution_cells.EPOCH, *deconv_table.schema(config.projections)])


def resolve(context: Context) -> Config:
    """The layers by name, and float32 where the forecast allows it. Raises: RunError where the choice is the user's."""
    config: Config = evolution_cells.resolve(context)
    if config.values is not None:
        return config
    maps = {layer: context.graph[context.graph.activation_of(layer)].shape[0] for layer in config.layers}
    of_an_epoch = sum(count * deconv_table.bytes_of(context, layer) for layer, count in maps.items())
    forecast = of_an_epoch * len(slices(context))
    if forecast >= deconv_table.ASK_ABOVE_BYTES:
        raise RunError(
            f"the projections would take {forecast / 1e9:.1f} GB as float32: choose with --values float32, float16 "
            f"({forecast / 2e9:.1f} GB) or png (about {forecast / 8e9:.1f} GB), or name fewer --layers or --epochs"
        )
    return replace(config, values="float32")


def slices(context: Context) -> list[str]:
    """The epochs. Raises: Unprojectable, RunError, UnknownLayer."""
    wanted = evolution_cells.slices(context)
    blank = torch.zeros(1, *context.graph.input_shape, device=context.device)
    layers = context.config.layers or evolution_cells.resolve(context).layers
    deconv.record(context.graph, blank, layers, context.config.semantics)  # refuses what cannot be projected
    return wanted


def _table(context: Context) -> str:
    return context.named("evolution_cells")


def previous(context: Context, slice_: str) -> str | None:
    """The last epoch before, of those whose cells are known; a finished slice keeps the one it was compared with."""
    finished = context.run.manifest(context.table).get(slice_)
    if finished is not None:
        kept: str | None = finished["fingerprint"]["sources"]["previous"]
        return kept
    earlier = [name for name in context.run.manifest(_table(context)) if epoch_of(name) < epoch_of(slice_)]
    return max(earlier, key=epoch_of, default=None)


def sources(context: Context, slice_: str) -> dict[str, Any]:
    """The cells of this epoch, and with which epoch's they are compared."""
    entry = context.run.manifest(_table(context)).get(slice_, {})
    made = {name: entry.get(name) for name in ("fingerprint", "rows", "samples", "skipped")}
    return {_table(context): made, "previous": previous(context, slice_)}


def samples(context: Context, slices: list[str]) -> pa.Table:
    """The images that hold a cell at these epochs."""
    keys = pa.chunked_array([_cells(context, slice_)["key"].combine_chunks() for slice_ in slices], pa.string())
    rows = context.index.split(context.split)
    return rows.filter(pc.is_in(rows["key"], keys.unique()))


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each cell, but for those in images that could not be read."""
    return sum(key not in skipped for key in _cells(context, slice_)["key"].to_pylist())


def _cells(context: Context, slice_: str) -> pa.Table:
    names = [column.name for column in tables.CELL]
    return tables.read(context.run.slice(_table(context), slice_), names)


def setup(context: Context, slices: list[str]) -> dict[str, tuple[Context, dict[str, LayerCells]]]:
    """The network of each epoch and the cells of its layers."""
    found = {}
    for slice_ in slices:
        cells = _cells(context, slice_)
        of_layers = {layer: cells.filter(pc.equal(cells["layer"], layer)) for layer in context.config.layers}
        then = replace(at_epoch(context, slice_), config=context.config.projections)
        found[slice_] = then, {layer: LayerCells.of(rows) for layer, rows in of_layers.items()}
    return found


def map_batch(context: Context, at: dict[str, tuple[Context, dict[str, LayerCells]]], batch: Batch) -> pa.Table:
    """The rows of all cells that lie in these images, at all epochs."""
    pieces = [part_schema(context.config).empty_table()]
    for slice_, (then, cells) in at.items():
        rows = deconv_table.map_batch(then, cells, batch)
        epoch = pa.array([epoch_of(slice_)] * rows.num_rows, pa.int32())
        pieces.append(rows.add_column(0, evolution_cells.EPOCH, epoch))
    return pa.concat_tables(pieces)


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """All rows of a part, so sorted that the fold can read a range of feature maps."""
    table = pa.concat_tables([part_schema(context.config).empty_table(), *results])
    by = ["epoch", "layer", "feature_map"]
    return table.take(pc.sort_indices(table.select(by), sort_keys=[(name, "ascending") for name in by]))


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """A file for each epoch, by layer and feature map."""
    for slice_ in slices:
        yield Finished("evolution", slice_, schema(context.config), _in_order(context, parts, slice_))


def _in_order(context: Context, parts: list[Location], slice_: str) -> Iterator[pa.Table]:
    """An epoch's rows in order, as many feature maps at a time as fill a row group: memory stays bounded."""
    before = previous(context, slice_)
    shown = {} if before is None else _keys(context, before)
    for layer in context.config.layers:
        maps = context.graph[context.graph.activation_of(layer)].shape[0]
        together = max(1, tables.ROW_GROUP_BYTES // deconv_table.bytes_of(context, layer))
        for first in range(0, maps, together):
            wanted = [("epoch", "=", epoch_of(slice_)), ("layer", "=", layer)]
            wanted += [("feature_map", ">=", first), ("feature_map", "<", first + together)]
            rows = pa.concat_tables([tables.read(part, filters=wanted) for part in parts])
            rows = rows.take(pc.sort_indices(rows["feature_map"]))
            now = zip(rows["feature_map"].to_pylist(), rows["key"].to_pylist(), strict=True)
            changed = [None if before is None else shown.get((layer, number)) != key for number, key in now]
            epoch = None if before is None else epoch_of(before)
            columns = {name: rows[name] for name in rows.column_names}
            columns |= {"previous_epoch": [epoch] * rows.num_rows, "image_changed": changed}
            yield tables.conform(columns, schema(context.config))


def _keys(context: Context, slice_: str) -> dict[tuple[str, int], str]:
    """Of each layer and feature map the image at an epoch."""
    cells = _cells(context, slice_).select(["layer", "feature_map", "key"]).to_pydict()
    return {(layer, number): key for layer, number, key in zip(*cells.values(), strict=True)}


ANALYSIS = Analysis(
    table="evolution",
    tables=("evolution",),
    module=__name__,
    model=first_model,
    model_id=model_id,
    part_schema=part_schema,
    resolve=resolve,
    selects=("epochs", "sweep_part_size"),
    slices=slices,
    sources=sources,
    samples=samples,
    setup=setup,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: len(slices(context)),
    expected_rows=expected_rows,
)


def run(options: Options, config: Config) -> int:
    """Find the cells, project them, compare the epochs, and say what was found. Returns the worst exit status.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    resolved = options.resolved()
    # Chosen once: training may go on meanwhile.
    config = replace(config, epochs=tuple(chosen_epochs(Run.at(options.run), config.epochs)))
    # What is refused is refused at once.
    shards = partial(shards_or_default, options.data, options.index)
    resolve(open_context(resolved, config, ANALYSIS.table, "cpu", first_model, shards))
    status = sweep.run(evolution_cells.ANALYSIS, options, config.cells)
    if options.plan and not _have_cells(resolved, config):
        return status
    status = max(status, sweep.run(ANALYSIS, options, config))
    if not options.plan:
        table = named("evolution", options.name)
        compared = derive.Options(run=options.run, name=options.name)
        derive.run(evolution_convergence.ANALYSIS, compared, evolution_convergence.Config(evolution=table))
        for line in evolution_convergence.report(Run.at(options.run), options.name):
            say(line)
    return status


def _have_cells(options: Options, config: Config) -> bool:
    """Whether the projections can be forecast."""
    context = open_context(options, config, ANALYSIS.table, "cpu", first_model)
    return set(slices(context)) <= set(context.run.manifest(_table(context)))
