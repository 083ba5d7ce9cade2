"""Parts x model -> table: map, commit, fold. How every analysis runs on Ray.

The samples that the missing slices need are cut into parts. An actor reads and decodes a part, hands its batches to the
analysis, and commits the part's rows by one rename under a name that follows from the part alone. When all parts are
there, the fold turns them into the finished files, and the manifests, written last, say so. Killed at any moment, the
same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from pipeline import cluster, lease, plan, tables
from pipeline.actor import WORKER_DIED, PartActor, torch_settings_kept
from pipeline.analysis import Analysis
from pipeline.cluster import Resources, Stage
from pipeline.context import Context, Options, open_context
from pipeline.decoder import Decoder
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.fold import Parts
from pipeline.progress import EXIT_SKIPPED, Progress, say, suggest
from pipeline.shards import Skipped
from pipeline.sources.default import shards_or_default
from pipeline.storage import Location
from pipeline.watch import Watch
from pipeline.work import Work, begun, clear_finished, fingerprint, reasons

_MANY = 1024
"""Parts from which on a fold goes to Ray tasks: fewer are folded before the tasks' processes have started."""

_NAMED = 5
"""Parts that a message names; the others are in the table."""


def run(analysis: Analysis, options: Options, config: Any) -> int:
    """Make the slices that are missing, or forecast it. Returns the exit status: 0, or 3 above --max-skipped.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    started = time.time()
    given, options = options, options.resolved()
    context = open_context(
        options, config, analysis.table, "cpu", analysis.model, partial(shards_or_default, given.data, given.index)
    )
    context = replace(context, config=analysis.resolve(context))
    if context.graph.unknown:
        say(f"{context.table}: {context.graph.limits()}")
    wanted = {slice_: fingerprint(context, analysis, slice_) for slice_ in analysis.slices(context)}
    missing = _missing(analysis, context, wanted)
    if missing and options.plan:
        return plan.forecast(analysis, options, _work(analysis, context, missing))
    if missing:
        _make(analysis, context, options, missing, started)
        say(f"{context.table}: finished in {time.time() - started:.1f} s: {context.run.results(context.table)}")
    else:
        say(f"{context.table}: {_listed(list(wanted))} finished already, in {context.run.results(context.table)}")
    status = _status(context, list(wanted), options.max_skipped)
    if not options.plan:
        clear_finished(context, analysis)
        for line in analysis.report(context.run, context.name):
            say(line)
        suggest(analysis.then, given.index, run=given.run, data=given.data)
    return status


def _missing(analysis: Analysis, context: Context, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Slices that are not finished in each of the analysis's tables."""
    missing = [context.run.missing(context.named(table), wanted) for table in analysis.written(context)]
    return sorted({slice_ for some in missing for slice_ in some})


def _work(analysis: Analysis, context: Context, missing: list[str]) -> Work:
    return Work.of(context, analysis, begun(context, analysis, missing) or missing)


def _make(analysis: Analysis, context: Context, options: Options, missing: list[str], started: float) -> None:
    work = _work(analysis, context, missing)
    for rival in work.rivals():
        lease.require_free(rival, f"{context.table} with other options")
    with lease.held(work.lease, work.staging, context.table):
        try:
            left = _missing(analysis, context, work.fingerprints)
            if missing := [slice_ for slice_ in missing if slice_ in left]:
                _map_and_fold(analysis, options, work, missing, started)
                return
        except (*FORESEEN, FileNotFoundError):
            if _missing(analysis, context, work.fingerprints):
                raise
    say(f"{context.table}: another run of this job finished it meanwhile")


def _map_and_fold(analysis: Analysis, options: Options, work: Work, missing: list[str], started: float) -> None:
    context = work.context
    work.prepare()
    todo = work.unfinished_parts()
    say(f"{context.table}: {json.dumps(context.decides(analysis.selects))}")
    say(f"{context.table}: {_listed(missing)}; {work.samples} images, {len(todo)} of {len(work.parts)} parts to do")
    _say_what_was_given_up(work, options)
    in_tasks = analysis.in_groups and len(work.parts) >= _MANY and options.workers.num != 0
    with ExitStack() as ray_:
        if in_tasks or (todo and options.workers.num != 0):
            ray_.enter_context(cluster.connected(options.address))
        if todo:
            # What did not end before may kill its worker again: all else is done by then, and what died less often.
            starts = {number: work.starts(number) for number in work.begun().intersection(todo)}
            _map(analysis, options, work, sorted(todo, key=lambda number: (starts.get(number, 0), number)))
        if not in_tasks:
            ray_.close()  # a cluster that goes from now on does not matter
        each = partial(cluster.in_tasks, on=options.workers.on) if in_tasks else map
        with lease.held(context.run.turn(context.table), work.staging, context.table, in_turn=True):
            _fold(analysis, options, work, Parts(work.committed, each), missing, started)


def _say_what_was_given_up(work: Work, options: Options) -> None:
    """What an earlier call gave up is tried again, or left out, as the user chose."""
    for number, why in work.given_up().items():
        what = "it is tried again, last" if options.given_up == "retry" else "its images are skipped"
        say(f"{work.context.table}: part {number} was given up by an earlier call ({why}): {what}")
    if options.given_up == "retry":
        work.try_again()


def _listed(slices: list[str]) -> str:
    return ", ".join(slices) if len(slices) <= 8 else f"{len(slices)} slices"


def _map(analysis: Analysis, options: Options, work: Work, todo: list[int]) -> None:
    """Send the unfinished parts to actors and wait for all of them."""
    stages = _stages(analysis, options, work)
    samples = sum(work.parts[number].num_rows for number in todo)
    watch = Watch(work, todo, log_parts=options.log_parts)
    given_up = {}
    with (
        torch_settings_kept(),
        Progress(work.context.table, len(todo), samples) as progress,
        closing(cluster.map_parts(todo, *stages)) as parts,
    ):
        for done in parts:
            watch.advance(done)
            if done["given_up"]:
                given_up[int(done["part"])] = str(done["error"])
                say(f"{work.context.table}: part {done['part']} is given up: {done['error']}")
            elif done["error"]:
                raise SweepFailed(
                    f"{work.context.table}: part {done['part']} failed: {done['error']}\n"
                    f"{len(work.unfinished_parts())} of {len(work.parts)} parts are not done; what is done is kept: "
                    "mend the cause and give the same command again"
                )
            progress.advance(done["samples"])
    if given_up:
        _end_with_given_up(work, given_up)


def _end_with_given_up(work: Work, given_up: dict[int, str]) -> None:
    """Write whose images are missing, and end. Raises: SweepFailed."""
    rows = [(row, why) for number, why in given_up.items() for row in work.parts[number].to_pylist()]
    skipped = [Skipped(row["shard"], row["key"], WORKER_DIED, why) for row, why in rows]
    _write_skipped(work, skipped)
    named = ", ".join(f"{number} ({why})" for number, why in itertools.islice(given_up.items(), _NAMED))
    named += f" and {len(given_up) - _NAMED} more" if len(given_up) > _NAMED else ""
    raise SweepFailed(
        f"{work.context.table}: given up: part {named}. Out of memory, or an image that crashes its decoder: the "
        f"{len(skipped)} images are in {_beside(work, 'skipped')}. All other parts are done and kept. The same command "
        "tries again (give workers more memory before); with --given-up skip it finishes the table without these images"
    )


def _stages(analysis: Analysis, options: Options, work: Work) -> list[Stage]:
    """The actors that a part goes through: decoders, where they are asked for, and those with the network."""
    session = uuid.uuid4().hex[:8]

    def stage(actor: type, options: Options, resources: Resources, session: str) -> Stage:
        arguments = {
            "module": analysis.module,
            "options": options,
            "config": work.context.config,
            "slices": work.slices,
            "resources": resources,
            "session": session,
            "token": str(work.token),
        }
        return Stage(actor, arguments, resources)

    workers = cluster.resolve(options.workers)
    stages = [stage(PartActor, options, workers, session)]
    if options.decoders.num:
        decoders = cluster.resolve_decoders(options.decoders, workers)
        stages.insert(0, stage(Decoder, replace(options, device="cpu"), decoders, f"{session}-decoding"))
    return stages


def _fold(analysis: Analysis, options: Options, work: Work, parts: Parts, slices: list[str], started: float) -> None:
    """Finished files of the slices from all parts, then skipped samples and account, then the manifests."""
    context = work.context
    skipped, environment = work.verify()
    if len(skipped) == work.samples:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons(skipped).items())
        raise SweepFailed(f"{context.table}: not one image could be read ({why}): there is nothing to write")
    entry = {
        "parts": len(work.parts),
        "samples": work.samples,
        "skipped": reasons(skipped),
        "max_skipped": options.max_skipped,
        "environment": environment,
    }
    finished = []
    for file in analysis.fold(context, parts, slices):
        table = context.named(file.table)
        if not context.run.missing(table, {file.slice: work.fingerprints[file.slice]}):
            continue  # finished before: by this job, and a further table was asked for, or by another one meanwhile
        location = context.run.slice(table, file.slice)
        rows = tables.write_stream(file.pieces, file.schema, location, work.staging)
        if table == context.table:
            _require_rows(analysis, context, file.slice, skipped, rows)
        finished.append((table, file.slice, rows))
    _write_skipped(work, skipped)
    tables.write(work.account(), _beside(work, "account"), work.staging)
    for table, slice_, rows in finished:
        made = {"rows": rows, "fingerprint": work.fingerprints[slice_], **entry}
        context.run.finish(table, slice_, {**made, "seconds": round(time.time() - started, 3)}, work.staging)


def _require_rows(analysis: Analysis, context: Context, slice_: str, skipped: list[Skipped], rows: int) -> None:
    expected = analysis.expected_rows(context, slice_, {sample.key for sample in skipped})
    if expected is not None and rows != expected:
        raise SweepFailed(f"{context.table}: {slice_} has {rows} rows and should have {expected}: a fault of ours")


def _beside(work: Work, kind: str) -> Location:
    """The file of this work in results/skipped or results/account: one a work, so that nothing is rewritten."""
    return work.context.run.location / "results" / kind / f"{work.context.table}.{work.location.name}.parquet"


def _write_skipped(work: Work, skipped: list[Skipped]) -> None:
    """results/skipped/TABLE.WORK.parquet: each sample once."""
    rows = [{"table": work.context.table, **asdict(sample)} for sample in skipped]
    table = tables.conform({name: [row[name] for row in rows] for name in tables.SKIPPED.names}, tables.SKIPPED)
    tables.write(table, _beside(work, "skipped"), work.staging)


def _status(context: Context, slices: list[str], max_skipped: float) -> int:
    """0, or 3 where a slice lost a larger share of its samples than allowed."""
    manifest = context.run.manifest(context.table)
    lost = {name: sum(manifest[name]["skipped"].values()) / manifest[name]["samples"] for name in slices}
    worst = manifest[max(lost, key=lost.__getitem__)]
    skipped = sum(worst["skipped"].values())
    why = ", ".join(f"{count} {reason}" for reason, count in worst["skipped"].items())
    about = f" ({why}); see results/skipped" if skipped else ""
    say(f"{context.table}: {skipped} of {worst['samples']} samples skipped{about}")
    return EXIT_SKIPPED if max(lost.values()) > max_skipped else 0
