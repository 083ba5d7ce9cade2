"""When does each layer converge? Cosines of filters and of strongest projections to those of the last epoch shown.

A row for each epoch and feature map, made of the table `evolution` and of the checkpoints' weights alone. A slice is
one epoch against the last one: as training goes on, the next call compares all epochs with the new last one, and what
was compared before stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline import checkpoints, tables
from pipeline.analyses.evolution_cells import EPOCH, epoch_of
from pipeline.derive import Context, Derivation
from pipeline.projections import relative
from pipeline.runs import Model, Run, RunError, named
from zfnet.evolution import cosines, in_field

TOGETHER = 64
"""Feature maps whose projections are held at once."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of evolution_convergence."""

    evolution: str = "evolution"
    """Table whose epochs are compared: evolution, or evolution-NAME."""


SCHEMA = tables.schema(
    "evolution_convergence",
    row="a feature map at an epoch: how near its filter and projection are to the last epoch's",
    file="epoch and last epoch",
    key=("epoch", "reference_epoch", "layer", "feature_map"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        EPOCH,
        tables.column("reference_epoch", pa.int32(), "The epoch that it is compared with: the last one shown."),
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.or_null(
            "filter_cosine",
            pa.float64(),
            "Cosine of the map's weights, without the bias, and those of the reference epoch; null for what has none, "
            "or where either are all zero.",
        ),
        tables.or_null(
            "projection_cosine",
            pa.float64(),
            "Cosine of the map's strongest projection and that of the reference epoch, receptive field on receptive "
            "field; null where either has none.",
        ),
        tables.or_null("same_image", pa.bool_(), "Whether both are of one image; null where either has none."),
    ],
)

_READ = ["feature_map", "key", "top", "left", "height", "width", "cells"]
_PROJECTION = ["projection", "projection_height", "projection_width"]


def _shown(run: Run, table: str) -> list[str]:
    """The slices of the epochs shown whose checkpoints are still there, in order."""
    there = checkpoints.finished(run)
    found = sorted((slice_ for slice_ in run.manifest(table) if epoch_of(slice_) in there), key=epoch_of)
    if not found:
        raise RunError(f"there is no epoch to compare in {table} of {run.location}: run jobs/evolution.py first")
    return found


def last_model(run: Run, config: Config) -> Model:
    """The network at the last epoch shown."""
    return checkpoints.load_model(run, epoch_of(_shown(run, config.evolution)[-1]))


def slices(context: Context) -> list[str]:
    """Each epoch against the last one."""
    shown = _shown(context.run, context.config.evolution)
    return [f"{slice_}-against-{epoch_of(shown[-1]):04d}" for slice_ in shown]


def _pair(slice_: str) -> tuple[str, str]:
    one, other = slice_.split("-against-")
    return one, f"epoch-{other}"


def sources(context: Context, slice_: str) -> dict[str, Any]:
    """The slices of evolution of both epochs."""
    entries = context.run.manifest(context.config.evolution)
    return {name: {part: entries[name].get(part) for part in ("fingerprint", "rows")} for name in _pair(slice_)}


def make(context: Context, slice_: str) -> Iterator[pa.Table]:
    """The rows, by layer and feature map."""
    one, other = _pair(slice_)
    entry = context.run.manifest(context.config.evolution)[one]
    made: dict[str, Any] = entry["fingerprint"]
    network = _network(str(context.run.location), epoch_of(one))
    about = {
        "model_id": made["model_id"],
        "data_id": made["data_id"],
        "epoch": epoch_of(one),
        "reference_epoch": epoch_of(other),
    }
    for layer in made["layers"]:
        maps = context.graph[context.graph.activation_of(layer)].shape[0]
        filters = _filter_cosines(network, context.model.network, layer, maps)
        for first in range(0, maps, TOGETHER):
            some = range(first, min(maps, first + TOGETHER))
            found = _compared(context, layer, some, one, other)
            columns = {name: [value] * len(some) for name, value in {**about, "layer": layer}.items()}
            columns |= {"feature_map": list(some), "filter_cosine": filters[some.start : some.stop], **found}
            yield tables.conform(columns, SCHEMA)


@lru_cache(maxsize=1)
def _network(location: str, epoch: int) -> nn.Module:
    return checkpoints.load_model(Run.at(location), epoch).network


def _filter_cosines(one: nn.Module, other: nn.Module, layer: str, maps: int) -> list[float | None]:
    weights = [dict(network.named_parameters()).get(f"{layer}.weight") for network in (one, other)]
    if any(weight is None or len(weight) != maps for weight in weights):
        return [None] * maps
    return _known(cosines(*(weight.detach() for weight in weights if weight is not None)))


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _compared(context: Context, layer: str, maps: range, one: str, other: str) -> dict[str, list[Any]]:
    """The projections of some feature maps at both epochs."""
    then, last = (_rows(context, slice_, layer, maps) for slice_ in (one, other))
    pairs = [(then[number], last[number]) if number in then and number in last else None for number in maps]
    fields = [[_field(context, row) for row in pair] for pair in pairs if pair is not None]
    found = iter(_known(cosines(*map(torch.stack, zip(*fields, strict=True)))) if fields else [])
    return {
        "projection_cosine": [None if pair is None else next(found) for pair in pairs],
        "same_image": [None if pair is None else pair[0]["key"] == pair[1]["key"] for pair in pairs],
    }


def _rows(context: Context, slice_: str, layer: str, maps: range) -> dict[int, dict[str, Any]]:
    """Of each feature map its row at an epoch, where it has one."""
    wanted = [("layer", "=", layer), ("feature_map", ">=", maps.start), ("feature_map", "<", maps.stop)]
    rows = tables.read(context.run.slice(context.config.evolution, slice_), [*_READ, *_PROJECTION], wanted)
    columns = {name: rows[name].to_pylist() for name in rows.column_names if name != "projection"}
    columns["projection"] = [_values(value) for value in rows["projection"]]
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {row["feature_map"]: row for row in found}


def _values(scalar: Any) -> bytes | npt.NDArray[np.float32]:
    """A stored projection, without a detour over Python floats."""
    if isinstance(scalar, pa.BinaryScalar):
        picture: bytes = scalar.as_py()
        return picture
    return np.asarray(scalar.values, dtype=np.float32)


def _field(context: Context, row: dict[str, Any]) -> Tensor:
    """A projection at its place in its receptive field; one of all cells of a map is seen over the whole image."""
    pixels = torch.from_numpy(relative(row))
    if row["cells"] == "all":
        size = context.model.preprocessing.crop_px
        return in_field(pixels, 0, 0, (size, size))
    return in_field(pixels, row["top"], row["left"], (row["height"], row["width"]))


ANALYSIS = Derivation(
    table="evolution_convergence",
    schema=SCHEMA,
    model=last_model,
    selects=(),
    slices=slices,
    sources=sources,
    make=make,
)


def report(run: Run, name: str | None) -> Iterator[str]:
    """What the tables show: layer by layer the means over feature maps, epoch by epoch."""
    table, compared = (named(n, name) for n in ("evolution", "evolution_convergence"))
    last = epoch_of(_shown(run, table)[-1])
    cosine = pd.concat(
        tables.read(run.slice(compared, slice_)).to_pandas()
        for slice_ in run.manifest(compared)
        if slice_.endswith(f"-against-{last:04d}")
    )
    shown = pd.concat(
        tables.read(run.slice(table, slice_), ["epoch", "layer", "feature_map", "image_changed"]).to_pandas()
        for slice_ in run.manifest(table)
    )
    layers = list(dict.fromkeys(cosine.layer))
    of = {
        f"filters, cosine to epoch {last}": cosine.groupby(["layer", "epoch"]).filter_cosine.mean(),
        f"projections, cosine to epoch {last}": cosine.groupby(["layer", "epoch"]).projection_cosine.mean(),
        "share of maps whose image is another one than at the epoch before": shown.assign(
            changed=shown.image_changed.astype("Float64")
        )
        .groupby(["layer", "epoch"])
        .changed.mean(),
    }
    for what, means in of.items():
        yield f"{table}: {what}\n" + means.unstack("epoch").loc[layers].to_string(float_format="{:.2f}".format)
