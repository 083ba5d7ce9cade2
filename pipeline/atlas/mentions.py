"""What any other table says of one feature map or of one image: its rows, found by the shared columns alone.

A new table with the columns layer and feature_map, or key, shows up on the pages without a line written here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.atlas.catalogue import ResultTable, in_words, within
from pipeline.runs import Run
from pipeline.storage import Location

ROWS_SHOWN = 12
_SHOWN_ELSEWHERE = {"top9", "feature_maps", "maxima", "deconv", "groups", "duplicates", "pictures"}
_SHOWN_ELSEWHERE |= {"evolution", "evolution_cells", "occlusion", "features", "skipped", "account", "metrics"}
_LEFT_OUT = {"model_id", "with_model_ids", "data_id", "shard"}
_IN_BATCHES_OF = 4096


@dataclass(frozen=True)
class Mention:
    """Rows of a table about one thing."""

    table: ResultTable
    columns: tuple[tuple[str, str], ...]
    """Name and meaning."""
    rows: tuple[tuple[str, ...], ...]
    left_out: int
    """Further rows."""


def of_maps(run: Run, found: Sequence[ResultTable], layer: str) -> dict[str, list[Mention]]:
    """By the number of the feature map, what tables say of a layer's maps."""
    return _mentions(run, found, ("layer", "feature_map"), "feature_map", pc.field("layer") == layer, None)


def of_images(
    run: Run, found: Sequence[ResultTable], keys: Sequence[str], data_id: str | None
) -> dict[str, list[Mention]]:
    """By key, what tables say of images of this set."""
    return _mentions(run, found, ("key",), "key", pc.field("key").isin(list(keys)), data_id)


def _mentions(
    run: Run,
    found: Sequence[ResultTable],
    needed: tuple[str, ...],
    by: str,
    which: pc.Expression,
    data_id: str | None,
) -> dict[str, list[Mention]]:
    mentions: defaultdict[str, list[Mention]] = defaultdict(list)
    for table in found:
        if table.kind in _SHOWN_ELSEWHERE:
            continue
        for thing, (fields, rows, total) in _rows(run, table, needed, by, which, data_id).items():
            heads = tuple((field.name, (field.metadata or {}).get(b"doc", b"").decode()) for field in fields)
            mentions[thing].append(Mention(table, heads, tuple(rows), total - len(rows)))
    return mentions


def _rows(
    run: Run, table: ResultTable, needed: tuple[str, ...], by: str, which: pc.Expression, data_id: str | None
) -> dict[str, tuple[list[pa.Field], list[tuple[str, ...]], int]]:
    """Thing -> the columns that are shown, its first rows in words, how many rows it has."""
    kept: dict[str, tuple[list[pa.Field], list[tuple[str, ...]], int]] = {}
    for file in (file for file in table.files if file.is_of(data_id)):
        for batch in _batches(within(run.location, file.path), needed, which):
            fields = [field for field in batch.schema if field.name not in {*_LEFT_OUT, by}]
            for row, thing in enumerate(batch[by].to_pylist()):
                _, rows, total = kept.setdefault(str(thing), (fields, [], 0))
                if len(rows) < ROWS_SHOWN:
                    rows.append(tuple(in_words(batch[field.name][row]) for field in fields))
                kept[str(thing)] = (kept[str(thing)][0], rows, total + 1)
    return kept


def _batches(location: Location, needed: tuple[str, ...], which: pc.Expression) -> Iterator[pa.RecordBatch]:
    """The rows that are meant, without the columns of lists and pictures; none where a needed column is missing."""
    with location.open() as opened:
        parquet = tables.opened(opened)
        schema = parquet.schema_arrow
        if not set(needed) <= set(schema.names):
            return
        plain = [f.name for f in schema if not (pa.types.is_list(f.type) or pa.types.is_binary(f.type))]
        for batch in parquet.iter_batches(_IN_BATCHES_OF, columns=plain):
            some = pa.Table.from_batches([batch]).filter(which).combine_chunks()
            yield from some.to_batches()
