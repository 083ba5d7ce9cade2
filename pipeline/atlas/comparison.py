"""Two runs side by side: how they were made, their curves, their layers, and every chart that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.atlas import catalogue, history, table_charts
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.charts import Bars, Chart
from pipeline.atlas.layers import Face
from pipeline.atlas.records import Layer, Sources
from pipeline.atlas.site import Site
from pipeline.runs import Run


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: str
    run: Run
    facts: dict[str, Any]
    layers: tuple[Layer, ...]
    found: tuple[ResultTable, ...]


def write(site: Site, sources: Sources, faces: Sequence[Face], other: Run) -> None:
    """Write comparison.html. Raises: RunError where the other run has no model."""
    ours = _side(sources.run, tuple(face.layer for face in faces))
    others = Sources(run=other)
    theirs = _side(other, tuple(others.layer(name) for name in others.layers()))
    if theirs.name == ours.name:
        theirs = Side(str(other.location), other, theirs.facts, theirs.layers, theirs.found)
    site.write_page(
        "comparison.html",
        "comparison.html.j2",
        run_name=ours.name,
        ours=ours,
        theirs=theirs,
        settings=_differing(ours.facts, theirs.facts),
        charts=history.charts({side.name: history.epochs(side.run, side.found) for side in (ours, theirs)}),
        layers=_by_name(ours.layers, theirs.layers),
        both=_charts_of_both(ours, theirs),
    )


def _side(run: Run, layers: tuple[Layer, ...]) -> Side:
    facts = run.describe()
    return Side(run.location.name, run, facts, layers, tuple(catalogue.find(run, facts["model_id"])))


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Settings that are not the same, by the way to them."""
    one, other = ({k: v for k, v in history.flat(facts) if k != "history"} for facts in (ours, theirs))
    return [(k, one.get(k, "–"), other.get(k, "–")) for k in (one | other) if one.get(k) != other.get(k)]


def _by_name(ours: Sequence[Layer], theirs: Sequence[Layer]) -> list[tuple[str, Layer | None, Layer | None]]:
    """The layers of both runs, those of one name beside each other."""
    one, other = ({layer.name: layer for layer in layers} for layers in (ours, theirs))
    return [(name, one.get(name), other.get(name)) for name in (one | other)]


def _charts_of_both(ours: Side, theirs: Side) -> list[tuple[ResultTable, list[Chart | Bars], list[Chart | Bars]]]:
    """The natural charts of every table that both have under one name."""
    known = {table.name: table for table in theirs.found}
    pairs = [(table, known[table.name]) for table in ours.found if table.name in known]
    drawn = [(one, table_charts.charts(ours.run, one), table_charts.charts(theirs.run, other)) for one, other in pairs]
    return [(table, one, other) for table, one, other in drawn if one and other]
