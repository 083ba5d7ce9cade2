"""Work under way on storage: which parts, what is committed of them, and who tried how often.

What decides the content of the work is one record: for each slice its fingerprint (configuration, network, images,
source tables), the samples, and the columns of a part. Its hash is the folder's name, every part repeats which samples
it holds, and the fold checks it: parts of other work can never be taken for ours.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.analysis import Analysis
from pipeline.cluster import in_threads
from pipeline.context import Context
from pipeline.errors import SweepFailed
from pipeline.runs import LEASE, RunError, clear, environment
from pipeline.shards import Skipped
from pipeline.storage import Location

_PART_ROW_GROUP_BYTES = 2**21
_LOOKS_AT_ONCE = 16

T = TypeVar("T")


class Cut:
    """Parts: consecutive samples of one shard, at most `part_size`. Never cut by workers or batches.

    A part is sliced whenever it is asked for: a table of its own takes 3 kB, and its border 8 bytes.
    """

    def __init__(self, samples: pa.Table, part_size: int) -> None:
        self.samples = samples
        codes = np.asarray(samples["shard"].combine_chunks().dictionary_encode().indices)
        shards = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), samples.num_rows]
        starts = [np.arange(first, end, part_size) for first, end in itertools.pairwise(shards)]
        self._borders = np.concatenate([*starts, [samples.num_rows]])

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, number: int) -> pa.Table:
        number = range(len(self))[number]  # beyond the last an IndexError: so a loop over the parts ends
        start, end = self._borders[number : number + 2].tolist()
        return self.samples.slice(start, end - start)


@dataclass(frozen=True, eq=False)
class Work:
    """The slices to make and the parts to make them of: unfinished/TABLE/WORK/{parts, attempts, given_up, account}."""

    context: Context
    location: Location
    fingerprints: dict[str, dict[str, Any]]
    """Slice -> what decides its content."""
    parts: Cut
    """Rows of Index.split, part by part."""
    part_schema: pa.Schema
    attempts: str = "attempts"
    """Folder of the attempts' markers."""

    @classmethod
    def of(cls, context: Context, analysis: Analysis, slices: list[str]) -> Work:
        """The work on these slices; its name follows from what decides its content."""
        fingerprints = {slice_: fingerprint(context, analysis, slice_) for slice_ in sorted(slices)}
        samples = analysis.samples(context, sorted(slices))
        if samples.num_rows == 0:
            raise RunError(f"there is no image to make {context.table} of: choose others, or another --split")
        part_schema = analysis.part_schema(context.config)
        decides = json.dumps([fingerprints, digest(samples), part_schema.names], sort_keys=True)
        name = hashlib.sha256(decides.encode()).hexdigest()[:12]
        location = context.run.unfinished(context.table) / name
        return cls(context, location, fingerprints, Cut(samples, context.config.part_size), part_schema)

    @property
    def slices(self) -> list[str]:
        """The slices to make."""
        return list(self.fingerprints)

    @property
    def samples(self) -> int:
        """Samples of all parts."""
        return int(self.parts.samples.num_rows)

    @property
    def staging(self) -> Location:
        """Where files are built under temporary names: it goes with the work, whatever a kill left in it."""
        return self.location / "staging"

    @property
    def lease(self) -> Location:
        """Who is at work on it."""
        return self.location / LEASE

    def rivals(self) -> list[Location]:
        """Leases of work on the same slices with other options: only one of the two can be finished."""
        folder = self.context.run.unfinished(self.context.table)
        return [
            folder / name / LEASE
            for name, known in _works(self.context).items()
            if any(known.get(slice_, made) != made for slice_, made in self.fingerprints.items())
        ]

    @property
    def token(self) -> Location:
        """What the driver writes first: a node that does not see it does not see the run."""
        return self.location / "work.json"

    def prepare(self) -> None:
        """Say what the work is, and how much. Raises: StorageError where the run cannot be written."""
        amount = {"parts": len(self.parts), "samples": self.samples}
        self.token.write(json.dumps({"slices": self.fingerprints, **amount}, indent=1).encode())

    def part(self, number: int) -> Location:
        """Where a part's rows are committed."""
        return self.location / "parts" / f"{_stem(number)}.parquet"

    @property
    def committed(self) -> list[Location]:
        """All parts, when all are done."""
        return [self.part(number) for number in range(len(self.parts))]

    def unfinished_parts(self) -> list[int]:
        """Numbers of the parts that are not committed."""
        done = set((self.location / "parts").names())
        return [number for number in range(len(self.parts)) if self.part(number).name not in done]

    def _attempts(self, number: int) -> Location:
        return self.location / self.attempts / _stem(number)

    def begun(self) -> set[int]:
        """Numbers of the parts that were ever started."""
        return set(_of_parts(self.location / self.attempts))

    def starts(self, number: int) -> int:
        """How often this part was started."""
        return len(self._attempts(number).names())

    def was_begun(self, number: int) -> bool:
        """Whether this part was ever started."""
        return self.starts(number) > 0

    def begin_attempt(self, number: int, session: str, alone: bool) -> int:
        """Write a marker before a part is started.

        Args:
            alone: whether its worker does nothing else meanwhile, so that the worker's death is this part's.

        Returns: how often this session has started it alone, this time counted.
        """
        mark = f"{session}.alone."
        attempt = 1 + sum(name.startswith(mark) for name in self._attempts(number).names()) if alone else 0
        (self._attempts(number) / (f"{mark}{attempt}" if alone else f"{session}.beside")).write(b"")
        return attempt

    def _given_up(self, number: int) -> Location:
        return self.location / "given_up" / f"{_stem(number)}.json"

    def give_up(self, number: int, why: str) -> None:
        """Note that a part is not to be tried any more."""
        self._given_up(number).write(json.dumps(why).encode())

    def given_up(self) -> dict[int, str]:
        """The parts that were given up, and why."""
        found = _of_parts(self.location / "given_up")
        return {number: str(file.read_json()) for number, file in found.items()}

    def why_given_up(self, number: int) -> str | None:
        """Why a part was given up; None where it was not."""
        return str(self._given_up(number).read_json()) if self._given_up(number).exists() else None

    def try_again(self) -> None:
        """Forget which parts were given up."""
        (self.location / "given_up").delete()

    def commit(self, number: int, table: pa.Table, skipped: list[Skipped], device: str, seconds: float) -> None:
        """Commit a part: when it was done first, then rows, skipped samples and identity in one file, atomically."""
        when = json.dumps({"seconds": seconds, "skipped": len(skipped)})
        self._when(number).write(when.encode())
        identity = {
            "samples": digest(self.parts[number]),
            "skipped": [[s.shard, s.key, s.reason, s.detail] for s in skipped],
            "environment": environment(device),
        }
        table = table.replace_schema_metadata({"part": json.dumps(identity, sort_keys=True)})
        # The fold reads it, and it goes: of maxima 7 % larger than by zstd, and written in three quarters of the time.
        tables.write(table, self.part(number), row_group_bytes=_PART_ROW_GROUP_BYTES, compression="lz4")

    def verify(self) -> tuple[list[Skipped], dict[str, str]]:
        """The skipped samples of all parts, and the environment that computed them all.

        Raises: RunError where a part is not of these samples, or parts were computed in unlike environments.
        """
        skipped: list[Skipped] = []
        environments: dict[str, dict[str, str]] = {}
        for number, identity in enumerate(self._of_each_part(self._identity)):
            if identity["samples"] != digest(self.parts[number]):
                raise RunError(f"{self.part(number)} holds other samples than it should: delete it, and run again")
            skipped += [Skipped(*entry) for entry in identity["skipped"]]
            environments.setdefault(json.dumps(identity["environment"], sort_keys=True), identity["environment"])
        first, *others = environments.values()
        for other in others:
            _require_alike(first, other, self.location)
        return skipped, first

    def require_environment(self, device: str) -> None:
        """Fail early where the parts that are there were computed in another environment. Raises: RunError."""
        done = _of_parts(self.location / "parts")
        if done:
            _require_alike(self._identity(min(done))["environment"], environment(device), self.location)

    def _identity(self, number: int) -> dict[str, Any]:
        part = self.part(number)
        with tables.sound(part), part.open() as file:
            found = json.loads((pq.read_schema(file).metadata or {}).get(b"part", b""))
        return _dictionary(part, found, self.location, "samples", "skipped", "environment")

    def account(self) -> pa.Table:
        """What was done of each part, and how often it was started."""
        work = {"table": self.context.table, "work": self.location.name}
        rows = [{**work, **row} for row in self._of_each_part(self._account_of)]
        return tables.conform({name: [row[name] for row in rows] for name in tables.ACCOUNT.names}, tables.ACCOUNT)

    def _when(self, number: int) -> Location:
        return self.location / "account" / f"{_stem(number)}.json"

    def _account_of(self, number: int) -> dict[str, Any]:
        file = self._when(number)
        when = _dictionary(file, file.read_json() if file.exists() else None, self.location, "seconds", "skipped")
        attempts = self.starts(number)
        return {"part": number, "samples": self.parts[number].num_rows, "attempts": attempts, **when}

    def _of_each_part(self, look: Callable[[int], T]) -> Iterator[T]:
        """What `look` sees of every part, in order; some at once, because a bucket takes a while for each answer."""
        return in_threads(look, range(len(self.parts)), _LOOKS_AT_ONCE)


def _stem(number: int) -> str:
    """What the files of a part are called."""
    return f"part-{number:06d}"


def _of_parts(folder: Location) -> dict[int, Location]:
    """The files of a folder by the numbers of their parts; what else lies there, as file managers leave it, is left."""
    found = {name: re.fullmatch(r"part-(\d+)(\.\w+)?", name) for name in folder.names()}
    return {int(match[1]): folder / name for name, match in found.items() if match}


def _dictionary(file: Location, found: Any, work: Location, *names: str) -> dict[str, Any]:
    """What a file of this work says. Raises: RunError where it does not say all of these."""
    if not isinstance(found, dict) or not found.keys() >= set(names):
        raise RunError(
            f"{file} is not there, or not as it was written: bring it back, or delete {work} to do that work again"
        )
    return found


def begin_start(work: Location, session: str, most: int) -> Location:
    """Write a marker before a worker loads the network, to be deleted when it has: if it dies there, Ray restarts it.

    Raises: SweepFailed where `most` workers of this session have died so, or are starting at this moment.
    """
    folder = work / "starts"
    if sum(name.startswith(f"{session}.") for name in folder.names()) >= most:
        raise SweepFailed(
            "workers die again and again while they load the network (out of memory?): give each more memory, or use "
            "fewer of them a node (--workers.num, --workers.cpus)"
        )
    marker = folder / f"{session}.{uuid.uuid4().hex}"
    marker.write(b"")
    return marker


def fingerprint(context: Context, analysis: Analysis, slice_: str) -> dict[str, Any]:
    """What decides the content of a slice: configuration, network, images, and the tables it is made of."""
    sources = analysis.sources(context, slice_)
    decided = context.decides(analysis.selects) | {"model_id": analysis.model_id(context, slice_)}
    return decided | ({"sources": sources} if sources else {})


def digest(rows: pa.Table) -> str:
    """Identity of a list of samples: 16 hex digits over their shards and keys, in order."""
    listed = json.dumps([rows["shard"].to_pylist(), rows["key"].to_pylist()])
    return hashlib.sha256(listed.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def begun(context: Context, analysis: Analysis, missing: list[str]) -> list[str] | None:
    """The slices of work that was begun and of which just these are missing; None where there is none.

    A crash between two manifests leaves work of which some slices are finished: its parts still serve the others.
    """
    works = _works(context)
    manifests = _manifests(context, analysis) if works else []
    for known in works.values():
        alike = all(fingerprint(context, analysis, slice_) == made for slice_, made in known.items())
        if alike and sorted(_unfinished(manifests, known)) == sorted(missing):
            return sorted(known)
    return None


def clear_finished(context: Context, analysis: Analysis) -> None:
    """Delete the work whose slices are all finished, what a crash left of such, and what can be finished no more."""
    folder, works = context.run.unfinished(context.table), _works(context)
    manifests = _manifests(context, analysis) if works else []
    for name, known in works.items():
        # With other options, by another call: this work can be finished no more. Who is at it still finds that out.
        over = all(known.keys() <= manifest.keys() for manifest in manifests)
        if not _unfinished(manifests, known) or (over and not (folder / name / LEASE).exists()):
            clear(folder / name)
    if folder.exists() and not folder.names():
        clear(folder)


def _works(context: Context) -> dict[str, dict[str, dict[str, Any]]]:
    """The work on this table that is on storage: name -> slice -> fingerprint."""
    folder = context.run.unfinished(context.table)
    tokens = {name: folder / name / "work.json" for name in folder.names() if name != LEASE}
    return {
        name: _dictionary(token, token.read_json(), token.parent, "slices")["slices"] if token.exists() else {}
        for name, token in tokens.items()
    }


def _manifests(context: Context, analysis: Analysis) -> list[dict[str, Any]]:
    """The finished slices of each table that the analysis writes."""
    return [context.run.manifest(context.named(table)) for table in analysis.written(context)]


def _unfinished(manifests: list[dict[str, Any]], known: dict[str, dict[str, Any]]) -> list[str]:
    """Slices of work that are not finished as it would make them, in each of these tables."""
    return [
        slice_
        for slice_, made in known.items()
        if any(manifest.get(slice_, {}).get("fingerprint") != made for manifest in manifests)
    ]


def _require_alike(one: dict[str, str], other: dict[str, str], location: Location) -> None:
    """All parts of a table must be computed alike. Raises: RunError naming what differs."""
    differing = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    if differing:
        detail = "; ".join(f"{name}: {one.get(name)!r} then, {other.get(name)!r} now" for name in differing)
        raise RunError(
            f"parts of this table were computed elsewhere ({detail}), where bits may differ. Finish it there, or "
            f"delete {location} to begin again here"
        )


def reasons(skipped: list[Skipped]) -> dict[str, int]:
    """How many samples were skipped, by reason."""
    return dict(Counter(sample.reason for sample in skipped))
