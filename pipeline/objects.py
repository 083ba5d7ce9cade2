"""The objects that a sample's json names: `boxes`, a list of {"label": name, "xyxy": [left, top, right, bottom]}.

Published boxes have faults: some have no area, some no class of the index. Such a box is left out, with the reason; the
image is used without it. This is the only reader of boxes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.shards import Sample
from zfnet.merging import Edges


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image, in the order of its json."""

    boxes: Edges
    """[N, 4] top, left, bottom, right in pixels of the image as stored."""
    labels: npt.NDArray[np.int64]
    """[N] classes, by their place in the index."""
    refused: list[tuple[Any, str]]
    """Entries that are no usable box, each with a reason: no_area, unknown_class, no_box."""

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, label: int) -> Edges:
        """The boxes of one class."""
        found: Edges = self.boxes[self.labels == label]
        return found


def objects_of(sample: Sample, classes: Sequence[str]) -> Objects:
    """The objects of a sample; none where it has no json, or one without boxes."""
    boxes, labels, refused = [], [], []
    for entry in _entries(sample):
        label, edges = _label(entry), _edges(entry)
        if label is None or edges is None:
            refused.append((entry, "no_box"))
        elif not _has_area(edges):
            refused.append((entry, "no_area"))
        elif label not in classes:
            refused.append((entry, "unknown_class"))
        else:
            boxes.append(edges)
            labels.append(list(classes).index(label))
    return Objects(np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64), refused)


def boxes_of(sample: Sample) -> Edges:
    """[N, 4], as those of Objects: the boxes of a sample that have an area, whatever their classes."""
    found = [edges for edges in map(_edges, _entries(sample)) if edges is not None and _has_area(edges)]
    return np.array(found, np.float64).reshape(-1, 4)


def labels_of(sample: Sample) -> list[str]:
    """The classes that a sample's boxes name, each once, sorted: also of boxes that cannot be used.

    PASCAL's classes of an image are those of all objects that are listed for it.
    """
    return sorted({label for label in map(_label, _entries(sample)) if label is not None})


def _label(entry: Any) -> str | None:
    label = entry.get("label") if isinstance(entry, dict) else None
    return None if label is None else str(label)


def _edges(entry: Any) -> list[float] | None:
    """Top, left, bottom, right; None where there are no four numbers."""
    try:
        left, top, right, bottom = (float(edge) for edge in entry["xyxy"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return [top, left, bottom, right]


def _has_area(edges: list[float]) -> bool:
    top, left, bottom, right = edges
    return bool(np.isfinite(edges).all()) and right > left and bottom > top


def _entries(sample: Sample) -> list[Any]:
    try:
        found = json.loads(sample.members.get("json", b""))["boxes"]
        return list(found) if isinstance(found, list) else []
    except (ValueError, KeyError, TypeError):
        return []
