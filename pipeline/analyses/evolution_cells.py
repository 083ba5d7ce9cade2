"""The strongest activation of every feature map over the training images, epoch by epoch: what `evolution` projects.

A row for each feature map and epoch, a slice for each epoch. Every checkpoint is a network of its own; those that are
missing are swept together, so that each image is read and decoded once. The order is that of `top9`: activation
descending, key ascending, row, col.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline import checkpoints, tables
from pipeline.analyses import top9
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context
from pipeline.fold import Parts, fold_tree
from pipeline.runs import Model, Run, RunError, require_at_least_one
from zfnet.activations import NONE, Strongest, TopK
from zfnet.receptive import receptive_field
from zfnet.tracing import trace


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of evolution_cells."""

    epochs: tuple[int, ...] = ()
    """Epochs whose checkpoints are swept; default the paper's, those that exist."""
    layers: tuple[str, ...] = ()
    """Layers to sweep; default all convolutions."""
    part_size: int = 256
    """Samples of a part, the unit of work and of resume."""
    batch_size: int = 16
    """Images that go through the networks together."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "part_size", "batch_size")


EPOCH = tables.column("epoch", pa.int32(), "Whole epochs that the network was trained for.")

SCHEMA = tables.schema(
    "evolution_cells",
    row="a feature map at an epoch of training: its strongest cell over the training images",
    file="epoch",
    key=("epoch", "layer", "feature_map"),
    columns=[tables.MODEL_ID, tables.DATA_ID, EPOCH, *tables.CELL],
)

PART = pa.schema(
    [
        ("epoch", pa.int32()),
        ("layer", pa.string()),
        ("feature_map", pa.int32()),
        ("activation", pa.float32()),
        ("sample", pa.int64()),
        ("row", pa.int64()),
        ("col", pa.int64()),
    ]
)
_MAP = ("epoch", "layer", "feature_map")


def chosen_epochs(run: Run, epochs: tuple[int, ...]) -> list[int]:
    """The epochs asked for, or the paper's that have a checkpoint, in order. Raises: RunError."""
    there = checkpoints.finished(run)
    found = sorted(set(epochs)) or [epoch for epoch in checkpoints.EVOLUTION if epoch in there]
    if missing := [epoch for epoch in found if epoch not in there] if found else ["any"]:
        raise RunError(
            f"there is no checkpoint of epoch {', '.join(map(str, missing))} in {run.location}, which has "
            f"{', '.join(map(str, there)) or 'none'}: name some of these with --epochs, or train with jobs/train.py "
            "(--keep-epochs says which are kept)"
        )
    return found


def epoch_of(slice_: str) -> int:
    """The epoch of a slice, named as its checkpoint is."""
    return int(slice_.removeprefix("epoch-"))


def first_model(run: Run, config: Any) -> Model:
    """The network of the first epoch: all have its form and its preprocessing."""
    return checkpoints.load_model(run, chosen_epochs(run, config.epochs)[0])


def slices(context: Context) -> list[str]:
    """The epochs. Raises: RunError, UnknownLayer."""
    top9.slices(context)
    return [checkpoints.epoch_name(epoch) for epoch in chosen_epochs(context.run, context.config.epochs)]


_model_ids: dict[tuple[str, str], str] = {}


def model_id(context: Context, slice_: str) -> str | None:
    """Identity of the network at that epoch; None where its checkpoint is gone. Each is read once in a process."""
    place = str(context.run.location), slice_
    if epoch_of(slice_) not in checkpoints.finished(context.run):
        return None
    if place not in _model_ids:
        _model_ids[place] = checkpoints.load_model(context.run, epoch_of(slice_)).model_id
    return _model_ids[place]


def resolve(context: Context) -> Any:
    """The layers by name: they decide the content of a slice."""
    return replace(context.config, layers=tuple(top9.slices(context)))


def at_epoch(context: Context, slice_: str) -> Context:
    """The same with the network of that epoch, on the device."""
    model = checkpoints.load_model(context.run, epoch_of(slice_))
    network = model.network.to(context.device)
    if context.device == "cpu":  # as the images are laid out: it changes no bit
        network.to(memory_format=torch.channels_last)
    return replace(context, model=model, graph=trace(network, context.graph.input_shape))


def setup(context: Context, slices: list[str]) -> dict[str, Context]:
    """The networks of all epochs that are swept."""
    return {slice_: at_epoch(context, slice_) for slice_ in slices}


def map_batch(context: Context, at: dict[str, Context], batch: Batch) -> dict[str, top9.Found]:
    """The strongest cells of each layer at each epoch."""
    return {slice_: top9.map_batch(then, list(context.config.layers), batch) for slice_, then in at.items()}


def reduce_part(context: Context, results: list[dict[str, top9.Found]]) -> pa.Table:
    """The part's strongest cell of each map that any of its images activates."""
    pieces = [PART.empty_table()]
    for slice_ in results[0] if results else ():
        numbers = np.concatenate([result[slice_].numbers for result in results])
        for layer in context.config.layers:
            found = Strongest.join([result[slice_].layers[layer] for result in results])
            top = TopK.of(found, numbers, 1)
            alive = np.flatnonzero(top.sample[:, 0] != NONE)
            columns = {name: getattr(top, name)[alive, 0] for name in ("activation", "sample", "row", "col")}
            named = {"epoch": [epoch_of(slice_)] * len(alive), "layer": [layer] * len(alive), "feature_map": alive}
            pieces.append(tables.conform(named | columns, PART))
    return strongest(pieces)


def strongest(pieces: list[pa.Table]) -> pa.Table:
    """Of each epoch, layer and feature map the strongest of these cells, in a total order."""
    order = [*((name, "ascending") for name in _MAP), ("activation", "descending")]
    order += [(name, "ascending") for name in ("sample", "row", "col")]
    rows = pa.concat_tables(pieces).sort_by(order).combine_chunks()
    first = np.ones(rows.num_rows, dtype=bool)
    for_each = [rows[name].combine_chunks() for name in _MAP]
    same = [np.asarray(pc.equal(column[1:], column[:-1])) for column in for_each] if rows.num_rows else []
    first[1:] = ~np.logical_and.reduce(same) if same else True
    return rows.filter(pa.array(first))


def fold(context: Context, parts: Parts, slices: list[str]) -> Iterator[Finished]:
    """A file for each epoch, by layer and feature map."""
    samples = context.index.split(context.split).sort_by("number")
    found = fold_tree(parts, tables.read, strongest)
    for slice_ in slices:
        rows = found.filter(pc.equal(found["epoch"], epoch_of(slice_)))
        identity = context.identity | {"model_id": model_id(context, slice_), "epoch": epoch_of(slice_)}
        pieces = [
            _cells(context, identity, layer, rows.filter(pc.equal(rows["layer"], layer)), samples)
            for layer in context.config.layers
        ]
        yield Finished("evolution_cells", slice_, SCHEMA, iter(pieces))


def _cells(context: Context, identity: dict[str, Any], layer: str, rows: pa.Table, samples: pa.Table) -> pa.Table:
    """The table's rows of one layer at one epoch."""
    row, col = rows["row"].to_numpy(), rows["col"].to_numpy()
    columns: dict[str, Any] = {
        **{name: [value] * rows.num_rows for name, value in identity.items()},
        **{name: rows[name] for name in ("layer", "feature_map", "activation", "row", "col")},
        "rank": [1] * rows.num_rows,
        **top9.sample_columns(context, samples.take(rows["sample"])),
        **tables.box_columns(receptive_field(context.graph, layer).box(row, col), rows.num_rows),
    }
    return tables.conform(columns, SCHEMA)


ANALYSIS = Analysis(
    table="evolution_cells",
    tables=("evolution_cells",),
    module=__name__,
    model=first_model,
    model_id=model_id,
    part_schema=lambda config: PART,
    resolve=resolve,
    selects=("epochs",),
    slices=slices,
    samples=top9.samples,
    setup=setup,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    in_groups=True,
    forwards=lambda context: len(slices(context)),
)
