"""What of a run is finished and what is left, how fast it goes and how long it will take: from its directory alone.

The rate is that of the newest files: nothing is asked of a job that may be on another machine, or dead. When the last
of them was written is said too, so that work which nobody does any more shows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass

from pipeline import checkpoints, metrics
from pipeline.progress import clock, say
from pipeline.runs import Run, RunError

_RECENT_SECONDS = 600.0
_RECENT_PARTS = 9


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training that is not finished."""

    epoch: int
    """Whole epochs so far."""
    epochs: int
    step: int | None
    """Steps so far over all epochs, where it is known."""
    images_per_second: float | None
    seconds_left: float | None
    seconds_ago: float
    """Since anything was written."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A table of which slices are finished."""

    table: str
    slices: int
    rows: int
    samples: int
    """Images that were read or skipped, of the slice that had most."""
    skipped: dict[str, int]
    """Of that slice, by reason."""


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """Work that a job has begun."""

    table: str
    work: str
    """Name of its folder in unfinished/TABLE."""
    slices: list[str]
    parts: int
    parts_done: int
    samples: int
    images_per_second: float | None
    """Of the newest parts; None where too few are done."""
    seconds_left: float | None
    seconds_ago: float | None
    """Since the last part was done; None where none is."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """All there is to say of a run."""

    run: str
    architecture: str | None
    """None where there is no model yet."""
    model_id: str | None
    training: Training | None
    finished: list[Finished]
    unfinished: list[Unfinished]


def read(path: str) -> Status:
    """The status of a run directory, local or on an object store.

    Raises: RunError where there is no run, StorageError.
    """
    try:
        return _read(Run.at(path))
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(
            f"a file in {path} does not say what it should ({error!r}): bring back what was damaged"
        ) from None


def _read(run: Run) -> Status:
    now = time.time()
    described = run.describe() if (run.location / "run.json").exists() else {}
    training = None if described else _training(run, now)
    tables = (run.location / "unfinished").names()
    unfinished = [work for table in tables for work in _unfinished(run, table, now)]
    if not described and training is None and not unfinished:
        raise RunError(f"there is no run in {run.location}: nothing was trained, imported or swept there")
    return Status(
        run=str(run.location),
        architecture=described.get("architecture"),
        model_id=described.get("model_id"),
        training=training,
        finished=[_finished(run, table) for table in (run.location / "results" / "manifests").names()],
        unfinished=unfinished,
    )


def _training(run: Run, now: float) -> Training | None:
    written = (run.location / "checkpoints").times()
    if "training.json" not in written:
        return None
    plan = (run.location / "checkpoints" / "training.json").read_json()
    pace = metrics.pace(run) or {}
    return Training(
        epoch=max(checkpoints.finished(run), default=0),
        epochs=plan["recipe"]["epochs"],
        step=pace.get("step"),
        images_per_second=pace.get("images_per_second"),
        seconds_left=pace.get("seconds_left"),
        seconds_ago=now - max(written.values()),
    )


def _finished(run: Run, table: str) -> Finished:
    slices = list(run.manifest(table).values())
    most = max(slices, key=lambda entry: entry.get("samples", 0))
    return Finished(
        table=table,
        slices=len(slices),
        rows=sum(entry["rows"] for entry in slices),
        samples=most.get("samples", 0),
        skipped=most.get("skipped", {}),
    )


def _unfinished(run: Run, table: str, now: float) -> list[Unfinished]:
    """Work on a table; what is finished, by it or with other options, and only waits to be cleared is left out."""
    found = []
    for name in run.unfinished(table).names():
        folder = run.unfinished(table) / name
        if not (folder / "work.json").exists():
            continue
        work = (folder / "work.json").read_json()
        finished = run.manifest(table)
        slices = [slice_ for slice_ in work["slices"] if slice_ not in finished]
        if not slices:
            continue
        done = sorted((folder / "parts").times().values())
        rate = _parts_per_second(done)
        found.append(
            Unfinished(
                table=table,
                work=name,
                slices=slices,
                parts=work["parts"],
                parts_done=len(done),
                samples=work["samples"],
                images_per_second=rate and rate * work["samples"] / work["parts"],
                seconds_left=rate and (work["parts"] - len(done)) / rate,
                seconds_ago=now - done[-1] if done else None,
            )
        )
    return found


def _parts_per_second(done: list[float]) -> float | None:
    """Of the newest parts: those of ten minutes, or a few if they take longer; None where too few are done.

    Args:
        done: when each was written, in order.
    """
    recent = [when for when in done if when >= done[-1] - _RECENT_SECONDS]
    recent = max(recent, done[-_RECENT_PARTS:], key=len)
    seconds = recent[-1] - recent[0] if recent else 0.0
    return (len(recent) - 1) / seconds if seconds > 0 else None


def run(path: str, *, as_json: bool) -> int:
    """Print the status of a run. Returns the exit status: 0."""
    status = read(path)
    say(json.dumps(asdict(status), indent=1) if as_json else "\n".join(_lines(status)))
    return 0


def _lines(status: Status) -> list[str]:
    model = f"model {status.model_id}, {status.architecture}" if status.model_id else "no model yet"
    lines = [f"{status.run}: {model}"]
    if training := status.training:
        step = f", step {training.step}" if training.step is not None else ""
        pace = _pace(training.images_per_second, training.seconds_left, training.seconds_ago)
        lines.append(f"  training  epoch {training.epoch} of {training.epochs}{step}{pace}")
    lines += [_line_of_finished(table) for table in status.finished]
    for work in status.unfinished:
        pace = _pace(work.images_per_second, work.seconds_left, work.seconds_ago)
        lines.append(f"  under way {work.table}: {work.parts_done} of {work.parts} parts{pace}")
    return lines


def _line_of_finished(table: Finished) -> str:
    skipped = Counter(table.skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    lost = f", {skipped.total()} of {table.samples} images skipped ({why})" if skipped else ""
    return f"  finished  {table.table}: {table.slices} slices, {table.rows} rows{lost}"


def _pace(rate: float | None, left: float | None, ago: float | None) -> str:
    said = [f"{rate:.1f} images/s" if rate is not None else None, f"{clock(left)} left" if left is not None else None]
    if ago is not None:
        said.append(f"last written {clock(max(0.0, ago))} ago")
    return "".join(f", {part}" for part in said if part)
