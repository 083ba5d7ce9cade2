"""Parts x model -> table: map, commit, fold. How every analysis runs on Ray.

A plan is a list of samples cut into parts, and the slices to make of them. An actor reads and decodes a part, hands
its batches to the analysis, and commits the part's rows by one rename under a name that follows from the part alone.
When all parts are there, the fold turns them into the finished tables, and the manifest, written last, says so.
Killed at any moment, the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from pipeline import cluster, tables
from pipeline.actor import PartActor
from pipeline.analysis import Analysis
from pipeline.context import Context, Options, open_context
from pipeline.errors import SweepFailed
from pipeline.progress import Progress, say
from pipeline.shards import Skipped
from pipeline.work import Work

EXIT_SKIPPED = 3
"""Exit status of a job that finished with more samples skipped than --max-skipped allows."""


def run(analysis: Analysis, options: Options, config: Any) -> int:
    """Make the slices that are missing. Returns the exit status: 0, or 3 above --max-skipped.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    started = time.time()
    context = open_context(options, config, analysis.table, "cpu")
    context = replace(context, config=analysis.resolve(context))
    plan = analysis.plan(context)
    decides = context.decides(analysis.selects)
    missing = context.run.missing(context.table, plan.slices, decides)
    if not missing:
        say(f"{context.table}: {_listed(plan.slices)} finished already, in {context.run.results(context.table)}")
        return _status(context, plan.slices, options.max_skipped)
    work = Work.of(context, analysis, missing, plan.samples, decides)
    work.prepare()
    todo = work.unfinished_parts()
    say(f"{context.table}: {json.dumps(decides)}")
    say(f"{context.table}: {_listed(missing)}; {plan.samples.num_rows} images, {len(todo)} of {work.count} parts to do")
    if todo:
        with nullcontext() if options.workers.num == 0 else cluster.connected(options.address):
            _map(analysis, options, work, todo)
    _fold(analysis, context, options, work, started)
    say(f"{context.table}: finished in {time.time() - started:.1f} s: {context.run.results(context.table)}")
    return _status(context, plan.slices, options.max_skipped)


def _listed(slices: list[str]) -> str:
    return ", ".join(slices) if len(slices) <= 8 else f"{len(slices)} slices"


def _map(analysis: Analysis, options: Options, work: Work, todo: list[int]) -> None:
    """Send the unfinished parts to actors and wait for all of them."""
    resources = cluster.resolve(options.workers)
    arguments = {
        "module": analysis.module,
        "options": options,
        "config": work.context.config,
        "slices": work.slices,
        "resources": resources,
        "session": uuid.uuid4().hex[:8],
        "token": str(work.token),
    }
    progress = Progress(work.context.table, len(todo), sum(work.parts[number].num_rows for number in todo))
    failures = []
    for account in cluster.map_parts(PartActor, arguments, [{"part": number} for number in todo], resources):
        if account["error"]:
            failures.append(account)
            if account["fatal"]:
                break
        else:
            progress.advance(account["samples"])
    if failures:
        worst = failures[-1]
        raise SweepFailed(
            f"{work.context.table}: part {worst['part']} failed: {worst['error']}\n{len(work.unfinished_parts())} of "
            f"{work.count} parts are not done; what is done is kept: mend the cause and give the same command again"
        )


def _fold(analysis: Analysis, context: Context, options: Options, work: Work, started: float) -> None:
    """Finished tables from all parts, then skipped table, account and manifests; the main table's manifest is last."""
    skipped = _skipped_of(work)
    if len(skipped) == sum(part.num_rows for part in work.parts):
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).items())
        raise SweepFailed(f"{context.table}: not one image could be read ({reasons}): there is nothing to write")
    parts = [work.part(number) for number in range(work.count)]
    rows: dict[str, dict[str, int]] = {}
    for table, slice_, schema, pieces in analysis.fold(context, parts, work.slices):
        table = table if options.name is None else f"{table}-{options.name}"
        location = context.run.results(table) / f"{slice_}.parquet"
        count = tables.write_stream(pieces, schema, location, staging=work.location / "staging")
        rows.setdefault(table, {})[slice_] = count
    _write_skipped(context, skipped)
    _write_account(context, work)
    entry = {
        "fingerprint": work.decides,
        "parts": work.count,
        "samples": sum(part.num_rows for part in work.parts),
        "skipped": dict(Counter(s.reason for s in skipped)),
        "max_skipped": options.max_skipped,
        "environment": json.loads((work.location / "environment.json").read()),
        "seconds": round(time.time() - started, 3),
    }
    for table in sorted(rows, key=lambda name: name == context.table):
        context.run.finish(table, {slice_: {"rows": count, **entry} for slice_, count in rows[table].items()})
    work.delete()


def _skipped_of(work: Work) -> list[Skipped]:
    """The skipped samples of all parts."""
    found = []
    for number in range(work.count):
        with work.part(number).open() as file:
            notes = pq.read_schema(file).metadata or {}
        found += [Skipped(*row) for row in json.loads(notes.get(b"skipped", b"[]"))]
    return found


def _write_skipped(context: Context, skipped: list[Skipped]) -> None:
    """Add to results/skipped/TABLE.parquet: each sample and reason once."""
    location = context.run.location / "results" / "skipped" / f"{context.table}.parquet"
    new = {(context.table, s.shard, s.key, s.reason, s.detail) for s in skipped}
    known = {tuple(row.values()) for row in tables.read(location).to_pylist()} if location.exists() else set()
    rows = sorted(new | known)
    columns = dict(zip(tables.SKIPPED.names, zip(*rows, strict=True), strict=True)) if rows else {}
    table = tables.conform({name: list(columns.get(name, [])) for name in tables.SKIPPED.names}, tables.SKIPPED)
    tables.write(table, location)


def _write_account(context: Context, work: Work) -> None:
    """Add this plan's parts to results/account/TABLE.parquet."""
    location = context.run.location / "results" / "account" / f"{context.table}.parquet"
    attempts = Counter(name.split(".")[0] for name in (work.location / "attempts").names())
    rows = []
    for number in range(work.count):
        name = f"part-{number:06d}"
        account = json.loads((work.location / "account" / f"{name}.json").read())
        rows.append({"part": number, "plan": work.location.name, "attempts": attempts[name], **account})
    if location.exists():
        rows = [row for row in tables.read(location).to_pylist() if row["plan"] != work.location.name] + rows
    table = tables.conform({name: [row[name] for row in rows] for name in tables.ACCOUNT.names}, tables.ACCOUNT)
    tables.write(table, location)


def _status(context: Context, slices: list[str], max_skipped: float) -> int:
    """0, or 3 where a slice lost a larger share of its samples than allowed."""
    manifest = context.run.manifest(context.table)
    worst = max((manifest[name] for name in slices), key=lambda entry: sum(entry["skipped"].values()))
    skipped, samples = sum(worst["skipped"].values()), worst["samples"]
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in worst["skipped"].items())
        where = f"results/skipped/{context.table}.parquet"
        say(f"{context.table}: {skipped} of {samples} samples skipped ({reasons}); see {where}")
    return EXIT_SKIPPED if skipped > max_skipped * samples else 0
