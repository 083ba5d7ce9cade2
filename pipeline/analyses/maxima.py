"""Reading the table `maxima` of top9: the strongest activation of every map for every image, in key order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.derive import Context, require_slices, source

BLOCK_BYTES = 2**28
"""Of maxima and cells that are held at once."""

_BYTES_OF_AN_ENTRY = 12 + 20
"""Maximum, row and column, and what sorting them takes."""

_SAMPLE = ("data_id", "key", "shard", "label", "label_name")


def slices(context: Context) -> list[str]:
    """The layers of `config.layers` in the table `config.maxima`. Raises: RunError where there are none."""
    job = "jobs/top9.py, with --maxima-gb large enough,"
    return require_slices(context, context.config.maxima, context.config.layers, job)


def sources(context: Context, layer: str) -> dict[str, Any]:
    """That table's slice."""
    return {context.config.maxima: source(context, context.config.maxima, layer)}


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive feature maps of a layer over all images."""

    first: int
    """Number of the first of these maps."""
    maxima: npt.NDArray[np.float32]
    """[images, maps]"""
    row: npt.NDArray[np.int32]
    """[images, maps]"""
    col: npt.NDArray[np.int32]
    """[images, maps]"""

    def part(self, start: int, stop: int) -> Block:
        """Those of its maps from the start-th to before the stop-th."""
        chosen = np.s_[:, start:stop]
        return Block(self.first + start, self.maxima[chosen], self.row[chosen], self.col[chosen])


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a layer's maxima, in key order: in an order by their places, ties go by key."""

    samples: pa.Table
    """data_id, key, shard, label, label_name."""
    place: npt.NDArray[np.int64]
    """[images] of each row of the file: its image's place in key order."""


def images(context: Context, table: str, layer: str) -> Images:
    """The images that were swept."""
    samples = tables.read(context.run.slice(table, layer), list(_SAMPLE))
    order = np.asarray(pc.sort_indices(samples["key"]))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return Images(samples.take(pa.array(order)), place)


def blocks(context: Context, table: str, layer: str, found: Images) -> Iterator[Block]:
    """All feature maps, so many at a time as BLOCK_BYTES hold; each block is a pass over the file."""
    maps = context.graph[context.graph.activation_of(layer)].shape[0]
    count = len(found.place)
    together = max(1, BLOCK_BYTES // (_BYTES_OF_AN_ENTRY * max(1, count)))
    for first in range(0, maps, together):
        last = min(maps, first + together)
        maxima = np.empty((count, last - first), np.float32)
        row, col = np.empty_like(maxima, dtype=np.int32), np.empty_like(maxima, dtype=np.int32)
        done = 0
        for some in tables.stream(context.run.slice(table, layer), ["maxima", "cells", "map_width"]):
            where = found.place[done : done + some.num_rows]
            done += some.num_rows
            maxima[where] = matrix(some["maxima"])[:, first:last]
            row[where], col[where] = np.divmod(
                matrix(some["cells"])[:, first:last], some["map_width"].to_numpy()[:, None]
            )
        yield Block(first, maxima, row, col)


def matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of lists of one length as [rows, length]."""
    found: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
    return found
