"""Reading the table `features`: the images of some splits and their vectors in a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.analyses.features import slice_of
from pipeline.analyses.maxima import matrix
from pipeline.derive import Context, source
from pipeline.runs import RunError

BLOCK_BYTES = 2**26
"""Of features that are read at once."""

BLOCK_IMAGES = 2048
"""That are read at once, at most: two blocks are compared pair by pair."""

_SAMPLE = ("data_id", "split", "key", "shard", "label", "label_name", "box_labels")


@dataclass(frozen=True, eq=False)
class Vectors:
    """The features of one layer in all finished splits, or in some of them."""

    context: Context
    table: str
    layer: str
    splits: tuple[str, ...]
    """In the order in which the images come."""

    @classmethod
    def of(cls, context: Context, table: str, layer: str, splits: tuple[str, ...] = ()) -> Vectors:
        """Those of the splits; without any, of all that are finished."""
        return cls(context, table, layer, tuple(sorted(set(splits or _splits(context, table)[layer]))))

    def sources(self) -> dict[str, Any]:
        """The slices, as a fingerprint names them."""
        return {f"{self.table}/{split}": source(self.context, self.table, self._slice(split)) for split in self.splits}

    def _slice(self, split: str) -> str:
        return slice_of(self.layer, split)

    def images(self) -> pa.Table:
        """The images as `blocks` gives them: data_id, split, key, shard, label, label_name, box_labels."""
        files = [self.context.run.slice(self.table, self._slice(split)) for split in self.splits]
        return pa.concat_tables(tables.read(file, list(_SAMPLE)) for file in files)

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """The features as [images, values], as many images at a time as BLOCK_IMAGES and BLOCK_BYTES allow."""
        for split in self.splits:
            location = self.context.run.slice(self.table, self._slice(split))
            first = next(tables.stream(location, ["features"], 1), None)
            if first is not None:
                together = max(1, min(BLOCK_IMAGES, BLOCK_BYTES // matrix(first["features"]).nbytes))
                for some in tables.stream(location, ["features"], together):
                    yield matrix(some["features"])


def in_order(images: pa.Table) -> npt.NDArray[np.int64]:
    """The rows of images by split and key: an order that no cut into shards can change."""
    found: npt.NDArray[np.int64] = np.asarray(
        pc.sort_indices(images, sort_keys=[("split", "ascending"), ("key", "ascending")])
    ).astype(np.int64)
    return found


def layers(context: Context, table: str, wanted: tuple[str, ...], splits: tuple[str, ...]) -> list[str]:
    """The layers that are finished in each of these splits: those that are wanted, or all of the table.

    Raises: RunError naming the job that makes them, where there are none, or where one is missing.
    """
    found = _splits(context, table)
    asked = wanted or tuple(found)
    missing = [layer for layer in asked if layer not in found or not {*splits} <= {*found[layer]}]
    if missing or not found:
        named = ", ".join(missing) or "layer"
        have = "; ".join(f"{layer} of {', '.join(names)}" for layer, names in found.items())
        raise RunError(
            f"there is no {named} of {', '.join(splits) or 'any split'} in {table} of {context.run.location}, "
            f"which has {have or 'nothing'}: run jobs/features.py with these --layers and each --split first"
        )
    return list(asked)


def _splits(context: Context, table: str) -> dict[str, list[str]]:
    """Layer -> the splits that are finished; layers in the order in which the network runs."""
    found: dict[str, list[str]] = {}
    for slice_, entry in context.run.manifest(table).items():
        split = entry["fingerprint"]["split"]
        found.setdefault(slice_.removesuffix(slice_of("", split)), []).append(split)
    return {layer: found[layer] for layer in context.graph.operations if layer in found}
