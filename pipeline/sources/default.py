"""The data that jobs use when none is named: the rendered set, drawn where it is missing."""

from __future__ import annotations

from pipeline.shards import Index
from pipeline.storage import Location

DEFAULT = "shards/rendered"


def shards_or_default(data: str, index: str | None) -> Index:
    """The index of the shards in `data`; the default data set is drawn first if it is not there."""
    if data == DEFAULT and index is None and not (Location.of(data) / "index.json").exists():
        from pipeline.sources.rendered import Rendered
        from pipeline.sources.writer import write_shards

        return write_shards(Rendered(), data)
    return Index.load(data, index)
