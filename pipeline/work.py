"""A plan on storage: its parts, what is committed of them, and who tried how often."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import tables
from pipeline.analysis import Analysis
from pipeline.context import Context
from pipeline.runs import RunError, environment, plan_name
from pipeline.shards import Skipped
from pipeline.storage import Location


@dataclass(frozen=True, eq=False)
class Work:
    """A plan on storage: unfinished/TABLE/PLAN/{parts, attempts, account}."""

    context: Context
    location: Location
    slices: list[str]
    decides: dict[str, Any]
    parts: list[pa.Table]
    part_schema: pa.Schema

    @classmethod
    def of(
        cls, context: Context, analysis: Analysis, slices: list[str], samples: pa.Table, decides: dict[str, Any]
    ) -> Work:
        """The work on these slices; its name follows from what decides its content."""
        location = context.run.unfinished(context.table) / plan_name({"slices": slices, **decides})
        parts = cut(samples, context.config.part_size)
        return cls(context, location, slices, decides, parts, analysis.part_schema(context.config))

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self.parts)

    @property
    def token(self) -> Location:
        """What the driver writes first: a node that does not see it does not see the run."""
        return self.location / "plan.json"

    def prepare(self) -> None:
        """Write what the actors need to know. Raises: StorageError where the run cannot be written."""
        self.token.write(json.dumps({"slices": self.slices, **self.decides}, indent=1).encode())

    def part(self, number: int) -> Location:
        """Where a part's rows are committed."""
        return self.location / "parts" / f"part-{number:06d}.parquet"

    def unfinished_parts(self) -> list[int]:
        """Numbers of the parts that are not committed."""
        done = set((self.location / "parts").names())
        return [number for number in range(self.count) if self.part(number).name not in done]

    def begin_attempt(self, number: int, session: str) -> int:
        """Write a marker before a part is started; returns how often this session has started it now."""
        attempts = self.location / "attempts"
        before = sum(name.startswith(f"part-{number:06d}.{session}.") for name in attempts.names())
        (attempts / f"part-{number:06d}.{session}.{before + 1}").write(b"")
        return before + 1

    def commit(self, number: int, table: pa.Table, skipped: list[Skipped], account: dict[str, Any]) -> None:
        """Commit a part: its account first, then rows and skipped samples in one file, by one atomic step."""
        (self.location / "account" / f"part-{number:06d}.json").write(json.dumps(account).encode())
        notes = json.dumps([[s.shard, s.key, s.reason, s.detail] for s in skipped])
        table = table.replace_schema_metadata({"skipped": notes})
        tables.write(table, self.part(number), row_group_bytes=2**21)

    def delete(self) -> None:
        """Delete what lies here when the tables are finished."""
        self.location.delete()
        if not self.location.parent.names():
            self.location.parent.delete()

    def require_environment(self, device: str) -> None:
        """All parts of a plan must be computed alike. Raises: RunError naming what differs."""
        here, where = environment(device), self.location / "environment.json"
        if not where.exists():
            where.write(json.dumps(here).encode())
        known = json.loads(where.read())
        differing = [name for name in sorted(known | here) if known.get(name) != here.get(name)]
        if differing:
            detail = "; ".join(f"{name}: {known.get(name)!r} then, {here.get(name)!r} now" for name in differing)
            raise RunError(
                f"parts of this table were computed elsewhere ({detail}), where bits may differ. Finish it there, or "
                f"delete {self.location} to begin again here"
            )


def cut(samples: pa.Table, part_size: int) -> list[pa.Table]:
    """Parts: consecutive samples of one shard, at most `part_size`. Never cut by workers or batches."""
    if part_size < 1:
        raise ValueError(f"--part-size is {part_size}: give at least 1")
    shards = samples["shard"].combine_chunks().dictionary_encode() if samples.num_rows else pa.array([])
    codes = np.asarray(shards.indices) if samples.num_rows else np.array([], dtype=np.int64)
    borders = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), samples.num_rows]
    return [
        samples.slice(start, min(part_size, end - start))
        for first, end in itertools.pairwise(borders)
        for start in range(first, end, part_size)
    ]
