"""What an analysis is: data and functions, in one file of pipeline/analyses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.context import Batch, Context
from pipeline.runs import RunError
from pipeline.storage import Location

FAN_IN = 64
"""States merged at once by a fold: always the same tree, whatever the number of workers."""

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    slices: list[str]
    """Slices of the table that are wanted."""
    samples: pa.Table
    """Rows of Index.split, in index order: the samples to read."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One analysis as data and functions; each lives in a file of pipeline/analyses.

    Its configuration holds only what decides the content, with the fields `part_size` and `batch_size`.
    """

    table: str
    """Name of the table, and of the analysis."""
    module: str
    """Module that holds this record as ANALYSIS, for the actors."""
    part_schema: Callable[[Any], pa.Schema]
    """Configuration -> schema of a part's rows, with a column `layer` where slices are layers."""
    plan: Callable[[Context], Plan]
    """What is to be done; raises where the run does not allow it."""
    setup: Callable[[Context, list[str]], Any] = lambda context, slices: None
    """Slices still missing -> whatever `map_batch` needs, once for each actor."""
    map_batch: Callable[[Context, Any, Batch], Any]
    """Batch -> anything; runs without gradients, for several batches at once in threads."""
    reduce_part: Callable[[Context, list[Any]], pa.Table]
    """The results of all batches of a part, in order -> its rows."""
    fold: Callable[[Context, list[Location], list[str]], Iterator[tuple[str, str, pa.Schema, Iterator[pa.Table]]]]
    """Parts in order, slices -> (table, slice, schema, its rows in pieces), for each finished file."""
    resolve: Callable[[Context], Any] = lambda context: context.config
    """Configuration with its defaults filled in from the run; raises where a choice is the user's."""
    selects: tuple[str, ...] = ("layers",)
    """Fields of the configuration that only select slices."""


def fold_tree(states: Iterator[T], merge: Callable[[list[T]], T], fan_in: int = FAN_IN) -> T:
    """Merge states in order, always by the same tree: `fan_in` neighbours at a time, level by level.

    Raises: RunError for no states.
    """
    levels: list[list[T]] = []
    for state in states:
        _push(levels, 0, state, merge, fan_in)
    if not levels:
        raise RunError("not one image could be read: there is nothing to fold; see results/skipped")
    for level in range(len(levels)):
        if levels[level] and (level + 1 < len(levels) or len(levels[level]) > 1):
            _push(levels, level + 1, merge(levels[level]), merge, fan_in)
            levels[level] = []
    return levels[-1][0]


def _push(levels: list[list[T]], level: int, state: T, merge: Callable[[list[T]], T], fan_in: int) -> None:
    if level == len(levels):
        levels.append([])
    levels[level].append(state)
    if len(levels[level]) == fan_in:
        _push(levels, level + 1, merge(levels[level]), merge, fan_in)
        levels[level] = []
