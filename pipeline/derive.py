"""Tables x model -> table: analyses that read finished tables alone. No images, no Ray.

A slice is made of slices of other tables, which are part of its identity, in this process, and its manifest is written
last: as with sweeps, what is finished is never rewritten, and the same command given again makes what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline import lease, tables
from pipeline.progress import say, suggest
from pipeline.runs import Model, Run, RunError, clear, environment, named, require_name, runs_model
from pipeline.storage import Location
from zfnet.graph import Graph
from zfnet.tracing import trace


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every job takes that reads tables alone."""

    run: str = "runs/demo"
    """Run directory with the tables: a local path, s3:// or gs://."""
    name: str | None = None
    """Write to results/TABLE-NAME instead of results/TABLE; letters, digits, '.', '_' and '-'."""

    def __post_init__(self) -> None:
        require_name(self.name)


@dataclass(frozen=True, eq=False)
class Context:
    """What such an analysis knows."""

    run: Run
    model: Model
    graph: Graph
    config: Any
    table: str
    """Its table, as it is called in the run."""


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """One analysis of tables, as data and functions; each lives in a file of pipeline/analyses."""

    table: str
    schema: pa.Schema
    model: Callable[[Run, Any], Model] = runs_model
    """Run and configuration -> the network that the table is of."""
    selects: tuple[str, ...] = ("layers",)
    """Fields of the configuration that only choose slices."""
    slices: Callable[[Context], list[str]]
    """The slices that are wanted; raises where the tables or the configuration do not allow them."""
    sources: Callable[[Context, str], dict[str, Any]]
    """Table -> the slice's entry in its manifest (see `source`)."""
    make: Callable[[Context, str], Iterator[pa.Table]]
    """Slice -> its rows, so many at a time as memory should hold."""
    then: str = "atlas.py --run {run}"
    """The job that a user may want next."""


def source(context: Context, table: str, slice_: str) -> dict[str, Any]:
    """What a slice of another table is: made of what, and of how many rows.

    Raises: RunError where it is of another network than the run's.
    """
    entry = context.run.manifest(table)[slice_]
    made = entry["fingerprint"].get("model_id")
    if made != context.model.model_id:
        raise RunError(
            f"{slice_} of {table} was made with model {made}, and {context.run.location} holds model "
            f"{context.model.model_id}: bring that model back, or make the table again under another --name"
        )
    return {name: entry.get(name) for name in ("fingerprint", "rows", "samples", "skipped")}


def require_slices(context: Context, table: str, wanted: tuple[str, ...], job: str) -> list[str]:
    """The finished slices of a table: those that are wanted, or all.

    Raises: RunError naming the job that makes them, where there are none, or where one is missing.
    """
    found = list(context.run.manifest(table))
    if missing := [slice_ for slice_ in wanted if slice_ not in found] if found else ["any"]:
        raise RunError(
            f"there is no slice {', '.join(missing)} of {table} in {context.run.location}, "
            f"which has {', '.join(found) or 'none'}: run {job} first"
        )
    return list(wanted) or found


def run(analysis: Derivation, options: Options, config: Any) -> int:
    """Make the slices that are missing. Returns the exit status 0.

    Raises: RunError, StorageError, each with a message for the user.
    """
    started = time.time()
    run_ = Run.at(options.run)
    model = analysis.model(run_, config)
    size = model.preprocessing.crop_px
    table = named(analysis.table, options.name)
    context = Context(run_, model, trace(model.network, (3, size, size)), config, table)
    wanted = {slice_: _fingerprint(analysis, context, slice_) for slice_ in analysis.slices(context)}
    missing = run_.missing(table, wanted)
    if missing or run_.unfinished(table).exists():
        staging = run_.unfinished(table) / "derived"
        with lease.held(run_.turn(table), staging, table, in_turn=True):
            _make(analysis, context, wanted, staging)
            clear(run_.unfinished(table))
    done = f"finished in {time.time() - started:.1f} s: " if missing else "finished already, in "
    say(f"{table}: {done}{run_.results(table)}")
    suggest(analysis.then, run=options.run)
    return 0


def _make(analysis: Derivation, context: Context, wanted: dict[str, dict[str, Any]], staging: Location) -> None:
    """Write the slices that are missing now, when nobody else writes this table's."""
    run_, table = context.run, context.table
    for slice_ in run_.missing(table, wanted):
        begun = time.time()
        rows = tables.write_stream(analysis.make(context, slice_), analysis.schema, run_.slice(table, slice_), staging)
        made = {"rows": rows, "fingerprint": wanted[slice_], "environment": environment("cpu")}
        run_.finish(table, slice_, {**made, "seconds": round(time.time() - begun, 3)}, staging)
        say(f"{table}: {slice_}, {rows} rows")


def _fingerprint(analysis: Derivation, context: Context, slice_: str) -> dict[str, Any]:
    """What decides a slice's content, ready for JSON: configuration, network, and the tables it is made of."""
    config = {name: value for name, value in asdict(context.config).items() if name not in analysis.selects}
    decided = {**config, "model_id": context.model.model_id, "sources": analysis.sources(context, slice_)}
    found: dict[str, Any] = json.loads(json.dumps(decided))
    return found
