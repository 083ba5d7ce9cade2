"""Images that are chosen one by one: by key, or the first ones, of a class; what several analyses have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.context import Context, Picture
from pipeline.runs import RunError, require_at_least_one
from pipeline.views import Seen


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which images are looked at."""

    keys: tuple[str, ...] = ()
    """Images by key."""
    label: str | None = None
    """Images of one class, by its name or number."""
    first: int = 9
    """At most this many images, in the order of the shards (of the class, where one is given)."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "first")
        if self.keys and self.label is not None:
            raise RunError("--keys and --label were both given: choose images by one of them")


def samples(context: Context, slices: list[str]) -> pa.Table:
    """The chosen images. Raises: RunError for keys or classes that do not occur."""
    config: Chosen = context.config
    if config.keys:
        return with_keys(context, config.keys)
    rows = context.index.split(context.split)
    if config.label is not None:
        rows = rows.filter(pc.equal(rows["label"], _label_number(context, config.label)))
    return rows.slice(0, config.first)


def with_keys(context: Context, keys: Collection[str]) -> pa.Table:
    """The images of these keys, in index order. Raises: RunError for keys that do not occur."""
    rows = context.index.split(context.split)
    if unknown := sorted(set(keys) - set(rows["key"].to_pylist())):
        raise RunError(f"there is no key {', '.join(map(repr, unknown))} in the split {context.split!r}")
    return rows.filter(pc.is_in(rows["key"], pa.array(keys)))


def _label_number(context: Context, label: str) -> int:
    classes = context.index.classes
    if label in classes:
        return classes.index(label)
    if label.isdigit() and int(label) < len(classes):
        return int(label)
    raise RunError(
        f"there is no class {label!r}: give a number below {len(classes)} or one of {', '.join(classes[:20])}"
    )


def target_class(context: Context, picture: Picture | Seen) -> int | None:
    """The label, where the images' classes are the network's own."""
    label = picture.sample.label
    same_classes = context.index.classes == context.model.classes
    return label if same_classes and context.index.label_name(label) is not None else None
