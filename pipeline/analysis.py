"""What an analysis is: data and functions, in one file of pipeline/analyses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.context import Context, centre_crops, normalised
from pipeline.fold import Parts
from pipeline.runs import Model, Run, runs_model
from pipeline.shards import Skipped


@dataclass(frozen=True)
class Finished:
    """One file of a finished table, on its way out of a fold."""

    table: str
    """The table, as the analysis calls it (--name is added by the sweep)."""
    slice: str
    schema: pa.Schema
    pieces: Iterator[pa.Table]
    """Its rows, so many at a time as memory should hold."""


def _no_setup(context: Context, slices: list[str]) -> None:
    return None


def _no_sources(context: Context, slice_: str) -> dict[str, Any]:
    return {}


def _no_further(context: Context) -> tuple[str, ...]:
    return ()


def _nothing(run: Run, name: str | None) -> Iterator[str]:
    return iter(())


def _as_given(context: Context) -> Any:
    return context.config


def _one_for_all(context: Context, slice_: str) -> str:
    return context.model.model_id


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One analysis as data and functions; each lives in a file of pipeline/analyses.

    Its configuration holds what decides the content, with the fields `part_size` and `batch_size`; fields that only
    choose slices are named in `selects`.
    """

    table: str
    """Name of the analysis and of its main table."""
    tables: tuple[str, ...]
    """The tables that the fold writes; a slice is finished when it is finished in each."""
    further: Callable[[Context], tuple[str, ...]] = _no_further
    """Tables that it writes as well under this configuration."""
    module: str
    """Module that holds this record as ANALYSIS, for the actors."""
    model: Callable[[Run, Any], Model] = runs_model
    """Run and configuration -> the context's network."""
    model_id: Callable[[Context, str], str | None] = _one_for_all
    """Slice -> identity of the network that it is made with; None where that is there no more."""
    part_schema: Callable[[Any], pa.Schema]
    """Configuration -> schema of a part's rows, with a column `layer` where slices are layers."""
    resolve: Callable[[Context], Any] = _as_given
    """Configuration with its defaults filled in from the run; raises where a choice is the user's."""
    selects: tuple[str, ...] = ("layers",)
    """Fields of the configuration that only choose slices."""
    slices: Callable[[Context], list[str]]
    """The slices that are wanted; raises where the run or the configuration does not allow them."""
    sources: Callable[[Context, str], dict[str, Any]] = _no_sources
    """What other tables a slice is made of, by the identity of what made them."""
    samples: Callable[[Context, list[str]], pa.Table]
    """Slices to make -> the rows of Index.split that they need, in index order."""
    setup: Callable[[Context, list[str]], Any] = _no_setup
    """Slices to make -> whatever `map_batch` needs, once for each actor."""
    decode: Callable[[Context, Any, pa.Table], tuple[list[Any], list[Skipped]]] = centre_crops
    """Samples -> decoded pictures, each with its `sample`, and what was skipped; in threads ahead of the network, or on
    nodes of their own (--decoders): pictures are plain data on no device, and need no member with the image again."""
    batch: Callable[[Context, Any, list[Any]], Any] = normalised
    """Decoded pictures, at least one -> the batch with them as `pictures`, on the device; in threads too."""
    map_batch: Callable[[Context, Any, Any], Any]
    """Batch -> anything; runs without gradients, for several batches at once in threads."""
    reduce_part: Callable[[Context, list[Any]], pa.Table]
    """The results of all batches of a part, in order -> its rows."""
    fold: Callable[[Context, Parts, list[str]], Iterator[Finished]]
    """Parts in order, slices -> the finished files."""
    in_groups: bool = False
    """Whether the fold takes its parts by Parts.groups, which may be Ray tasks where there are many."""
    forwards: Callable[[Context], int] = lambda context: 1
    """How many times a sample goes through the network, altered copies counted, for --plan."""
    expected_rows: Callable[[Context, str, set[str]], int | None] = lambda context, slice_, skipped: None
    """Slice and skipped keys -> how many rows it must have, where that is known beforehand."""
    report: Callable[[Run, str | None], Iterator[str]] = _nothing
    """Run and --name -> what the finished tables show, in lines that are said at the end."""
    then: str = "atlas.py --run {run}"
    """The job that a user may want next, which may take {data} too."""

    def written(self, context: Context) -> tuple[str, ...]:
        """All tables that the fold writes."""
        return (*self.tables, *self.further(context))
