"""Two runs' feature maps side by side, layer by layer, as one table and one paragraph (ZFNet section 4.1).

A row for each layer and measure, of this run and of the other; layers are paired by their place. A slice is the
comparison with one other network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import derive, tables
from pipeline.analyses.units import SCHEMA as UNITS
from pipeline.derive import Context, Derivation, require_slices
from pipeline.progress import say
from pipeline.runs import Run, RunError, named
from zfnet.tracing import trace

MEASURES = {
    "dead": "dead maps",
    "nearly_dead": "nearly dead maps",
    "filter_duplicate": "near-duplicate filters",
    "answers_alike": "maps that answer as another one does",
    "dominant": "filters that dominate",
    "low_share": "energy at very low frequencies",
    "high_share": "energy at very high frequencies",
    "middle_share": "energy between",
    "aliased_share": "aliased by the first stride",
    "class_entropy": "entropy of the top-9's classes",
}
"""Measure -> what it is. Each is a share from 0 to 1: the mean over a layer's maps of the column of `units`."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of units_comparison."""

    against: str
    """The other run, with a table units."""
    units: str = "units"
    """Table to compare, in both runs: units, or units-NAME."""


SCHEMA = tables.schema(
    "units_comparison",
    row="a layer and measure, of this run and of another",
    file="other run",
    key=("layer", "other_model_id", "measure"),
    columns=[
        tables.MODEL_ID,
        tables.LAYER,
        tables.column("other_model_id", pa.string(), "Identity of the other network."),
        tables.column("other_layer", pa.string(), "The other network's layer at the same place."),
        tables.column("place", pa.int32(), "Place of the layer among those compared, from 1."),
        tables.column("maps", pa.int32(), "Feature maps of the layer."),
        tables.column("other_maps", pa.int32(), "Feature maps of the other layer."),
        tables.column("measure", pa.string(), f"One of {', '.join(MEASURES)}: means over maps of the table units."),
        tables.or_null("value", pa.float64(), "Share from 0 to 1; null where no map has it."),
        tables.or_null("other_value", pa.float64(), "The same of the other network."),
    ],
)


def _other(context: Context) -> Context:
    run = Run.at(context.config.against)
    model = run.load_model()
    size = model.preprocessing.crop_px
    return replace(context, run=run, model=model, graph=trace(model.network, (3, size, size)))


def slices(context: Context) -> list[str]:
    """The other network's identity. Raises: RunError where either run has no table units, or both are one network."""
    other = _other(context)
    for one in (context, other):
        require_slices(one, context.config.units, (), "jobs/units.py")
    if other.model.model_id == context.model.model_id:
        raise RunError(f"--against is {context.config.against}, which holds the same network: give another run")
    return [other.model.model_id]


def sources(context: Context, slice_: str) -> dict[str, Any]:
    """All slices of both tables."""
    return {
        one.model.model_id: {layer: derive.source(one, context.config.units, layer) for layer in _layers(one)}
        for one in (context, _other(context))
    }


def _layers(context: Context) -> list[str]:
    """The layers of its table units, in the order of the network."""
    found = context.run.manifest(context.config.units)
    return [layer for layer in context.graph.layers if layer in found]


def make(context: Context, slice_: str) -> Iterator[pa.Table]:
    """The rows, by place and measure."""
    other = _other(context)
    rows = []
    for place, (layer, other_layer) in enumerate(zip(_layers(context), _layers(other), strict=False), start=1):
        one, two = _means(context, layer), _means(other, other_layer)
        shared = {
            "model_id": context.model.model_id,
            "layer": layer,
            "other_model_id": other.model.model_id,
            "other_layer": other_layer,
            "place": place,
            "maps": one.pop("maps"),
            "other_maps": two.pop("maps"),
        }
        rows += [{**shared, "measure": name, "value": one[name], "other_value": two[name]} for name in MEASURES]
    yield tables.conform({name: [row[name] for row in rows] for name in SCHEMA.names}, SCHEMA)


def _means(context: Context, layer: str) -> dict[str, Any]:
    """Of each measure, the mean over the layer's maps."""
    units = tables.read(context.run.slice(context.config.units, layer), UNITS.names)
    columns = {name: units[name].to_pylist() for name in UNITS.names}
    columns["answers_alike"] = [others > 0 for others in columns["response_duplicates"]]
    columns["middle_share"] = [
        None if low is None else 1 - low - high
        for low, high in zip(columns["low_share"], columns["high_share"], strict=True)
    ]
    return {"maps": units.num_rows, **{name: _mean(columns[name]) for name in MEASURES}}


def _mean(values: list[float | None]) -> float | None:
    """Of the maps that have it."""
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def paragraph(rows: list[dict[str, Any]], one: str, other: str) -> str:
    """What was found, in words, from the numbers alone.

    Args:
        rows: of one comparison.
        one, other: names of the runs.
    """
    found = {(row["place"], row["measure"]): (row["value"], row["other_value"]) for row in rows}
    maps = {row["place"]: (row["maps"], row["other_maps"]) for row in rows}
    ours, theirs = (sum(counts) for counts in zip(*maps.values(), strict=True))
    said = [f"{one} against {other}, {len(maps)} layers by place ({ours} and {theirs} maps)."]
    bands = [name for name in ("low_share", "middle_share", "high_share") if None not in found[1, name]]
    if bands:
        said.append(f"First layer: {'; '.join(_against(found[1, name]) + ' ' + MEASURES[name] for name in bands)}.")
    for place in (1, 2):
        pair = found.get((place, "aliased_share"), (None, None))
        if None not in pair:
            which = one if pair[0] < pair[1] else other
            said.append(f"Of layer {place}, {_against(pair)} is aliased by the first stride: less in {which}.")
    faults = [
        f"{MEASURES[name]} {_against(_over_layers(found, maps, name))}"
        for name in ("dead", "nearly_dead", "filter_duplicate", "answers_alike", "dominant")
    ]
    said.append(f"Of all maps: {'; '.join(faults)}.")
    entropies = [found[place, "class_entropy"] for place in (1, len(maps))]
    if all(None not in pair for pair in entropies):
        (first, other_first), (last, other_last) = entropies
        said.append(
            f"Entropy of the top-9's classes (0: one class, 1: spread evenly), from the first layer to the "
            f"last: {first:.2f} to {last:.2f} against {other_first:.2f} to {other_last:.2f}."
        )
    return " ".join(said)


def _against(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1%} against {pair[1]:.1%}"


def _over_layers(found: dict[Any, Any], maps: dict[int, tuple[int, int]], measure: str) -> tuple[float, float]:
    """The share of all maps of each run, from the layers' shares."""
    one, other = (
        sum(found[place, measure][run] * counts[run] for place, counts in maps.items())
        / sum(counts[run] for counts in maps.values())
        for run in (0, 1)
    )
    return one, other


ANALYSIS = Derivation(
    table="units_comparison", schema=SCHEMA, selects=("against",), slices=slices, sources=sources, make=make
)


def run(options: derive.Options, against: str) -> int:
    """Make the comparison with another run that is missing, and say what was found. Returns the exit status 0."""
    config = Config(against=against, units=named("units", options.name))
    derive.run(ANALYSIS, options, config)
    table = named("units_comparison", options.name)
    location = Run.at(options.run).slice(table, Run.at(against).load_model().model_id)
    say(paragraph(tables.read(location).to_pylist(), options.run, against))
    return 0
