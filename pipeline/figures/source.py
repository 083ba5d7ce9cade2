"""What the figures are drawn from: the rows of a run's finished tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline import makers, tables
from pipeline.runs import Run

Row = dict[str, Any]


class Missing(Exception):
    """A figure cannot be drawn yet; the message says which table is missing and what makes it."""


@dataclass(frozen=True)
class Source:
    """A run, and what of it is shown."""

    run: Run
    against: Run | None
    """Another run, for the figures that compare two."""
    images: int
    seed: int

    def rows(self, table: str, columns: list[str], *, layer: str | None = None, run: Run | None = None) -> list[Row]:
        """The rows of all finished slices, or of those of one layer, lists as arrays. Raises: Missing."""
        run = run or self.run
        slices = run.manifest(table)
        if not slices:
            raise Missing(no_table(run, table))
        found = [run.slice(table, name) for name in slices]
        if layer is None:
            read = [tables.read(location, columns) for location in found]
        else:
            read = [tables.read_equal(location, columns, "layer", layer) for location in found]
        return cast(list[Row], pa.concat_tables(read).to_pandas().to_dict("records"))

    def layers(self, table: str) -> list[str]:
        """The layers of a table with receptive fields, from the pixels up. Raises: Missing."""
        sizes = {row["layer"]: row["height"] * row["width"] for row in self.rows(table, ["layer", "height", "width"])}
        return sorted(sizes, key=lambda layer: sizes[layer])

    def chosen(self, numbers: Iterable[int], count: int) -> list[int]:
        """So many of these numbers, drawn from the seed, ascending; all where there are fewer."""
        drawn = np.random.default_rng(self.seed).permutation(sorted(set(numbers)))[:count]
        return [int(number) for number in np.sort(drawn)]


def no_table(run: Run, table: str) -> str:
    """What is said of a table that the run has not, with the command that makes it."""
    return f"there is no table {table}: {makers.command(table, str(run.location))}"
